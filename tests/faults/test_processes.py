"""Real worker processes, really killed, stopped and told to end."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import UUID

import pytest

from tests.builders import Bench
from tests.commands import Process
from tests.commands import started as command
from tests.faults import app as faults
from tests.waiting import until

ROOT = Path(__file__).parents[2]
LEASE_S = 1.0


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        await bench.db.execute(faults.TABLES)
        yield bench


class Workers:
    """Starts `jobq worker` processes on a bench."""

    def __init__(self, stack: ExitStack, folder: Path, database_url: str, redis_url: str):
        self._stack = stack
        self._folder = folder
        self._environment = {"PYTHONPATH": str(ROOT), "JOBQ_DATABASE_URL": database_url, "JOBQ_REDIS_URL": redis_url}

    async def start(self, *options: str, lease: float = LEASE_S) -> Process:
        timing = ["--lease", str(lease), "--beat", "0.1"]
        arguments = ["worker", "tests.faults.app:jobs", *timing, *options]
        process = self._stack.enter_context(command(*arguments, folder=self._folder, **self._environment))
        await process.says("worker ready")
        return process


@pytest.fixture
def workers(tmp_path: Path, shared_database_url: str, redis_url: str) -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(stack, tmp_path, shared_database_url, redis_url)


async def runs(bench: Bench, job_id: UUID) -> int:
    return int(await bench.db.fetchval("SELECT count(*) FROM run WHERE job_id = $1", job_id))


async def has_run(bench: Bench, job_id: UUID, times: int = 1) -> None:
    async def has() -> bool:
        return await runs(bench, job_id) >= times

    await until(has, f"the job has started {times} times", 20)


async def open_gate(bench: Bench, name: str = "gate") -> None:
    await bench.db.execute("INSERT INTO gate VALUES ($1)", name)


async def drained(bench: Bench) -> None:
    async def is_drained() -> bool:
        return await bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0

    await until(is_drained, "all jobs are done", 20)


async def sweep_the_dead(bench: Bench, living: object) -> None:
    """The lease of every worker but one is over."""
    for name, counter in (await bench.broker.beats("default")).items():
        if name != living.name:  # type: ignore[attr-defined]
            await living.sweeper.sweep("default", name, counter)  # type: ignore[attr-defined]


# --- SIGKILL ---------------------------------------------------------------------------------------------------------


async def test_a_worker_killed_between_its_effect_and_commit_leaves_no_effect_and_another_makes_it_once(
    bench: Bench, workers: Workers
) -> None:
    dead = await workers.start()
    job_id = await bench.commit_and_relay(faults.book, "gate")
    await has_run(bench, job_id)
    living = await workers.start()

    dead.signal(signal.SIGKILL)
    await has_run(bench, job_id, 2)
    row = await bench.row(job_id)
    effects_before = await bench.effects(job_id)
    await open_gate(bench)
    await drained(bench)

    assert row is not None
    assert (row["generation"], row["crashes"], row["attempts"]) == (2, 1, 0)
    assert effects_before == 0
    assert await bench.effects(job_id) == 1
    assert await runs(bench, job_id) == 2
    assert "swept a dead worker" in living.said
    living.signal(signal.SIGTERM)
    assert await living.ends() == 0
    assert await bench.keys_left() == set()


async def test_a_job_that_kills_its_process_before_its_commit_is_poison_after_three(
    bench: Bench, workers: Workers
) -> None:
    sweeper = await bench.worker(queues=("none",))
    job_id = await bench.commit_and_relay(faults.die_before_commit)

    for crash in range(1, 4):
        process = await workers.start(lease=60)
        assert await process.ends() == -signal.SIGKILL
        assert await runs(bench, job_id) == crash
        await sweep_the_dead(bench, sweeper)

    dead = await bench.dead(job_id)
    assert dead is not None
    assert (dead["reason"], dead["crashes"]) == ("poison", 3)
    assert await bench.effects() == 0
    assert await bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0


async def test_a_job_that_kills_its_process_does_not_take_the_innocent_with_it(bench: Bench, workers: Workers) -> None:
    sweeper = await bench.worker(queues=("none",))
    innocents = [await bench.enqueue(faults.book, "open later") for _ in range(5)]
    killer = await bench.enqueue(faults.die, "let it kill")
    await bench.relay()

    for crash in (1, 2):
        process = await workers.start(lease=60)
        for job_id in (*innocents, killer):
            await has_run(bench, job_id, crash)
        await open_gate(bench, "let it kill")
        assert await process.ends() == -signal.SIGKILL
        await bench.db.execute("DELETE FROM gate")
        await sweep_the_dead(bench, sweeper)
    await open_gate(bench, "let it kill")
    await open_gate(bench, "open later")
    process = await workers.start(lease=60)
    assert await process.ends() == -signal.SIGKILL
    await sweep_the_dead(bench, sweeper)
    await workers.start(lease=60)
    await drained(bench)

    assert (await bench.dead(killer))["reason"] == "poison"  # type: ignore[index]
    assert [await bench.effects(job_id) for job_id in innocents] == [1] * 5
    third_runs = await bench.db.fetch("SELECT beside FROM run GROUP BY job_id, beside, pid, ctid ORDER BY ctid")
    assert [row["beside"] for row in third_runs[12:]] == [0] * (len(third_runs) - 12), "each suspect ran alone"


# --- SIGSTOP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [faults.book, faults.book_late], ids=["inside complete()", "before complete()"])
async def test_a_worker_paused_past_its_lease_comes_back_and_has_no_second_effect(
    bench: Bench, workers: Workers, task: object
) -> None:
    paused = await workers.start()
    job_id = await bench.commit_and_relay(task, "gate")  # type: ignore[arg-type]
    await has_run(bench, job_id)
    paused.signal(signal.SIGSTOP)

    living = await workers.start()
    await has_run(bench, job_id, 2)
    await open_gate(bench)
    await drained(bench)
    paused.signal(signal.SIGCONT)

    async def is_back() -> bool:
        return len(await bench.broker.beats("default")) == 2

    await until(is_back, "the paused worker is back")
    living.signal(signal.SIGTERM)
    assert await living.ends() == 0
    next_id = await bench.commit_and_relay(faults.book, "gate")
    await has_run(bench, next_id)
    await drained(bench)
    paused.signal(signal.SIGTERM)
    assert await paused.ends() == 0

    assert await bench.effects(job_id) == 1
    assert await bench.effects(next_id) == 1
    assert await runs(bench, job_id) == 2
    assert await bench.keys_left() == set()


async def test_workers_do_not_sweep_each_other_when_all_of_them_were_paused(bench: Bench, workers: Workers) -> None:
    """As a machine that sleeps does: nobody has seen anybody stand still."""
    both = [await workers.start(), await workers.start()]
    job_id = await bench.commit_and_relay(faults.plain, "gate")
    await has_run(bench, job_id)
    beats = set(await bench.broker.beats("default"))
    for process in both:
        process.signal(signal.SIGSTOP)

    paused_at = (await bench.redis.time())[0]

    async def is_lease_over() -> bool:
        return (await bench.redis.time())[0] > paused_at + 2 * LEASE_S + 1

    await until(is_lease_over, "two leases have passed")
    for process in both:
        process.signal(signal.SIGCONT)
    await open_gate(bench)
    await drained(bench)

    assert await runs(bench, job_id) == 1
    assert set(await bench.broker.beats("default")) == beats
    assert "sweeps" not in await bench.stats()


# --- SIGTERM ---------------------------------------------------------------------------------------------------------


async def test_sigterm_lets_running_jobs_finish(bench: Bench, workers: Workers) -> None:
    worker = await workers.start()
    job_id = await bench.commit_and_relay(faults.book, "gate")
    await has_run(bench, job_id)

    worker.signal(signal.SIGTERM)
    await worker.says("worker draining")
    await open_gate(bench)

    assert await worker.ends() == 0
    assert await bench.effects(job_id) == 1
    assert await bench.keys_left() == set()


async def test_sigterm_hands_back_what_does_not_finish_in_its_grace(bench: Bench, workers: Workers) -> None:
    worker = await workers.start("--grace", "0.1")
    job_id = await bench.commit_and_relay(faults.book, "gate")
    await has_run(bench, job_id)

    worker.signal(signal.SIGTERM)

    assert await worker.ends() == 0
    row = await bench.row(job_id)
    assert row is not None
    assert (row["generation"], row["attempts"], row["crashes"]) == (2, 0, 0)
    assert await bench.effects(job_id) == 0
    assert await bench.keys_left() == set()


async def test_a_second_signal_ends_a_worker_whose_jobs_would_take_for_ever(bench: Bench, workers: Workers) -> None:
    worker = await workers.start("--grace", "600")
    job_id = await bench.commit_and_relay(faults.plain, "gate")
    await has_run(bench, job_id)

    worker.signal(signal.SIGTERM)
    await worker.says("worker draining")
    worker.signal(signal.SIGTERM)

    assert await worker.ends() == 6
    assert (await bench.row(job_id))["generation"] == 2  # type: ignore[index]
    assert await bench.keys_left() == set()


async def test_a_task_that_takes_no_notice_runs_again_after_the_lease(bench: Bench, workers: Workers) -> None:
    worker = await workers.start("--grace", "0", lease=60)
    job_id = await bench.commit_and_relay(faults.swallow)
    await has_run(bench, job_id)

    worker.signal(signal.SIGTERM)

    assert await worker.ends() == 6
    row = await bench.row(job_id)
    assert row is not None
    assert (row["generation"], row["attempts"], row["crashes"]) == (2, 0, 0)
    assert row["run_at"] is not None
    assert await bench.keys_left() == set()
