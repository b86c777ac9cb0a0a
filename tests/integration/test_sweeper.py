"""The sweeper: who is dead, what a crash counts, and why nobody is swept who only could not be seen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from jobq import Context, DeadJob, Retry, Snooze
from jobq.broker.client import ResponseError
from jobq.broker.keys import queue_names
from jobq.model import Entry
from jobq.outbox import settle
from jobq.worker import sweeper as sweeper_module
from jobq.worker.worker import Worker
from tests.builders import Bench, Gate, beating, settled, started, turn, write_effect
from tests.faults.proxy import redis_proxy
from tests.integration.test_settle import other_connection
from tests.waiting import until

LEASE_S = 10.0


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


class Clock:
    """The sweeper's monotonic clock, set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1_000.0
        monkeypatch.setattr(sweeper_module, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def watch(worker: Worker, clock: Clock, seconds: float, *, between: Callable[[], Any] | None = None) -> list[str]:
    """Look once a second; returns the names of the swept."""
    swept: list[str] = []
    for _ in range(int(seconds)):
        swept += await worker.sweeper.step()
        if between is not None:
            between()
        clock.now += 1.0
    return swept


def counted(bench: Bench) -> tuple[Any, list[int], Gate]:
    runs: list[int] = []
    gate = Gate()

    @bench.app.task(name="counted")
    async def task(number: int) -> None:
        runs.append(number)
        await gate.wait()

    return task, runs, gate


async def dead_worker_with(bench: Bench, job_ids: list[UUID], queue: str = "default") -> tuple[str, bytes]:
    """A worker that fetched these jobs and was never heard of again; returns its name and counter."""
    name, counter = "w-dead", b"123"
    keys = bench.broker.keys(queue)
    await bench.redis.hset(keys.beats, name, counter)
    await bench.broker.announce([queue])
    for job_id in job_ids:
        row = await bench.row(job_id)
        assert row is not None
        entry = Entry.of(job_id, row["generation"], row["priority"]).raw
        await bench.redis.rpush(keys.working(name), entry)
        await bench.redis.hset(keys.known, job_id.hex, row["generation"])
    return name, counter


# --- who is dead -----------------------------------------------------------------------------------------------------


async def test_a_worker_whose_counter_stood_still_for_a_lease_is_swept(bench: Bench, clock: Clock) -> None:
    task, _, _ = counted(bench)
    living = await bench.worker(lease=LEASE_S)
    job_id = await bench.enqueue(task, 1)
    await dead_worker_with(bench, [job_id])

    before = await watch(living, clock, LEASE_S)
    after = await watch(living, clock, 1)

    assert (before, after) == ([], ["w-dead"])
    assert await bench.ready() == [Entry.of(job_id, 2, 2).raw]
    assert (await bench.row(job_id))["crashes"] == 1  # type: ignore[index]
    assert set(await bench.broker.beats("default")) == {living.name}
    assert (await bench.stats())["swept"] == 1


async def test_a_dead_worker_whose_counter_and_name_were_lost_is_swept_all_the_same(bench: Bench, clock: Clock) -> None:
    """Or its job would stay in its working list for ever: known to Redis, so that no walk pushes it again."""
    task, _, _ = counted(bench)
    living = await bench.worker(lease=LEASE_S)
    job_id = await bench.enqueue(task, 1)
    await dead_worker_with(bench, [job_id])
    await watch(living, clock, 3)
    keys = bench.broker.keys("default")
    await bench.redis.hdel(keys.beats, "w-dead")

    assert await watch(living, clock, LEASE_S) == []
    assert await watch(living, clock, 1) == ["w-dead"]
    assert await bench.ready() == [Entry.of(job_id, 2, 2).raw]
    assert await bench.working_of("w-dead") == []


async def test_a_worker_that_signed_off_is_not_swept(bench: Bench, clock: Clock) -> None:
    living = await bench.worker(lease=LEASE_S)
    await dead_worker_with(bench, [])
    await watch(living, clock, 3)
    await bench.broker.sweep("default", "w-dead", b"123", {})

    assert await watch(living, clock, 2 * LEASE_S) == []


async def test_a_worker_that_beats_is_not_swept_when_the_names_of_the_queues_are_lost(
    bench: Bench, clock: Clock
) -> None:
    """Its queue is served by nobody else here, and was known from those names."""
    task, _, _ = counted(bench)
    living, other = await bench.worker(lease=LEASE_S), await bench.worker(lease=LEASE_S, queues=("elsewhere",))
    job_id = await bench.enqueue(task, 1, queue="elsewhere")
    await bench.relay()
    await started(other)
    await watch(living, clock, 3, between=other.heartbeat.step)
    await bench.redis.delete(queue_names(bench.broker.database_id))

    assert await watch(living, clock, 3 * LEASE_S, between=other.heartbeat.step) == []
    assert (await bench.row(job_id))["crashes"] == 0  # type: ignore[index]


async def test_a_worker_that_beats_is_not_swept(bench: Bench, clock: Clock) -> None:
    living, other = await bench.worker(lease=LEASE_S), await bench.worker(lease=LEASE_S)

    swept = await watch(living, clock, 3 * LEASE_S, between=other.heartbeat.step)

    assert swept == []


async def test_a_worker_never_sweeps_itself(bench: Bench, clock: Clock) -> None:
    living = await bench.worker(lease=LEASE_S)

    assert await watch(living, clock, 3 * LEASE_S) == []


async def test_a_beat_just_before_the_end_of_the_lease_starts_it_anew(bench: Bench, clock: Clock) -> None:
    living, other = await bench.worker(lease=LEASE_S), await bench.worker(lease=LEASE_S)

    swept = await watch(living, clock, LEASE_S)
    other.heartbeat.step()
    swept += await watch(living, clock, LEASE_S)

    assert swept == []
    assert await watch(living, clock, 1) == [other.name]


async def test_a_gap_between_two_looks_starts_every_watch_anew(bench: Bench, clock: Clock) -> None:
    """Who was away cannot say that somebody stood still."""
    living = await bench.worker(lease=LEASE_S)
    await dead_worker_with(bench, [])
    await watch(living, clock, LEASE_S - 1)

    clock.now += 2.5
    swept = await watch(living, clock, LEASE_S)

    assert swept == []
    assert await watch(living, clock, 1) == ["w-dead"]


async def test_nobody_is_swept_while_redis_takes_no_writes(bench: Bench) -> None:
    """All can be seen then, and none can beat: a disk that is full, or a master that has lost its replicas."""
    task, _, _ = counted(bench)
    living, other = await bench.worker(lease=1.0), await bench.worker(lease=1.0)
    job_id = await bench.commit_and_relay(task, 1)
    await started(other)
    swept: list[str] = []

    async def has_looked_for(seconds: float) -> None:
        ends_at = time.monotonic() + seconds

        async def look() -> bool:
            swept.extend(await living.sweeper.step())
            return time.monotonic() > ends_at

        await until(look, "it has looked for so long")

    await bench.redis.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(ResponseError):
            other.heartbeat.step()
        await has_looked_for(2.5)
    finally:
        await bench.redis.config_set("min-replicas-to-write", 0)
    assert swept == []
    assert (await bench.row(job_id))["crashes"] == 0  # type: ignore[index]

    living.heartbeat.step()
    async with beating(living):
        await has_looked_for(2.0)
    assert swept == [other.name]


async def test_a_failed_look_starts_every_watch_anew(shared_database_url: str, redis_url: str, clock: Clock) -> None:
    """After an outage of Redis nobody has beaten for a while: else all workers would sweep each other."""
    async with (
        redis_proxy(redis_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, redis=through) as bench,
    ):
        living = await bench.worker(lease=LEASE_S)
        await dead_worker_with(bench, [])
        await watch(living, clock, LEASE_S)

        proxy.is_refusing = True
        proxy.cut()
        during = await watch(living, clock, 1)
        proxy.is_refusing = False
        after: list[str] = []

        async def sees_again() -> bool:
            after.extend(await living.sweeper.step())
            return bool(living.sweeper._watches)

        await until(sees_again, "Redis was read again")
        after += await watch(living, clock, LEASE_S)

        assert (during, after) == ([], [])
        assert await watch(living, clock, 1) == ["w-dead"]


async def test_workers_of_other_queues_are_watched_too(bench: Bench, clock: Clock) -> None:
    task, _, _ = counted(bench)
    living = await bench.worker(lease=LEASE_S, queues=("other",))
    job_id = await bench.enqueue(task, 1)
    await dead_worker_with(bench, [job_id])

    assert await watch(living, clock, LEASE_S + 1) == ["w-dead"]


# --- what a crash counts ---------------------------------------------------------------------------------------------


async def sweep(worker: Worker, name: str, counter: bytes) -> None:
    await worker.sweeper.sweep("default", name, counter)


async def test_two_sweepers_at_the_same_time_count_a_crash_once(bench: Bench) -> None:
    task, _, _ = counted(bench)
    first, second = await bench.worker(), await bench.worker()
    ids = [await bench.enqueue(task, number) for number in range(20)]
    name, counter = await dead_worker_with(bench, ids)

    await asyncio.gather(sweep(first, name, counter), sweep(second, name, counter))

    rows = [await bench.row(job_id) for job_id in ids]
    assert [(row["generation"], row["crashes"]) for row in rows if row] == [(2, 1)] * 20
    assert await bench.ready() == [Entry.of(job_id, 2, 2).raw for job_id in ids]
    assert await bench.redis.exists(bench.broker.keys("default").working(name)) == 0


async def test_a_sweeper_waits_for_the_generations_of_one_that_is_faster(
    bench: Bench, shared_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobq.worker.sweeper._LOCKED_S", 1.0)
    task, _, _ = counted(bench)
    slower = await bench.worker()
    job_id = await bench.enqueue(task, 1)
    name, counter = await dead_worker_with(bench, [job_id])
    read, has_looked = settle.standings, asyncio.Event()

    async def standings(*args: Any) -> Any:
        found = await read(*args)
        has_looked.set()
        return found

    monkeypatch.setattr(settle, "standings", standings)
    async with other_connection(shared_database_url) as faster:
        async with faster.transaction():
            assert await settle.crash(faster, "jobq", [(job_id, 1)]) == {job_id}
            sweeping = asyncio.create_task(sweep(slower, name, counter))
            await has_looked.wait()
        await sweeping

    assert await bench.ready() == [Entry.of(job_id, 2, 2).raw]


async def test_a_sweeper_that_dies_half_way_is_finished_by_the_next_and_nothing_counts_twice(bench: Bench) -> None:
    task, _, _ = counted(bench)
    first, second = await bench.worker(), await bench.worker()
    job_id = await bench.enqueue(task, 1)
    name, counter = await dead_worker_with(bench, [job_id])
    entry = Entry.of(job_id, 1, 2)

    async with first.sweeper._line.open() as connection:
        await first.sweeper._count_crashes(connection, name, [entry])
    between = await bench.working_of(name)
    await sweep(second, name, counter)

    assert between == [entry.raw]
    row = await bench.row(job_id)
    assert row is not None
    assert (row["generation"], row["crashes"]) == (2, 1)
    assert await bench.ready() == [Entry.of(job_id, 2, 2).raw]


async def test_a_worker_that_beats_again_during_the_sweep_keeps_its_list(bench: Bench) -> None:
    """And finds its jobs gone by their generation."""
    task, _, _ = counted(bench)
    living = await bench.worker()
    job_id = await bench.enqueue(task, 1)
    name, counter = await dead_worker_with(bench, [job_id])
    await bench.redis.hset(bench.broker.keys("default").beats, name, b"124")

    await sweep(living, name, counter)

    assert await bench.working_of(name) == [Entry.of(job_id, 1, 2).raw]
    assert await bench.ready() == []


async def test_an_entry_whose_row_could_not_be_counted_goes_back_as_it_is(bench: Bench) -> None:
    task, _, _ = counted(bench)
    living = await bench.worker()
    job_id = await bench.enqueue(task, 1)
    name, counter = await dead_worker_with(bench, [job_id])

    async with bench.db.transaction():
        await bench.db.execute("SELECT FROM jobq.outbox WHERE id = $1 FOR UPDATE", job_id)
        await sweep(living, name, counter)

    assert await bench.ready() == [Entry.of(job_id, 1, 2).raw]


async def test_a_job_that_is_done_is_dropped(bench: Bench) -> None:
    task, _, _ = counted(bench)
    living = await bench.worker()
    job_id = await bench.enqueue(task, 1)
    name, counter = await dead_worker_with(bench, [job_id])
    await bench.db.execute("DELETE FROM jobq.outbox WHERE id = $1", job_id)

    await sweep(living, name, counter)

    await bench.assert_drained()


async def test_a_job_that_was_rescheduled_into_the_future_does_not_run_early(bench: Bench) -> None:
    """Its worker died between the commit of the reschedule and the ack."""
    task, _, _ = counted(bench)
    living = await bench.worker()
    job_id = await bench.enqueue(task, 1)
    name, counter = await dead_worker_with(bench, [job_id])
    await bench.db.execute(
        "UPDATE jobq.outbox SET generation = 2, run_at = now() + interval '1 hour' WHERE id = $1", job_id
    )

    await sweep(living, name, counter)

    row = await bench.row(job_id)
    assert row is not None
    assert (row["generation"], row["crashes"]) == (2, 0)
    assert await bench.ready() == []
    assert await bench.broker.known("default", [job_id]) == [0], "so that its timer can push it"


async def test_garbage_in_the_list_of_a_dead_worker_is_dropped(bench: Bench) -> None:
    living = await bench.worker()
    name, counter = await dead_worker_with(bench, [])
    await bench.redis.rpush(bench.broker.keys("default").working(name), b"\xff", b"a:b:c")

    await sweep(living, name, counter)

    await bench.assert_drained()


async def test_the_priority_of_a_job_survives_the_crash_of_its_worker(bench: Bench) -> None:
    task, _, _ = counted(bench)
    living = await bench.worker()
    job_id = await bench.enqueue(task, 1, priority=4)
    name, counter = await dead_worker_with(bench, [job_id])

    await sweep(living, name, counter)

    assert await bench.redis.lrange(bench.broker.keys("default").ready[3], 0, -1) == [Entry.of(job_id, 2, 4).raw]


async def test_the_relay_pushes_no_second_copy_of_a_swept_job(bench: Bench) -> None:
    task, _, _ = counted(bench)
    leader = await bench.leader()
    living = await bench.worker()
    job_id = await bench.enqueue(task, 1)
    name, counter = await dead_worker_with(bench, [job_id])
    await sweep(living, name, counter)

    for _ in range(5):
        await leader.step()

    assert await bench.ready() == [Entry.of(job_id, 2, 2).raw]


# --- poison ----------------------------------------------------------------------------------------------------------


async def crash(bench: Bench, living: Worker, job_id: UUID) -> None:
    """The worker that runs the job dies, and is swept."""
    keys = bench.broker.keys("default")
    await bench.redis.delete(*keys.ready, keys.bell)
    name, counter = await dead_worker_with(bench, [job_id])
    await sweep(living, name, counter)


async def test_three_crashes_in_a_row_bury_a_job_as_poison(bench: Bench) -> None:
    seen: list[DeadJob] = []

    @bench.app.on_dead
    async def hook(session: Any, job: DeadJob) -> None:
        seen.append(job)
        await session.execute(text("INSERT INTO effect (note) VALUES ('by the hook')"))

    task, _, _ = counted(bench)
    living = await bench.worker()
    job_id = await bench.enqueue(task, 1)

    for _ in range(2):
        await crash(bench, living, job_id)
    after_two = await bench.row(job_id)
    await crash(bench, living, job_id)

    assert after_two is not None
    assert after_two["crashes"] == 2
    dead = await bench.dead(job_id)
    assert dead is not None
    assert (dead["reason"], dead["crashes"], dead["attempts"]) == ("poison", 3, 0)
    assert [job.reason for job in seen] == ["poison"]
    assert await bench.effects() == 1
    await bench.assert_drained()


@pytest.mark.parametrize("ends", ["failure", "snooze"])
async def test_a_run_that_ends_starts_the_count_of_crashes_anew(bench: Bench, ends: str) -> None:
    @bench.app.task
    async def task() -> None:
        raise Retry(delay=0) if ends == "failure" else Snooze(0)

    living = await bench.worker()
    job_id = await bench.enqueue(task)
    for _ in range(2):
        await crash(bench, living, job_id)

    await started(living)
    await started(living)
    await until(lambda: not living.turns.runs, "the run ended")
    await settled(living)

    row = await bench.row(job_id)
    assert row is not None
    assert row["crashes"] == 0


# --- a worker that comes back ----------------------------------------------------------------------------------------


async def test_sessions_of_the_dead_worker_inside_complete_are_ended(bench: Bench) -> None:
    gate = Gate()
    entered: list[int] = []

    @bench.app.task
    async def book(ctx: Context) -> None:
        async with ctx.complete() as session:
            entered.append(1)
            await write_effect(session, ctx)
            if len(entered) == 1:
                await gate.wait()

    paused, living = await bench.worker(), await bench.worker()
    job_id = await bench.commit_and_relay(book)
    await started(paused)
    await gate.arrived.wait()

    await sweep(living, paused.name, (await bench.broker.beats("default"))[paused.name])
    row = await bench.row(job_id)
    await turn(living)
    effects_by_the_living = await bench.effects(job_id)
    gate.open.set()
    await until(lambda: not paused.turns.runs, "the paused worker's run ended")
    await settled(paused)

    assert row is not None
    assert (row["generation"], row["crashes"]) == (2, 1), "its lock was gone"
    assert effects_by_the_living == 1
    assert await bench.effects(job_id) == 1
    assert await bench.row(job_id) is None
    assert len(paused.owned) == 0


async def test_a_worker_that_comes_back_after_its_jobs_were_swept_changes_nothing(bench: Bench) -> None:
    task, runs, gate = counted(bench)
    paused, living = await bench.worker(), await bench.worker()
    job_id = await bench.commit_and_relay(task, 1)
    await started(paused)
    await gate.arrived.wait()

    await sweep(living, paused.name, (await bench.broker.beats("default"))[paused.name])
    await started(living)
    await until(lambda: len(runs) == 2, "it runs again")
    gate.open.set()
    await until(lambda: not paused.turns.runs, "the paused worker's run ended")
    await settled(paused)
    row = await bench.row(job_id)
    paused.heartbeat.step()
    await until(lambda: not living.turns.runs, "the second run ended")
    await settled(living)

    assert row is not None
    assert (row["generation"], row["attempts"]) == (2, 0), "the late end of generation 1 meant nothing"
    assert await bench.row(job_id) is None
    await bench.assert_drained()
