"""A worker's life: it serves until told to stop, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.engine import make_url

from jobq import Context, JobQ, SchemaMismatch
from jobq.settings import WorkerSettings
from jobq.worker import shutdown
from jobq.worker.shutdown import EXIT_LEFT_BEHIND
from jobq.worker.worker import Worker
from tests.builders import Bench, Gate, running, write_effect
from tests.faults.proxy import postgres_proxy, redis_proxy
from tests.waiting import until


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


def a_worker(bench: Bench, **settings: Any) -> Worker:
    return Worker(bench.app, WorkerSettings(**{"beat": 0.1, "lease": 30.0, "concurrency": 10, **settings}))


def gated(bench: Bench, *, name: str = "gated") -> tuple[Any, Gate]:
    gate = Gate()

    @bench.app.task(name=name)
    async def task() -> None:
        await gate.wait()

    return task, gate


async def stop(worker: Worker, run: asyncio.Task[int], *, hurry: bool = False) -> int:
    worker.orders.stopping.set()
    if hurry:
        worker.orders.hurry.set()
    worker.orders.wake()
    return await asyncio.wait_for(run, 20)


async def is_ready(bench: Bench, worker: Worker, *queues: str) -> None:
    for queue in queues or ("default",):

        async def has_beaten(queue: str = queue) -> bool:
            return worker.name in await bench.broker.beats(queue)

        await until(has_beaten, "the worker has registered")


# --- serving ---------------------------------------------------------------------------------------------------------


async def test_a_worker_serves_and_leaves_no_key_behind(bench: Bench) -> None:
    runs: list[int] = []

    @bench.app.task
    async def note(number: int) -> None:
        runs.append(number)

    worker = a_worker(bench)
    async with running(worker) as run:
        for number in range(20):
            await bench.commit_and_relay(note, number)
        await until(lambda: len(runs) == 20, "all jobs ran")
        code = await stop(worker, run)

    assert code == 0
    assert sorted(runs) == list(range(20))
    assert await bench.keys_left() == set()
    assert "sweeps" not in await bench.stats(), "it repaired nothing"
    assert await bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0


async def test_a_worker_of_several_queues_leaves_no_key_behind_in_any(bench: Bench) -> None:
    worker = a_worker(bench, queues=("a", "b", "c"))
    async with running(worker) as run:
        await is_ready(bench, worker, "a", "b", "c")
        assert await stop(worker, run) == 0

    assert await bench.keys_left() == set()


async def test_nothing_of_a_worker_outlives_it(bench: Bench) -> None:
    @bench.app.task
    def in_a_thread() -> None: ...

    @bench.app.task
    async def book(ctx: Context) -> None:
        async with ctx.complete() as session:
            await write_effect(session, ctx)

    await bench.broker.fetch("default", "nobody", 0)  # what scripts are sent on is open then
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    clients = len(await bench.redis.client_list())
    worker = a_worker(bench)
    async with running(worker) as run:
        await bench.enqueue(in_a_thread)
        await bench.commit_and_relay(book)
        await until(lambda: bench.effects(), "the second job ran")
        assert await stop(worker, run) == 0
    await bench.app.database.engine.dispose()

    await until(lambda: asyncio.all_tasks() == tasks, "no task is left")
    await until(lambda: set(threading.enumerate()) == threads, "no thread is left")

    async def connections() -> list[str]:
        rows = await bench.db.fetch(
            "SELECT application_name FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return [row[0] for row in rows]

    async def are_connections_gone() -> bool:
        return not await connections() and len(await bench.redis.client_list()) == clients

    await until(are_connections_gone, "no connection is left")


async def test_a_worker_calls_back_what_was_parked_for_its_tasks(bench: Bench) -> None:
    runs: list[int] = []

    @bench.app.task
    async def note() -> None:
        runs.append(1)

    older_release = await bench.second_app()
    older = Worker(older_release, WorkerSettings(beat=0.1))
    async with running(older):
        await bench.commit_and_relay(note)

        async def is_parked() -> bool:
            return bool(await bench.redis.llen(bench.broker.keys("default").parked("note")))

        await until(is_parked, "the worker that does not know the task set the job aside")
    async with running(a_worker(bench)):
        await until(lambda: runs == [1], "the worker that knows it called it back")
    await bench.assert_drained()


async def test_a_worker_survives_whatever_its_tasks_raise(bench: Bench) -> None:
    runs: list[int] = []

    @bench.app.task
    async def leave(how: int) -> None:
        raise (SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit)[how]

    @bench.app.task
    async def note() -> None:
        runs.append(1)

    worker = a_worker(bench)
    async with running(worker) as run:
        ids = [await bench.enqueue(leave, how) for how in range(4)]
        await bench.relay()

        async def have_failed() -> bool:
            rows = [await bench.row(job_id) for job_id in ids]
            return [row["attempts"] for row in rows if row] == [1] * 4

        await until(have_failed, "all four failed and were kept")
        await bench.commit_and_relay(note)
        await until(lambda: runs == [1], "the worker goes on")
        assert await stop(worker, run) == 0


async def test_a_worker_lives_through_an_outage_of_both_stores(shared_database_url: str, redis_url: str) -> None:
    async with (
        postgres_proxy(shared_database_url) as (postgres, through_postgres),
        redis_proxy(redis_url) as (redis, through_redis),
        Bench.open(shared_database_url, redis_url, database=through_postgres, redis=through_redis) as bench,
    ):
        runs: list[int] = []

        @bench.app.task
        async def note(number: int) -> None:
            runs.append(number)

        worker = a_worker(bench)
        async with running(worker) as run:
            await is_ready(bench, worker)
            for proxy in (postgres, redis):
                proxy.is_refusing = True
                proxy.cut()
            await until(lambda: worker.turns.redis_outage._since, "the outage was noticed")
            for proxy in (postgres, redis):
                proxy.is_refusing = False
            ids = [await bench.enqueue(note, number) for number in range(5)]
            await bench.relay()
            await until(lambda: len(runs) == 5, "the jobs ran")
            assert await stop(worker, run) == 0
        assert sorted(runs) == list(range(len(ids)))
        assert await bench.keys_left() == set()


async def test_a_database_without_the_tables_is_refused_at_the_start(
    servers: Any, shared_database_url: str, redis_url: str
) -> None:
    empty = make_url(shared_database_url).set(database="postgres").render_as_string(hide_password=False)
    app = JobQ(database=empty, redis=redis_url)

    with pytest.raises(SchemaMismatch):
        await Worker(app).run()

    await app.database.close()
    assert not any(thread.name == "jobq heartbeat" for thread in threading.enumerate())


async def test_an_idle_worker_blocks_on_the_bell_and_never_on_a_queue(bench: Bench) -> None:
    worker = a_worker(bench)
    async with running(worker) as run:
        blocked = await until(lambda: blocked_clients(bench), "the worker waits in Redis")
        # What blocks on a list is served as soon as something is there, and lost if its wait is cancelled just then.
        taken = await bench.redis.rpush(bench.broker.keys("default").ready[1], "an entry without a ring")
        left = await bench.redis.llen(bench.broker.keys("default").ready[1])
        assert await stop(worker, run) == 0

    assert [client["cmd"] for client in blocked] == ["blpop"]
    assert (taken, left) == (1, 1)


async def blocked_clients(bench: Bench) -> list[dict[str, str]]:
    return [client for client in await bench.redis.client_list() if "b" in client["flags"]]


# --- stopping --------------------------------------------------------------------------------------------------------


async def test_an_idle_worker_stops_without_waiting_for_the_bell(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobq.worker.fetching._BELL_S", 3600.0)
    worker = a_worker(bench)
    async with running(worker) as run:
        await until(lambda: is_blocked(bench), "it waits for the bell")
        assert await stop(worker, run) == 0


async def is_blocked(bench: Bench) -> bool:
    return any("b" in client["flags"] for client in await bench.redis.client_list())


async def test_running_jobs_have_their_grace_and_are_told(bench: Bench) -> None:
    seen: list[bool] = []
    gate = Gate()

    @bench.app.task
    async def task(ctx: Context) -> None:
        seen.append(ctx.stopping)
        await gate.wait()
        seen.append(ctx.stopping)

    worker = a_worker(bench)
    async with running(worker) as run:
        await bench.commit_and_relay(task)
        await gate.arrived.wait()
        await bench.commit_and_relay(task)
        await until(lambda: len(seen) == 2, "the second one runs too")
        worker.orders.stopping.set()
        worker.orders.wake()
        await bench.commit_and_relay(task)
        await asyncio.sleep(0)
        assert not run.done()
        gate.open.set()
        assert await asyncio.wait_for(run, 10) == 0

    assert seen == [False, False, True, True]
    assert len(await bench.ready()) == 1, "it fetched nothing more"


async def test_interrupted_jobs_use_no_attempt_and_are_due_at_once(bench: Bench) -> None:
    task, gate = gated(bench)
    worker = a_worker(bench, grace=0)
    async with running(worker) as run:
        job_id = await bench.enqueue(task)
        await bench.db.execute("UPDATE jobq.outbox SET crashes = 1, attempts = 3 WHERE id = $1", job_id)
        await bench.relay()
        await gate.arrived.wait()
        assert await stop(worker, run) == 0

    row = await bench.row(job_id)
    assert row is not None
    assert (row["generation"], row["attempts"], row["crashes"], row["run_at"]) == (2, 3, 0, None)
    assert await bench.keys_left() == set()


async def test_a_job_interrupted_inside_complete_leaves_no_effect(bench: Bench) -> None:
    gate = Gate()

    @bench.app.task
    async def book(ctx: Context) -> None:
        async with ctx.complete() as session:
            await write_effect(session, ctx)
            await gate.wait()

    worker = a_worker(bench, grace=0)
    async with running(worker) as run:
        job_id = await bench.commit_and_relay(book)
        await gate.arrived.wait()
        assert await stop(worker, run) == 0

    row = await bench.row(job_id)
    assert row is not None
    assert (row["generation"], row["attempts"]) == (2, 0)
    assert await bench.effects() == 0


async def test_what_has_not_started_goes_back_to_the_front_in_order(bench: Bench) -> None:
    task, gate = gated(bench)
    other, _ = gated(bench, name="other")
    worker = a_worker(bench)
    async with running(worker) as run:
        await bench.commit_and_relay(task)
        await gate.arrived.wait()
        suspects = [await bench.enqueue(other) for _ in range(3)]
        await bench.db.execute("UPDATE jobq.outbox SET crashes = 2 WHERE id = ANY($1)", suspects)
        await bench.relay()

        async def is_one_kept() -> bool:
            return worker.turns._suspect is not None and len(await bench.ready()) == 2

        await until(is_one_kept, "one job waits to run alone, and the others went back")
        last = await bench.commit_and_relay(other)
        worker.orders.stopping.set()
        worker.orders.wake()

        async def are_back() -> bool:
            return len(await bench.ready()) == 4

        await until(are_back, "they went back while the other job still runs")
        assert not run.done()
        gate.open.set()
        assert await asyncio.wait_for(run, 10) == 0

    assert [raw[:32].decode() for raw in await bench.ready()] == [job_id.hex for job_id in (*suspects, last)]
    assert [(await bench.row(job_id))["generation"] for job_id in suspects] == [1, 1, 1]  # type: ignore[index]


async def test_a_second_signal_waits_for_nobody(bench: Bench) -> None:
    task, gate = gated(bench)
    worker = a_worker(bench, grace=3600)
    async with running(worker) as run:
        job_id = await bench.commit_and_relay(task)
        await gate.arrived.wait()
        worker.orders.stopping.set()
        worker.orders.wake()
        await until(lambda: not worker.heartbeat._stopping.is_set() and worker.orders.stopping.is_set(), "it drains")
        assert await stop(worker, run, hurry=True) == 0

    assert (await bench.row(job_id))["generation"] == 2  # type: ignore[index]
    assert await bench.keys_left() == set()


async def assert_due_after_the_lease(bench: Bench, worker: Worker, job_id: UUID) -> None:
    """It was interrupted by the stop: no attempt and no crash; and no other worker runs it before the lease is over."""
    row = await bench.row(job_id)
    assert row is not None
    assert (row["generation"], row["attempts"], row["crashes"]) == (2, 0, 0)
    assert timedelta(0) < row["due_in"] <= timedelta(seconds=worker.settings.lease)
    assert await bench.working(worker) == []
    assert worker.name not in await bench.broker.beats("default"), "nobody sweeps it, and counts a crash"


async def test_a_task_that_swallows_its_cancellation_runs_again_after_the_lease_and_the_exit_code_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown, "_CANCEL_WAIT_S", 0.2)
    gate = Gate()

    @bench.app.task
    async def stubborn() -> None:
        while not gate.open.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue

    bench.closes(gate.opened)  # whatever fails: a task that nobody can cancel would keep the test for ever
    worker = a_worker(bench, grace=0)
    async with running(worker) as run:
        job_id = await bench.commit_and_relay(stubborn)
        await gate.arrived.wait()
        assert await stop(worker, run) == EXIT_LEFT_BEHIND

    await assert_due_after_the_lease(bench, worker, job_id)
    await gate.opened()
    await until(lambda: not worker.turns.runs, "the task ended")


async def test_a_task_that_swallows_its_cancellation_inside_complete_keeps_its_entry(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown, "_CANCEL_WAIT_S", 0.2)
    gate = Gate()

    @bench.app.task
    async def stubborn(ctx: Context) -> None:
        async with ctx.complete() as session:
            while not gate.open.is_set():
                try:
                    await gate.wait()
                except asyncio.CancelledError:
                    continue
            await write_effect(session, ctx)

    bench.closes(gate.opened)
    worker = a_worker(bench, grace=0)
    async with running(worker) as run:
        job_id = await bench.commit_and_relay(stubborn)
        await gate.arrived.wait()
        assert await stop(worker, run) == EXIT_LEFT_BEHIND

    assert [raw[:32] for raw in await bench.working(worker)] == [job_id.hex.encode()]
    assert worker.name in await bench.broker.beats("default"), "a sweeper finds it"
    assert (await bench.row(job_id))["generation"] == 1  # type: ignore[index]
    await gate.opened()
    await until(lambda: not worker.turns.runs, "the task ended")
    assert await bench.effects(job_id) == 1, "its COMMIT came after all"


async def test_without_postgresql_what_cannot_be_interrupted_keeps_its_entry(
    shared_database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown, "_CANCEL_WAIT_S", 0.2)
    monkeypatch.setattr(shutdown, "_POSTPONE_WAIT_S", 0.3)
    release, arrived = threading.Event(), threading.Event()
    async with (
        postgres_proxy(shared_database_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, database=through) as bench,
    ):

        @bench.app.task
        def stubborn() -> None:
            arrived.set()
            release.wait(20)

        worker = a_worker(bench, grace=0)
        async with running(worker) as run:
            job_id = await bench.commit_and_relay(stubborn)
            await until(arrived.is_set, "the thread runs")
            proxy.is_refusing = True
            proxy.cut()
            assert await stop(worker, run) == EXIT_LEFT_BEHIND
        proxy.is_refusing = False

        assert [raw[:32] for raw in await bench.working(worker)] == [job_id.hex.encode()]
        assert worker.name in await bench.broker.beats("default"), "a sweeper finds it"
        release.set()
        await until(lambda: not worker.turns.runs, "the task ended")


@pytest.mark.parametrize("hurry", [False, True], ids=["grace is over", "second signal"])
async def test_a_thread_that_does_not_end_is_named_and_its_job_runs_again_after_the_lease(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hurry: bool
) -> None:
    monkeypatch.setattr(shutdown, "_CANCEL_WAIT_S", 0.2)
    caplog.set_level(logging.INFO)
    release, arrived = threading.Event(), threading.Event()

    @bench.app.task
    def stubborn() -> None:
        arrived.set()
        release.wait(10)

    worker = a_worker(bench, grace=3600 if hurry else 0)
    async with running(worker) as run:
        job_id = await bench.commit_and_relay(stubborn)
        await until(arrived.is_set, "the thread runs")
        assert await stop(worker, run, hurry=hurry) == EXIT_LEFT_BEHIND

    await assert_due_after_the_lease(bench, worker, job_id)
    told = [(r.levelname, r.message, r.fields) for r in caplog.records if "interrupted" in r.message]  # type: ignore[attr-defined]
    fields = {"count": 1, "jobs": [f"stubborn {job_id}"]}
    assert told == [
        ("INFO", "waiting for synchronous jobs that cannot be interrupted", fields),
        ("WARNING", "synchronous jobs outlast the grace, and cannot be interrupted", fields),
    ]
    release.set()
    await until(lambda: not worker.turns.runs, "the task ended")


async def test_jobs_that_wait_for_a_thread_go_back_unrun_as_soon_as_the_worker_stops(bench: Bench) -> None:
    release = threading.Event()
    runs: list[int] = []

    @bench.app.task
    def hold(number: int) -> None:
        runs.append(number)
        release.wait(10)

    worker = a_worker(bench, grace=3600, threads=1)
    async with running(worker) as run:
        await is_ready(bench, worker)
        job_ids = [await bench.enqueue(hold, number) for number in range(3)]
        await bench.relay()
        await until(lambda: len(worker.executor.waiting) == 2, "two wait for a thread")
        worker.orders.stopping.set()
        worker.orders.wake()

        async def are_back() -> bool:
            return len(await bench.ready()) == 2

        await until(are_back, "they went back while the thread still runs")
        assert not run.done()
        release.set()
        assert await asyncio.wait_for(run, 10) == 0

    assert runs == [0]
    assert [raw[:32].decode() for raw in await bench.ready()] == [job_id.hex for job_id in job_ids[1:]]
    rows = [await bench.row(job_id) for job_id in job_ids[1:]]
    assert [(row["generation"], row["attempts"]) for row in rows] == [(1, 0)] * 2  # type: ignore[index]


async def test_completions_are_flushed_before_the_end(bench: Bench) -> None:
    runs: list[None] = []

    @bench.app.task
    async def note() -> None:
        runs.append(None)

    worker = a_worker(bench)
    async with running(worker) as run:
        for _ in range(50):
            await bench.enqueue(note)
        await bench.relay()
        await until(lambda: len(runs) == 50, "all have run")
        assert await stop(worker, run) == 0

    assert await bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0
    assert await bench.keys_left() == set()


async def test_without_postgresql_unwritten_runs_are_released(
    shared_database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown, "_FLUSH_WAIT_S", 0.3)
    async with (
        postgres_proxy(shared_database_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, database=through) as bench,
    ):
        task, gate = gated(bench)
        worker = a_worker(bench, grace=0)
        async with running(worker) as run:
            job_id = await bench.commit_and_relay(task)
            await gate.arrived.wait()
            proxy.is_refusing = True
            proxy.cut()
            assert await stop(worker, run) == 0

        row = await bench.row(job_id)
        assert row is not None
        assert (row["generation"], row["attempts"]) == (1, 0)
        assert [raw[:32] for raw in await bench.ready()] == [job_id.hex.encode()]
        assert not {name for name in await bench.keys_left() if "working" in name or "beats" in name}


async def test_without_redis_rows_are_settled_and_the_list_is_left_to_a_sweeper(
    shared_database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown, "_FLUSH_WAIT_S", 0.3)
    async with (
        redis_proxy(redis_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, redis=through) as bench,
    ):
        task, gate = gated(bench)
        worker = a_worker(bench)
        async with running(worker) as run:
            job_id = await bench.commit_and_relay(task)
            await gate.arrived.wait()
            proxy.is_refusing = True
            proxy.cut()
            gate.open.set()
            assert await stop(worker, run) == EXIT_LEFT_BEHIND

        assert await bench.row(job_id) is None
        assert len(await bench.working(worker)) == 1
        assert not any(thread.name == "jobq heartbeat" for thread in threading.enumerate())


async def test_a_read_that_waits_for_postgresql_lets_go_when_the_worker_stops(
    shared_database_url: str, redis_url: str
) -> None:
    async with (
        postgres_proxy(shared_database_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, database=through) as bench,
    ):
        task, _ = gated(bench)
        worker = a_worker(bench)
        async with running(worker) as run:
            await is_ready(bench, worker)
            job_id = await bench.enqueue(task)
            proxy.is_refusing = True
            proxy.cut()
            await bench.relay()
            await until(lambda: len(worker.owned), "it was fetched")
            assert await stop(worker, run) == 0

        assert [raw[:32] for raw in await bench.ready()] == [job_id.hex.encode()]
        assert (await bench.row(job_id))["generation"] == 1  # type: ignore[index]


async def test_the_heartbeat_is_the_last_to_stop(bench: Bench) -> None:
    """Until the last run is settled somebody must vouch for it."""
    task, gate = gated(bench)
    worker = a_worker(bench)
    async with running(worker) as run:
        await bench.commit_and_relay(task)
        await gate.arrived.wait()
        worker.orders.stopping.set()
        worker.orders.wake()
        before = worker.heartbeat.acked_at
        await until(lambda: worker.heartbeat.acked_at > before, "it beats while the worker drains")
        assert not run.done()
        gate.open.set()
        assert await asyncio.wait_for(run, 10) == 0


def test_two_workers_on_one_host_with_one_pid_have_different_names() -> None:
    app = JobQ()

    assert Worker(app).name != Worker(app).name, "containers share host names and pids"
