"""The crash table of the README, one test a row: who dies where, and what becomes of the job.

A worker "dies" here by being stepped no further; test_processes.py kills real ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import jobq.migrate
from jobq import Context, embedded
from jobq.broker.scripts import script
from jobq.model import Entry
from jobq.relay.relay import Leader
from jobq.worker.worker import Worker
from tests.builders import Bench, Gate, settled, started, turn, write_effect
from tests.faults.proxy import postgres_proxy, redis_proxy
from tests.waiting import until


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


class Tasks:
    """A plain task and one with effects; both count their runs and pass a gate that is open unless closed."""

    def __init__(self, bench: Bench):
        self.runs = 0
        self.gate = Gate()
        self.gate.open.set()

        @bench.app.task
        async def plain() -> None:
            self.runs += 1
            await self.gate.wait()

        @bench.app.task
        async def book(ctx: Context) -> None:
            self.runs += 1
            async with ctx.complete() as session:
                await write_effect(session, ctx)
                await self.gate.wait()

        self.plain = plain
        self.book = book


async def dies(worker: Worker) -> None:
    """The process is gone: no beat, no settling, and its sessions end."""
    worker.heartbeat.stop()
    for run in list(worker.turns.runs):
        run.cancel()
    await until(lambda: not worker.turns.runs, "nothing of it runs")


async def sweep(by: Worker, dead: Worker) -> None:
    """The lease of the dead worker is over."""
    await by.sweeper.sweep("default", dead.name, (await bench_beats(by))[dead.name])


async def bench_beats(worker: Worker) -> dict[str, bytes]:
    return await worker.broker.beats("default")


async def relay_until_pushed(bench: Bench, leader: Leader, count: int) -> None:
    async def is_pushed() -> bool:
        await leader.step()
        return len(await bench.ready()) == count

    await until(is_pushed, f"{count} entries are ready")


# --- before commit: nothing exists -----------------------------------------------------------------------------------


async def test_before_commit_nothing_exists(bench: Bench) -> None:
    tasks = Tasks(bench)
    leader = await bench.leader()
    async with bench.app.database.sessions() as session:
        await tasks.book.enqueue(session)
        await session.rollback()
    # And a client that is gone before its COMMIT.
    client = await bench.app.database.connect(schema="jobq", name="client")
    await client.execute("BEGIN")
    await tasks.book.enqueue(client)
    client.terminate()

    for _ in range(5):
        await leader.step()

    assert await bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0
    assert await bench.ready() == []


# --- after commit, before push: next poll or walk --------------------------------------------------------------------


async def test_after_commit_before_push_the_next_poll_finds_it(bench: Bench) -> None:
    tasks = Tasks(bench)
    leader, worker = await bench.leader(), await bench.worker()
    for _ in range(3):
        await leader.step()
    job_id = await bench.enqueue(tasks.book)

    await relay_until_pushed(bench, leader, 1)
    await turn(worker)

    assert await bench.effects(job_id) == 1
    await bench.assert_drained()


async def test_after_commit_before_push_the_next_leaders_walk_finds_it(bench: Bench) -> None:
    tasks = Tasks(bench)
    dead = await bench.leader()
    for _ in range(3):
        await dead.step()
    job_id = await bench.enqueue(tasks.book)
    # Its poll has seen the row, and it dies before the push.
    dead._connection.terminate()

    leader, worker = await bench.leader(scrub_every=3600), await bench.worker()
    await relay_until_pushed(bench, leader, 1)
    await turn(worker)

    assert await bench.effects(job_id) == 1
    await bench.assert_drained()


# --- push applied, reply lost: no-op by generation -------------------------------------------------------------------


async def test_push_applied_and_reply_lost_makes_no_second_entry(shared_database_url: str, redis_url: str) -> None:
    async with (
        redis_proxy(redis_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, redis=through) as bench,
    ):
        tasks = Tasks(bench)
        worker = await bench.worker()
        leader = await bench.leader()
        for _ in range(3):
            await leader.step()
        job_id = await bench.enqueue(tasks.book)
        proxy.lose_reply(job_id.hex.encode())

        await relay_until_pushed(bench, leader, 1)
        for _ in range(5):
            await leader.step()

        assert proxy.losses == 1
        assert await bench.ready() == [Entry.of(job_id, 1, 2).raw]
        await turn(worker)
        assert tasks.runs == 1
        await bench.assert_drained()


# --- fetched, reply lost: adopted after two beats or swept -----------------------------------------------------------


@pytest.mark.parametrize("how", ["adopted", "swept"])
async def test_fetched_and_reply_lost_is_adopted_or_swept(shared_database_url: str, redis_url: str, how: str) -> None:
    async with (
        redis_proxy(redis_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, redis=through) as bench,
    ):
        tasks = Tasks(bench)
        worker = await bench.worker()
        job_id = await bench.commit_and_relay(tasks.book)
        await bench.redis.script_load(script("fetch").source)  # or it is sent twice, and the first reply is no answer
        proxy.lose_reply(script("fetch").sha.encode())
        with pytest.raises(Exception, match=r"(?i)connection|closed|reset"):
            await worker.turns.step()
        assert await bench.ready() == []

        if how == "adopted":
            for _ in range(2):
                await asyncio.to_thread(worker.heartbeat.step)
            await until(lambda: worker.turns._adopted, "it was adopted")
            await turn(worker)
        else:
            await dies(worker)
            living = await bench.worker()
            await sweep(living, worker)
            await turn(living)

        assert tasks.runs == 1
        assert await bench.effects(job_id) == 1
        await bench.assert_drained()


# --- died while running, or paused past the lease: runs again, complete() effects once -------------------------------


@pytest.mark.parametrize("task", ["plain", "book"])
async def test_died_while_running_runs_again(bench: Bench, task: str) -> None:
    tasks = Tasks(bench)
    worker, living = await bench.worker(), await bench.worker()
    tasks.gate.open.clear()
    job_id = await bench.commit_and_relay(getattr(tasks, task))
    await started(worker)
    await tasks.gate.arrived.wait()

    await dies(worker)
    tasks.gate.open.set()
    await sweep(living, worker)
    crashes = (await bench.row(job_id))["crashes"]  # type: ignore[index]
    await turn(living)

    assert crashes == 1
    assert tasks.runs == 2
    assert await bench.effects(job_id) == (1 if task == "book" else 0)
    await bench.assert_drained()


async def test_paused_past_the_lease_before_complete_has_no_second_effect(bench: Bench) -> None:
    runs = 0
    gate = Gate()

    @bench.app.task
    async def book(ctx: Context) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            await gate.wait()
        async with ctx.complete() as session:
            await write_effect(session, ctx)

    paused, living = await bench.worker(), await bench.worker()
    job_id = await bench.commit_and_relay(book)
    await started(paused)
    await gate.arrived.wait()

    await sweep(living, paused)
    await turn(living)
    gate.open.set()
    await until(lambda: not paused.turns.runs, "the paused run went on to its end")
    await settled(paused)
    for _ in range(3):
        await asyncio.to_thread(paused.heartbeat.step)

    assert runs == 2
    assert await bench.effects(job_id) == 1
    assert len(paused.owned) == 0
    await bench.assert_drained()


# --- after commit, before ack: dropped at the pre-read ---------------------------------------------------------------


@pytest.mark.parametrize("task", ["plain", "book"])
async def test_after_commit_before_ack_the_entry_is_dropped_at_the_pre_read(bench: Bench, task: str) -> None:
    tasks = Tasks(bench)
    worker, living = await bench.worker(), await bench.worker()
    job_id = await bench.commit_and_relay(getattr(tasks, task))
    await started(worker)
    await until(lambda: not worker.turns.runs, "the run ended")
    await worker.settler._flush_rows()
    assert await bench.row(job_id) is None

    await dies(worker)
    # The sweeper would drop it too: here it dies as well, after putting the list back.
    (entry,) = await bench.working(worker)
    await bench.broker.release("default", worker.name, [entry])
    await turn(living)

    assert tasks.runs == 1
    assert (await bench.stats())["ghost"] == 1
    await sweep(living, worker)
    await bench.assert_drained()


async def test_commit_reply_lost_is_resolved_by_the_row(shared_database_url: str, redis_url: str) -> None:
    async with (
        postgres_proxy(shared_database_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, database=through) as bench,
    ):
        tasks = Tasks(bench)
        worker = await bench.worker()
        tasks.gate.open.clear()
        job_id = await bench.commit_and_relay(tasks.book)
        await started(worker)
        await tasks.gate.arrived.wait()
        proxy.lose_reply(b"COMMIT")

        tasks.gate.open.set()
        await until(lambda: not worker.turns.runs, "the run ended")
        await settled(worker)

        assert proxy.losses == 1
        assert await bench.effects(job_id) == 1
        assert await bench.row(job_id) is None
        await bench.assert_drained()


async def test_commit_that_never_arrived_runs_again(shared_database_url: str, redis_url: str) -> None:
    async with (
        postgres_proxy(shared_database_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, database=through) as bench,
    ):
        tasks = Tasks(bench)
        worker = await bench.worker()
        tasks.gate.open.clear()
        job_id = await bench.commit_and_relay(tasks.book)
        await started(worker)
        await tasks.gate.arrived.wait()
        proxy.lose_request(b"COMMIT")

        tasks.gate.open.set()
        await until(lambda: not worker.turns.runs, "the run ended")
        await settled(worker)
        row = await bench.row(job_id)
        assert row is not None
        assert (row["generation"], row["attempts"]) == (2, 1)
        await bench.db.execute("UPDATE jobq.outbox SET run_at = NULL")
        await bench.relay()
        await turn(worker)

        assert proxy.losses == 1
        assert await bench.effects(job_id) == 1
        await bench.assert_drained()


# --- plain job done, batch not flushed: runs again -------------------------------------------------------------------


async def test_plain_jobs_done_and_not_flushed_run_again(bench: Bench) -> None:
    tasks = Tasks(bench)
    worker, living = await bench.worker(), await bench.worker()
    for _ in range(5):
        await bench.enqueue(tasks.plain)
    await bench.relay()
    await started(worker)
    await until(lambda: not worker.turns.runs, "the runs ended")
    assert tasks.runs == 5

    await dies(worker)
    await sweep(living, worker)
    await turn(living)

    assert tasks.runs == 10
    await bench.assert_drained()


# --- sweeper died half way: finished by the next, counted once -------------------------------------------------------


async def test_sweeper_died_half_way_is_finished_by_the_next_and_counted_once(bench: Bench) -> None:
    tasks = Tasks(bench)
    worker, sweeper, living = await bench.worker(), await bench.worker(), await bench.worker()
    tasks.gate.open.clear()
    job_id = await bench.commit_and_relay(tasks.book)
    await started(worker)
    await tasks.gate.arrived.wait()
    await dies(worker)

    async with sweeper.sweeper._line.open() as connection:
        await sweeper.sweeper._count_crashes(connection, worker.name, [Entry.of(job_id, 1, 2)])
    await dies(sweeper)
    await sweep(living, worker)
    row = await bench.row(job_id)
    tasks.gate.open.set()
    await turn(living)

    assert row is not None
    assert (row["generation"], row["crashes"]) == (2, 1)
    assert await bench.effects(job_id) == 1
    await sweep(living, sweeper)
    await bench.assert_drained()


# --- FLUSHALL, failover to a lagging replica, restart without AOF: rebuilt, completed jobs never start again ---------


async def copy_of(bench: Bench) -> dict[bytes, bytes]:
    return {key: await bench.redis.dump(key) for key in await bench.redis.keys("*")}


async def go_back_to(bench: Bench, copy: dict[bytes, bytes]) -> None:
    await bench.redis.flushall()
    for key, value in copy.items():
        await bench.redis.restore(key, 0, value)


@pytest.mark.parametrize("loss", ["FLUSHALL", "lagging replica with all ready", "lagging replica with all fetched"])
async def test_redis_that_lost_its_data_is_rebuilt_and_completed_jobs_never_start_again(
    bench: Bench, loss: str
) -> None:
    seen: list[UUID] = []

    @bench.app.task
    async def book(ctx: Context) -> None:
        seen.append(ctx.id)
        async with ctx.complete() as session:
            await write_effect(session, ctx)

    leader, worker = await bench.leader(), await bench.worker(concurrency=3)
    ids = [await bench.enqueue(book) for _ in range(6)]
    await relay_until_pushed(bench, leader, 6)
    copy = await copy_of(bench) if loss == "lagging replica with all ready" else {}
    await started(worker)
    copy = await copy_of(bench) if loss == "lagging replica with all fetched" else copy
    await until(lambda: not worker.turns.runs, "three jobs ran")
    await settled(worker)

    await go_back_to(bench, copy)

    async def is_drained() -> bool:
        await leader.step()
        await asyncio.to_thread(worker.heartbeat.step)
        if await bench.ready() or worker.turns._adopted:
            await turn(worker)
        return await bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0 and not await bench.working(worker)

    await until(is_drained, "everything is done", 20)

    assert sorted(seen) == sorted(ids), "each started once"
    assert await bench.effects() == 6
    while await bench.ready():
        await turn(worker)
    assert sorted(seen) == sorted(ids)


@pytest.fixture
async def own_bench() -> AsyncIterator[tuple[embedded.Servers, Bench]]:
    """A bench on servers that the test may kill."""
    with embedded.start(postgres_config={"wal_writer_delay": "10s", "synchronous_commit": "off"}) as servers:
        await jobq.migrate.upgrade(_engine(servers), schema="jobq")
        async with Bench.open(servers.database_url, servers.redis_url) as bench:
            yield servers, bench


def _engine(servers: embedded.Servers) -> Any:
    url = servers.database_url.replace("postgresql://", "postgresql+asyncpg://")
    return create_async_engine(url, poolclass=NullPool)


async def test_redis_restarted_without_aof_is_rebuilt(own_bench: tuple[embedded.Servers, Bench]) -> None:
    servers, bench = own_bench
    tasks = Tasks(bench)
    leader, worker = await bench.leader(), await bench.worker()
    for _ in range(4):
        await bench.enqueue(tasks.book)
    await relay_until_pushed(bench, leader, 4)

    servers.valkey.kill()
    servers.valkey.start()

    async def is_drained() -> bool:
        await leader.step()
        try:
            await asyncio.to_thread(worker.heartbeat.step)
            if await bench.ready():
                await turn(worker)
        except Exception:
            return False  # connections of before
        return await bench.effects() == 4

    await until(is_drained, "all jobs ran", 20)
    assert tasks.runs == 4


# --- PostgreSQL failover that lost the commit: effects and completion are lost together ------------------------------


async def test_postgresql_that_lost_the_commit_lost_effects_and_completion_together(
    own_bench: tuple[embedded.Servers, Bench],
) -> None:
    servers, bench = own_bench
    tasks = Tasks(bench)
    worker = await bench.worker()
    job_id = await bench.enqueue(tasks.book)
    await bench.db.execute("SET synchronous_commit = on")
    await bench.db.execute("CREATE TABLE flushed ()")  # what came before is on disk
    await bench.relay()
    await turn(worker)
    assert await bench.effects(job_id) == 1

    servers.postgres.kill()
    servers.postgres.start()
    bench.db = await _reconnected(bench, servers)

    assert await bench.effects(job_id) == 0
    row = await bench.row(job_id)
    assert row is not None
    assert row["generation"] == 1
    assert await bench.broker.known("default", [job_id]) == [0], "the relay's walk finds it missing"
    await bench.relay()
    await until(lambda: _takes_a_turn(worker), "the worker reached PostgreSQL again")
    assert tasks.runs == 2
    assert await bench.effects(job_id) == 1
    await bench.assert_drained()


async def _reconnected(bench: Bench, servers: embedded.Servers) -> asyncpg.Connection:
    connection = await asyncpg.connect(servers.database_url)
    bench.closes(connection.close)
    return connection


async def _takes_a_turn(worker: Worker) -> bool:
    await turn(worker)
    return True
