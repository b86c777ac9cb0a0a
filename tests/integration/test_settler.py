"""The settler: first PostgreSQL, then Redis, and nothing leaves it before both have answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from jobq import Reject, Retry
from jobq.outbox import line
from jobq.worker import settler, turns
from tests.builders import Bench, settled, started, turn
from tests.faults.proxy import Proxy, postgres_proxy, redis_proxy
from tests.waiting import until


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


class Cut:
    """A bench whose application reaches both stores through proxies."""

    def __init__(self, bench: Bench, postgres: Proxy, redis: Proxy):
        self.bench = bench
        self.postgres = postgres
        self.redis = redis


@pytest.fixture
async def cut(shared_database_url: str, redis_url: str) -> AsyncIterator[Cut]:
    async with (
        postgres_proxy(shared_database_url) as (postgres, through_postgres),
        redis_proxy(redis_url) as (redis, through_redis),
        Bench.open(shared_database_url, redis_url, database=through_postgres, redis=through_redis) as bench,
    ):
        yield Cut(bench, postgres, redis)


def task_that(bench: Bench, ends: str) -> Any:
    """A task whose run ends in one of the three ways, and comes back at once if it comes back."""

    @bench.app.task(name=ends)
    async def task() -> None:
        if ends == "reschedule":
            raise Retry(delay=0)
        if ends == "bury":
            raise Reject

    return task


async def run_to_its_end(bench: Bench, ends: str) -> tuple[Any, UUID]:
    """A worker that has run one job, and not settled it."""
    worker = await bench.worker()
    job_id = await bench.commit_and_relay(task_that(bench, ends))
    await started(worker)
    await until(lambda: not worker.turns.runs, "the run ended")
    return worker, job_id


async def is_settled_once(bench: Bench, job_id: UUID, ends: str) -> bool:
    row, dead = await bench.row(job_id), await bench.dead(job_id)
    match ends:
        case "complete":
            return row is None and dead is None
        case "reschedule":
            return row is not None and (row["generation"], row["attempts"]) == (2, 1)
        case _:
            return row is None and dead is not None and dead["attempts"] == 1


ENDS = ["complete", "reschedule", "bury"]


# --- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ENDS)
async def test_nothing_is_acked_before_its_row_is_settled(cut: Cut, ends: str) -> None:
    bench = cut.bench
    worker, job_id = await run_to_its_end(bench, ends)
    before = await bench.working(worker)
    cut.postgres.lose_request(job_id.bytes)

    await worker.settler.step()

    assert cut.postgres.losses == 1
    assert (await bench.row(job_id))["generation"] == 1  # type: ignore[index]
    assert await bench.working(worker) == before
    assert await bench.broker.known("default", [job_id]) == [1]
    assert worker.owned.listed("default") == before, "the heartbeat vouches for it"
    await settled(worker)
    assert await is_settled_once(bench, job_id, ends)
    assert len(worker.owned) == 0
    assert await bench.working(worker) == []


@pytest.mark.parametrize("ends", ENDS)
async def test_a_write_whose_answer_is_lost_happens_once(cut: Cut, ends: str) -> None:
    bench = cut.bench
    worker, job_id = await run_to_its_end(bench, ends)
    cut.postgres.lose_reply(job_id.bytes)

    await worker.settler.step()
    is_acked = await bench.working(worker) == []
    await settled(worker)

    assert cut.postgres.losses == 1
    assert not is_acked, "whether it was written is not known yet"
    assert await is_settled_once(bench, job_id, ends)
    assert len(worker.owned) == 0
    assert await bench.working(worker) == []


async def test_the_read_that_resolves_a_doubt_may_be_lost_too(cut: Cut) -> None:
    bench = cut.bench
    worker, job_id = await run_to_its_end(bench, "complete")
    cut.postgres.lose_reply(job_id.bytes)
    await worker.settler.step()
    assert await bench.row(job_id) is None
    cut.postgres.lose_request(b"clock_timestamp()")

    await worker.settler.step()
    stays = worker.owned.listed("default")
    await settled(worker)

    assert cut.postgres.losses == 2
    assert len(stays) == 1, "nobody has told it yet that the row is gone"
    await bench.assert_drained()


@pytest.mark.parametrize("reply", [False, True], ids=["request lost", "reply lost"])
async def test_an_ack_that_redis_does_not_answer_is_sent_again(cut: Cut, reply: bool) -> None:
    bench = cut.bench
    worker, job_id = await run_to_its_end(bench, "complete")
    match = job_id.hex.encode()
    cut.redis.lose_reply(match) if reply else cut.redis.lose_request(match)

    await worker.settler.step()

    assert cut.redis.losses == 1
    assert await bench.row(job_id) is None
    assert [raw[:32] for raw in worker.owned.listed("default")] == [match], "until Redis has confirmed"
    await settled(worker)
    assert len(worker.owned) == 0
    await bench.assert_drained()


async def test_while_redis_is_away_rows_are_settled_and_acks_wait(cut: Cut) -> None:
    bench = cut.bench
    worker, first = await run_to_its_end(bench, "complete")
    cut.redis.is_refusing = True
    cut.redis.cut()

    for _ in range(3):
        await worker.settler.step()

    assert await bench.row(first) is None
    assert worker.settler.pending == 1
    cut.redis.is_refusing = False
    await settled(worker)
    await bench.assert_drained()


async def test_while_postgresql_is_away_nothing_is_dropped(cut: Cut) -> None:
    bench = cut.bench
    runs: list[int] = []

    @bench.app.task
    async def note(number: int) -> None:
        runs.append(number)

    worker = await bench.worker()
    for number in range(5):
        await bench.enqueue(note, number)
    await bench.relay()
    await started(worker)
    await until(lambda: not worker.turns.runs, "the runs ended")
    cut.postgres.is_refusing = True
    cut.postgres.cut()

    for _ in range(3):
        await worker.settler.step()

    assert worker.settler.pending == 5
    assert len(worker.owned.listed("default")) == 5
    assert len(await bench.working(worker)) == 5
    cut.postgres.is_refusing = False
    await settled(worker)
    assert sorted(runs) == list(range(5))
    await bench.assert_drained()


async def test_a_network_that_swallows_everything_is_given_up_after_a_deadline(
    cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = cut.bench
    worker, job_id = await run_to_its_end(bench, "complete")
    cut.postgres.is_black_hole = True

    with monkeypatch.context() as patched:
        patched.setattr(line, "DEADLINE_S", 0.1)
        await asyncio.wait_for(worker.settler.step(), 5)

    assert worker.settler.pending == 1
    cut.postgres.is_black_hole = False
    cut.postgres.cut()
    await settled(worker)
    assert await bench.row(job_id) is None
    await bench.assert_drained()


# --- batches ---------------------------------------------------------------------------------------------------------


async def test_all_kinds_of_ends_are_settled_in_one_flush(bench: Bench) -> None:
    worker = await bench.worker()
    ids = {ends: await bench.enqueue(task_that(bench, ends)) for ends in ENDS}
    await bench.relay()
    await started(worker)
    await until(lambda: not worker.turns.runs, "the runs ended")

    await worker.settler.step()

    assert [await is_settled_once(bench, ids[ends], ends) for ends in ENDS] == [True] * 3
    assert worker.settler.pending == 0
    assert len(worker.owned) == 0


@pytest.mark.parametrize("ends", ENDS)
async def test_a_locked_row_waits_and_holds_up_no_other(bench: Bench, ends: str) -> None:
    worker, locked = await run_to_its_end(bench, ends)
    other = await bench.commit_and_relay(bench.app.tasks[ends])
    await started(worker)
    await until(lambda: not worker.turns.runs, "the second run ended")

    async with bench.db.transaction():
        await bench.db.execute("SELECT FROM jobq.outbox WHERE id = $1 FOR UPDATE", locked)
        pause = await asyncio.wait_for(worker.settler.step(), 5)
        stays = worker.owned.listed("default")

    assert await is_settled_once(bench, other, ends)
    assert [raw[:32] for raw in stays] == [locked.hex.encode()]
    assert 0 < pause < 1
    await settled(worker)
    assert await is_settled_once(bench, locked, ends)
    assert len(worker.owned) == 0


async def test_a_run_whose_row_has_moved_on_is_acked_and_changes_nothing(bench: Bench) -> None:
    worker, job_id = await run_to_its_end(bench, "complete")
    await bench.db.execute("UPDATE jobq.outbox SET generation = 2 WHERE id = $1", job_id)

    await worker.settler.step()

    assert await bench.row(job_id) is not None
    assert len(worker.owned) == 0


async def test_a_worker_fetches_nothing_while_too_much_waits_to_be_settled(bench: Bench) -> None:
    worker, _ = await run_to_its_end(bench, "complete")
    worker.settler.limit = 1
    await bench.commit_and_relay(bench.app.tasks["complete"])

    await started(worker)
    left = await bench.ready()
    await settled(worker)
    await turn(worker)

    assert len(left) == 1
    await bench.assert_drained()


async def test_a_worker_that_waits_for_room_in_the_buffer_is_woken(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "_LOOK_UP_S", 60.0)
    worker, _ = await run_to_its_end(bench, "complete")
    worker.settler.limit = 1
    for _ in range(5):
        await bench.commit_and_relay(bench.app.tasks["complete"])
    taking = asyncio.create_task(worker.turns.take_until_stopped())
    settling = asyncio.create_task(worker.settler.run())

    async def is_drained() -> bool:
        return not await bench.db.fetchval("SELECT count(*) FROM jobq.outbox")

    await until(is_drained, "every job is done", 20)
    worker.orders.stopping.set()
    worker.orders.wake()
    await taking
    settling.cancel()
    await asyncio.gather(settling, return_exceptions=True)


@pytest.mark.parametrize("runs", [99, 100])
async def test_a_flush_waits_for_company_unless_it_has_much(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, runs: int
) -> None:
    monkeypatch.setattr(settler, "GATHER_S", 60.0)
    worker = await bench.worker(concurrency=100)
    task = task_that(bench, "complete")
    async with bench.app.database.sessions.begin() as session:
        await bench.app.enqueue_many(session, [task.job() for _ in range(runs)])
    await bench.relay()
    await started(worker)
    await until(lambda: not worker.turns.runs, "the runs ended")

    settling = asyncio.create_task(worker.settler.run())
    for _ in range(10):
        await asyncio.sleep(0)
    is_waiting = not worker.settler._in_hand
    settling.cancel()
    await asyncio.gather(settling, return_exceptions=True)

    assert is_waiting is (runs < 100)
    await settled(worker)
    await bench.assert_drained()


# --- giving up -------------------------------------------------------------------------------------------------------


async def test_unwritten_runs_are_handed_back_also_out_of_a_write_that_hangs(cut: Cut) -> None:
    bench = cut.bench
    worker, job_id = await run_to_its_end(bench, "complete")
    cut.postgres.is_black_hole = True
    flushing = asyncio.create_task(worker.settler.run())
    await until(lambda: worker.settler._in_hand, "the settler is writing")

    worker.settler.hand_back_unwritten()
    await asyncio.wait_for(worker.settler.flushed(), 5)
    flushing.cancel()
    await asyncio.gather(flushing, return_exceptions=True)
    cut.postgres.is_black_hole = False
    cut.postgres.cut()

    assert len(worker.owned) == 0
    assert [raw[:32] for raw in await bench.ready()] == [job_id.hex.encode()]
    assert await bench.row(job_id) is not None


async def test_released_entries_go_back_to_the_front_in_the_order_of_their_fetch(bench: Bench) -> None:
    worker = await bench.worker(concurrency=3)
    ids = [await bench.enqueue(task_that(bench, "complete")) for _ in range(1)]
    ids += [await bench.enqueue(bench.app.tasks["complete"]) for _ in range(4)]
    await bench.relay()
    before = await bench.ready()
    holdings = await worker.turns._fetch(worker.turns._room())

    for holding in holdings:
        worker.settler.release(holding)
    await settled(worker)

    assert len(holdings) == 3
    assert await bench.ready() == before
