"""Windows that no single job goes through: of the janitor, migrations, two sweepers at once, private servers and mail.

And the proof that no window is forgotten: every line `# Crash here` of jobq, and every row of the crash table in the
README and in docs/guarantees.md, has one.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.message import EmailMessage
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiosmtplib
import asyncpg
import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from jobq import embedded, migrate
from jobq.demo.mailbox import Mailbox
from jobq.embedded.directory import LOCK
from jobq.outbox.database import Database
from jobq.relay.janitor import Janitor
from jobq.settings import RelaySettings
from jobq.testing.servers import ServerUrls
from jobq.testing.servers import database as database_on
from tests.builders import Bench
from tests.faults import test_crash_table, test_supervision
from tests.faults.kill_points import Stop, Stopped, armed
from tests.faults.test_crash_points import Scene, bench, forge
from tests.faults.victims import Forge, Process
from tests.faults.windows import (
    BOTH_SWEEP,
    DEAD,
    EMBED,
    HALF_DELETED,
    IN_FIRST_REVISION,
    IN_SECOND_REVISION,
    JANITOR,
    NOT_RENAMED,
    POINTS,
    WINDOWS,
    Seen,
)
from tests.waiting import until

__all__ = ["bench", "forge"]

ROOT = Path(__file__).parents[2]
WAYS = pytest.mark.parametrize("way", ["by steps", "by SIGKILL"])


@pytest.fixture
def start(forge: Forge, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def start(*words: str, **options: Any) -> Process:
        made.append(forge.start(*words, log=tmp_path / f"log-{len(made)}", **options))
        return made[-1]

    yield start
    for process in made:
        process.kill()


# --- the janitor -----------------------------------------------------------------------------------------------------


@WAYS
async def test_a_janitor_that_dies_in_the_middle_of_its_deletes_has_deleted_nothing(
    bench: Bench, start: Callable[..., Process], way: str
) -> None:
    url = str(bench.app.given_database)
    await bench.db.execute(
        "INSERT INTO jobq.idempotency_key (scope, key, job_id, expires_at) VALUES ('task', 'key', $1, now());",
        uuid4(),
    )
    await bench.db.execute(
        "INSERT INTO jobq.step (job_id, name, result, created_at) VALUES ($1, 'step', '1', now() - interval '1 year')",
        uuid4(),
    )
    tables = ("idempotency_key", "step")

    async def left() -> list[int]:
        return [await bench.db.fetchval(f"SELECT count(*) FROM jobq.{table}") for table in tables]

    async def locks() -> int:
        found = "SELECT count(*) FROM pg_locks WHERE relation = 'jobq.step'::regclass AND pid <> pg_backend_pid()"
        return int(await bench.db.fetchval(found))

    database = Database.of(url)
    if way == "by steps":
        janitor, stop = Janitor(database, "jobq", RelaySettings(tidy_every=1e-9)), Stop()
        with armed(POINTS[JANITOR], stop):
            step = asyncio.create_task(janitor.step())
            await until(stop.reached.is_set, "it has deleted")
            assert await locks() > 0
        await bench.db.fetch(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'jobq:janitor'"
        )
        stop.over.set()
        await asyncio.gather(step, return_exceptions=True)
    else:
        urls = {"JOBQ_DATABASE_URL": url, "JOBQ_REDIS_URL": bench.app.redis_url}
        assert await start("relay", window=JANITOR, **urls).ends() == -signal.SIGKILL

    async def are_gone() -> bool:
        return await locks() == 0

    await until(are_gone, "its locks are gone")
    assert await left() == [1, 1]
    await Janitor(database, "jobq", RelaySettings(tidy_every=1e-9)).step()
    assert await left() == [0, 0]
    await database.close()


# --- migrations ------------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_database_url(servers: ServerUrls) -> Iterator[str]:
    with database_on(servers.database_url, f"jobq_empty_{uuid4().hex}") as url:
        yield url


@WAYS
@pytest.mark.parametrize(
    ("window", "at"), [(IN_FIRST_REVISION, None), (IN_SECOND_REVISION, "jobq_0001")], ids=["first", "second"]
)
async def test_a_migration_that_dies_in_a_revision_leaves_the_tables_at_the_one_before_and_no_lock(
    empty_database_url: str, start: Callable[..., Process], window: str, at: str | None, way: str
) -> None:
    url = make_url(empty_database_url).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, poolclass=NullPool)
    if way == "by steps":
        with armed(POINTS[window], Stop()), suppress(Stopped):
            await migrate.upgrade(engine)
    else:
        process = start("migrate", "upgrade", window=window, JOBQ_DATABASE_URL=empty_database_url)
        assert await process.ends() == -signal.SIGKILL

    assert await migrate.current(engine) == at
    async with asyncio.timeout(20):  # it waits for a lock that is held
        await migrate.upgrade(engine)
    connection = await asyncpg.connect(empty_database_url)
    await migrate.check(connection)
    await connection.close()


# --- two sweepers ----------------------------------------------------------------------------------------------------


class Meeting(Stop):
    """What comes to the point waits there until two have come; then both go on."""

    def __init__(self) -> None:
        super().__init__()
        self._both = asyncio.Barrier(2)

    async def wait(self) -> None:
        await self._both.wait()


@WAYS
async def test_two_sweepers_of_one_dead_worker_count_its_crash_once(
    bench: Bench, start: Callable[..., Process], way: str
) -> None:
    (window,) = (window for window in WINDOWS if window.name == "the working list is read")
    scene = Scene(bench, window)
    await scene.arrange()
    if way == "by steps":
        both = [await bench.worker(queues=(name,)) for name in ("one", "two")]
        with armed(POINTS[BOTH_SWEEP], Meeting()):
            await asyncio.gather(*(worker.sweeper.sweep("default", DEAD, b"1") for worker in both))
    else:
        urls = {"JOBQ_DATABASE_URL": str(bench.app.given_database), "JOBQ_REDIS_URL": bench.app.redis_url}
        options = ["tests.faults.crash_app:jobs", "--lease", "1", "--beat", "0.1", "-q"]
        processes = [start("worker", *options, name, window=BOTH_SWEEP, strike="pause", **urls) for name in ("a", "b")]
        for process in processes:
            await process.until(lambda pid=process.pid: is_stopped(pid), "it has read the list")
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)

        async def is_swept() -> bool:
            return await bench.ready() != []

        await until(is_swept, "it was swept")
        for process in processes:
            await process.until(lambda p=process: re.search("swept a dead worker|came back", p.said), "both have swept")
            process.kill()
            await process.ends()

    seen = await scene.seen()
    await scene.recover()

    assert seen == Seen(rows=((2, 1, 0),), ready=1, known=1)
    assert await scene.runs() == {"book": {((2, 1, 0),)}}
    assert await bench.effects() == 1


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


# --- private servers and mail ----------------------------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    """A path, not yet there, that every user can reach."""
    folder = Path("/tmp") / f"reachable-{uuid4().hex}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


async def test_a_data_directory_that_was_not_finished_is_made_again(
    start: Callable[..., Process], folder: Path
) -> None:
    assert await start(EMBED, str(folder), window=NOT_RENAMED).ends() == -signal.SIGKILL
    assert (folder / "postgres.new" / "PG_VERSION").exists()
    assert not (folder / "postgres").exists()

    with embedded.start(folder, valkey=False) as servers:
        connection = await asyncpg.connect(servers.database_url)
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
    assert not (folder / "postgres.new").exists()


async def test_a_run_directory_that_was_deleted_half_way_is_swept_by_the_next_start(
    start: Callable[..., Process],
) -> None:
    process = start(EMBED, window=HALF_DELETED)
    assert await process.ends() == -signal.SIGKILL
    left = Path(process.said.strip())
    assert os.listdir(left) == [LOCK]

    with embedded.start(postgres=False):
        assert left.name not in os.listdir(left.parent)


async def test_a_mail_whose_sender_died_before_the_answer_is_kept_and_sent_again() -> None:
    mailbox = Mailbox(seed=1)
    mailbox.slowness = 1e6
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Message-ID"] = "shop@shop.example", "ada@mail.example", "<1@shop.example>"

    async with mailbox.serve() as address:
        host, port = address.split(":")
        sender = aiosmtplib.SMTP(hostname=host, port=int(port))
        await sender.connect()
        sending = asyncio.create_task(sender.send_message(mail))
        await until(lambda: mailbox.mails, "the server has it")
        assert sender.transport is not None
        sender.transport.abort()
        with pytest.raises(aiosmtplib.SMTPServerDisconnected):
            await sending
        mailbox.slowness = 0.0
        await aiosmtplib.send(mail, hostname=host, port=int(port))

    assert mailbox.mails == [("ada@mail.example", "<1@shop.example>")] * 2


# --- no window is forgotten ------------------------------------------------------------------------------------------

ELSEWHERE: dict[str, Callable[..., Any]] = {
    "jobq/outbox/follow.py: nothing was deleted.": (
        test_a_janitor_that_dies_in_the_middle_of_its_deletes_has_deleted_nothing
    ),
    "jobq/migrate/engine.py: or in a revision: its lock ends with the session, and the tables are at one revision or"
    " another.": test_a_migration_that_dies_in_a_revision_leaves_the_tables_at_the_one_before_and_no_lock,
    "jobq/embedded/postgres.py: or before: made again. After the rename it is complete.": (
        test_a_data_directory_that_was_not_finished_is_made_again
    ),
    "jobq/embedded/directory.py: the lock is still there, so a later sweep knows the directory for a dead run's.": (
        test_a_run_directory_that_was_deleted_half_way_is_swept_by_the_next_start
    ),
    "jobq/demo/mailbox.py: of the sender: it has sent the mail, does not know it, and sends it again.": (
        test_a_mail_whose_sender_died_before_the_answer_is_kept_and_sent_again
    ),
    "jobq/cli/processes/supervised.py: of the supervisor: its processes hear the end of their lines, and stop by"
    " themselves.": (test_supervision.test_the_processes_of_a_killed_supervisor_end_their_jobs_and_themselves),
}
"""Comments in the code whose window is not in the table, and who stops there."""

TABLE_ELSEWHERE: dict[str, Callable[..., Any]] = {
    "PostgreSQL fails over and loses the commit": (
        test_crash_table.test_postgresql_that_lost_the_commit_lost_effects_and_completion_together
    ),
}
"""Rows of the README's table in which it is not jobq that dies."""

GUARANTEES = {
    "The application dies before the commit.": "before the commit",
    "The relay dies after the commit, before the push.": "after the commit, before the push",
    "The push arrived, but its answer was lost.": "the push arrived, its reply was lost",
    "A worker fetched, but the answer was lost.": "fetched, the reply was lost",
    "A worker dies while a job runs, or hangs for longer than its lease.": (
        "the worker dies while the job runs, or pauses past its lease"
    ),
    "A worker dies after the commit of `ctx.complete()`, before it told Redis.": (
        "after the commit of `ctx.complete()`, before the ack"
    ),
    "A worker dies after a plain job returned, before its row was deleted.": (
        "a plain job is done, its batch not yet flushed"
    ),
    "A sweeping worker dies half way.": "a sweeper dies half way",
    "Redis loses everything.": "FLUSHALL, failover to a lagging replica, restart without AOF",
    "Redis is full.": "",  # nobody dies: test_relay_faults.py
    "PostgreSQL fails over and loses the last commits.": "PostgreSQL fails over and loses the commit",
}
"""What docs/guarantees.md tells of, and the row of the README that it is."""


def test_every_line_that_says_crash_here_is_a_window_that_something_dies_in() -> None:
    lines = {
        f"{file.relative_to(ROOT)}: {text}"
        for file in (ROOT / "jobq").rglob("*.py")
        for text in re.findall(r"# Crash here[:,] (.+)", file.read_text())
    }

    assert {window.where for window in WINDOWS} | ELSEWHERE.keys() == lines


def test_every_row_of_the_crash_table_has_a_window() -> None:
    table = (ROOT / "README.md").read_text().partition("| something breaks | what happens |\n|---|---|\n")[2]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.partition("\n\n")[0].splitlines()]

    assert {window.table for window in WINDOWS if window.table} | TABLE_ELSEWHERE.keys() == set(rows)


def test_every_case_of_the_guarantees_is_a_row_of_the_crash_table() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text()
    cases = page.partition("## What happens when something breaks")[2].partition("## ")[0]

    assert set(re.findall(r"^\*\*(.+?)\*\*", cases, re.MULTILINE)) == GUARANTEES.keys()
    named = {window.table for window in WINDOWS} | TABLE_ELSEWHERE.keys()
    assert set(GUARANTEES.values()) <= named
