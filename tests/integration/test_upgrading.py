"""What docs/upgrading.md says of releases of an application: its two releases, run one beside the other."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from jobq import JobQ
from jobq.relay.leadership import Relay
from jobq.settings import RelaySettings, WorkerSettings
from jobq.worker.worker import Worker
from tests.commands import Commands
from tests.enqueuing import fetch
from tests.markdown import blocks, write_files
from tests.waiting import until

PAGE = Path(__file__).parents[2] / "docs" / "upgrading.md"


@pytest.fixture
def database_url(shared_database_url: str) -> str:
    return shared_database_url


@pytest.fixture
async def releases(
    database_url: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Any, Any]]:
    """The modules before and after, on the stores of this test, with a relay beside them."""
    write_files(PAGE, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = ("before.jobs", "after.jobs")
    before, after = map(import_module, names)
    for release in (before, after):
        release.jobs.connect_to(database=database_url, redis=redis_url)
    stopping = asyncio.Event()
    relaying = JobQ(database=database_url).database
    relay = asyncio.create_task(Relay(relaying, redis_url, "jobq", RelaySettings(beat=0.1)).run(stopping))
    yield before, after
    stopping.set()
    await relay
    for database in (relaying, before.jobs.database, after.jobs.database):
        await database.close()
    for name in (*names, "before", "after"):
        del sys.modules[name]


async def test_jobs_of_the_old_release_run_under_the_alias_with_the_default(
    releases: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = releases
    await enqueue(before.jobs, before.send_receipt, 1)

    async with worker(after.jobs):
        await until(lambda: "receipt for 1 in en" in capsys.readouterr().out, "the old job ran in the new release")


async def test_a_job_of_the_new_release_is_parked_by_the_old_one_and_runs_in_the_new(
    releases: tuple[Any, Any], capsys: pytest.CaptureFixture[str], database_url: str, redis_url: str
) -> None:
    before, after = releases
    commands = Commands(database_url, redis_url)

    async with worker(before.jobs):
        await enqueue(after.jobs, after.mail_receipt, 2)

        async def is_parked() -> bool:
            return (await commands.json("status"))["total"]["parked"] == 1

        await until(is_parked, "the old worker set it aside", 20)
    async with worker(after.jobs):
        await until(lambda: "receipt for 2 in en" in capsys.readouterr().out, "the new worker took it up")


async def test_an_argument_that_a_worker_does_not_know_makes_a_job_invalid_and_retry_brings_it_back(
    releases: tuple[Any, Any], capsys: pytest.CaptureFixture[str], database_url: str, redis_url: str
) -> None:
    before, after = releases
    await enqueue(before.jobs, before.send_receipt, 3)
    await fetch(database_url, """UPDATE jobq.outbox SET args = '{"order_id": 3, "locale": "sv"}'""")

    async with worker(before.jobs):
        await until(lambda: dead(database_url, "invalid"), "the old worker buried it")
    retried = await Commands(database_url, redis_url).run("dead", "retry", "--reason", "invalid", "--yes")
    assert retried.exit_code == 0, retried.output
    async with worker(after.jobs):
        await until(lambda: "receipt for 3 in sv" in capsys.readouterr().out, "the new worker ran it")


async def test_the_commands_of_the_page_work(database_url: str, redis_url: str) -> None:
    commands = Commands(database_url, redis_url)
    lines = [line for block in blocks(PAGE, "sh") for line in block.text.splitlines()]
    assert "jobq dead retry --reason invalid --yes" in lines, "as above"

    for line in lines:
        result = await commands.run(*shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"


async def enqueue(jobs: JobQ, task: Any, order_id: int) -> None:
    async with jobs.database.sessions.begin() as session:
        await task.enqueue(session, order_id)


@asynccontextmanager
async def worker(jobs: JobQ) -> AsyncIterator[None]:
    serving = Worker(jobs, WorkerSettings(concurrency=5, grace=1, beat=0.1))
    running = asyncio.create_task(serving.run())
    yield
    serving.orders.stopping.set()
    serving.orders.wake()
    await running


async def dead(database_url: str, reason: str) -> bool:
    return bool(await fetch(database_url, "SELECT FROM jobq.dead WHERE reason = $1", reason))
