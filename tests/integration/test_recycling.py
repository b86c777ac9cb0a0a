"""A worker that has done enough: it ends its jobs, and makes room for a fresh process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from jobq.errors import ConfigurationError
from jobq.settings import WorkerSettings
from jobq.worker import recycling
from jobq.worker.recycling import resident_bytes
from jobq.worker.worker import Worker
from tests.builders import Bench, Gate, running, settled, started
from tests.waiting import until

MIB = 2**20


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


def gated(bench: Bench) -> tuple[Any, Gate]:
    gate = Gate()

    @bench.app.task(name="gated")
    async def task() -> None:
        await gate.wait()

    return task, gate


def a_worker(bench: Bench, **settings: Any) -> Worker:
    """One that is to run by itself."""
    return Worker(bench.app, WorkerSettings(**{"beat": 0.1, "lease": 30.0, **settings}))


def is_told_to_stop(worker: Worker) -> bool:
    worker.recycling.step()
    return worker.orders.stopping.is_set()


async def test_a_worker_runs_max_jobs_to_their_end_and_leaves_the_others(bench: Bench) -> None:
    runs: list[int] = []

    @bench.app.task
    async def work(number: int) -> None:
        runs.append(number)

    for number in range(5):
        await bench.enqueue(work, number)
    await bench.relay()
    worker = a_worker(bench, max_jobs=3)
    told: list[str] = []
    worker.announce = told.append

    async with running(worker) as run:
        assert await asyncio.wait_for(asyncio.shield(run), 20) == 0

    assert runs == [0, 1, 2]
    assert told == ["ready", "recycling"]
    assert len(await bench.ready()) == 2
    assert await bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == 2


async def test_a_worker_that_recycles_fetches_nothing_more_and_waits_for_its_last_job(bench: Bench, caplog) -> None:
    caplog.set_level(logging.INFO)
    task, gate = gated(bench)
    worker = await bench.worker(max_jobs=1)
    last = await bench.commit_and_relay(task)
    await started(worker)

    assert not is_told_to_stop(worker)
    assert worker.orders.quiet.is_set()
    waiting = await bench.commit_and_relay(task)
    await worker.turns.step()
    assert not is_told_to_stop(worker)
    assert len(await bench.ready()) == 1
    await gate.opened()
    await until(lambda: not worker.turns.runs, "the last job ended")
    assert not is_told_to_stop(worker), "what it wrote is not settled"
    await settled(worker)

    assert is_told_to_stop(worker)
    assert await bench.row(last) is None
    assert (await bench.row(waiting))["generation"] == 1  # type: ignore[index]
    (line,) = [record for record in caplog.records if record.message == "worker recycles"]
    assert line.fields == {"worker": worker.name, "max_jobs": 1, "running": 1}  # type: ignore[attr-defined]


async def test_a_worker_recycles_once_it_holds_max_rss(bench: Bench, caplog) -> None:
    caplog.set_level(logging.INFO)
    worker = await bench.worker(max_rss=resident_bytes() + 64 * MIB)
    assert not is_told_to_stop(worker)

    ballast = b"x" * (128 * MIB)

    assert is_told_to_stop(worker)
    del ballast
    (line,) = [record for record in caplog.records if record.message == "worker recycles"]
    assert {"rss", "max_rss"} < line.fields.keys()  # type: ignore[attr-defined]


async def test_a_stop_ordered_while_a_worker_recycles_has_its_usual_grace(bench: Bench) -> None:
    task, gate = gated(bench)
    worker = a_worker(bench, max_jobs=1, grace=0)
    job_id = await bench.commit_and_relay(task)

    async with running(worker) as run:
        await gate.arrived.wait()
        await until(worker.orders.quiet.is_set, "the worker recycles")
        assert not worker.orders.stopping.is_set()
        worker.orders.stopping.set()
        worker.orders.wake()
        assert await asyncio.wait_for(asyncio.shield(run), 20) == 0

    row = await bench.row(job_id)
    assert row is not None
    assert (row["generation"], row["attempts"]) == (2, 0)


async def test_a_limit_that_a_worker_holds_before_its_first_job_is_refused(bench: Bench) -> None:
    with pytest.raises(
        ConfigurationError, match=r"--max-rss 1M is less than the worker holds before its first job \(\d+M\)"
    ):
        await bench.worker(max_rss=MIB)


def test_memory_is_known_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    now = resident_bytes()
    monkeypatch.setattr(recycling, "_STATM", Path("/no/such/file"))

    assert resident_bytes() > now / 2, "the most it ever was, in bytes"
