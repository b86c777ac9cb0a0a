"""`jobq run`, `relay`, `worker` as real processes: what they do at a signal, and the codes they end with."""

from __future__ import annotations

import gc
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest
from click.testing import CliRunner

from jobq.cli import cli, serving
from jobq.cli.failures import ExitCode
from jobq.model import new_job_id
from tests.commands import Commands, Process, started
from tests.leaks import process_kept
from tests.waiting import until

SHOP = """
import asyncio, time
from pathlib import Path
from jobq import JobQ

jobs = JobQ()

def mark(what):
    with Path("marks").open("a") as marks:
        marks.write(what + "\\n")

@jobs.task
async def quick() -> None:
    mark("quick")

@jobs.task(queue="mail")
async def send() -> None:
    mark("send")

@jobs.task
async def slow() -> None:
    mark("slow")
    while not Path("go").exists():
        await asyncio.sleep(0.01)
    mark("slow done")

@jobs.task
async def stubborn() -> None:
    mark("stubborn")
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            mark("swallowed")

@jobs.task
def blocking() -> None:
    mark("blocking")
    time.sleep(600)
"""
Start = Callable[..., AbstractContextManager[Process]]


@pytest.fixture
def start(tmp_path: Path, database_url: str, redis_url: str) -> Start:
    """Start a command on this test's stores, in a folder with the application `shop:jobs`."""
    (tmp_path / "shop.py").write_text(SHOP)
    urls = {"JOBQ_DATABASE_URL": database_url, "JOBQ_REDIS_URL": redis_url}
    return lambda *args, **env: started(*args, folder=tmp_path, **{**urls, **env})


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def commit(db: asyncpg.Connection, task: str, queue: str = "default") -> UUID:
    job_id = new_job_id()
    await db.execute("INSERT INTO jobq.outbox (id, queue, task, args) VALUES ($1, $2, $3, '{}')", job_id, queue, task)
    return job_id


async def generation(db: asyncpg.Connection, job_id: UUID) -> tuple[int, int, int] | None:
    """The job's generation, attempts and crashes."""
    row = await db.fetchrow("SELECT generation, attempts, crashes FROM jobq.outbox WHERE id = $1", job_id)
    return tuple(row) if row is not None else None


async def marked(folder: Path, what: str, *, times: int = 1) -> None:
    """Wait until tasks have left a mark so often."""
    marks = folder / "marks"
    await until(
        lambda: marks.exists() and marks.read_text().splitlines().count(what) >= times,
        f"tasks left {what!r} {times} times",
        20,
    )


# --- serving


async def test_run_brings_and_runs_the_jobs_of_every_queue_that_tasks_name(start, db, tmp_path):
    with start("run", "shop:jobs") as process:
        await process.says("worker ready")
        await commit(db, "quick")
        await commit(db, "send", "mail")
        await marked(tmp_path, "quick")
        await marked(tmp_path, "send")
        process.signal(signal.SIGTERM)

        assert await process.ends() == ExitCode.OK
    assert "queues=default,mail slots=100" in process.said
    assert await db.fetchval("SELECT count(*) FROM jobq.outbox") == 0


async def test_a_relay_needs_no_application_and_stops_at_sigterm(start, db, database_url, redis_url):
    commands = Commands(database_url, redis_url)
    with start("relay") as process:
        await process.says("relay leads")
        await commit(db, "quick")

        async def is_pushed() -> bool:
            return (await commands.json("status"))["total"]["ready"] == 1

        await until(is_pushed, "the job's entry was in Redis")
        process.signal(signal.SIGTERM)

        assert await process.ends() == ExitCode.OK
    assert not (await commands.json("status"))["relay"]["leads"]


async def test_a_worker_serves_the_queues_it_is_given(start):
    with start("worker", "shop:jobs", "-q", "mail,news", "-q", "mail", "-c", "7") as process:
        await process.says("queues=mail,news slots=7")
    with start("worker", "shop:jobs", JOBQ_QUEUES="news:2, mail", JOBQ_CONCURRENCY="3") as process:
        await process.says("queues=news:2,mail slots=3")
    with start("worker", "shop:jobs", "-q", "news,mail", "--strict") as process:
        await process.says('queues="news,mail --strict" slots=100')


async def test_settings_come_from_pyproject_last(start, tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[tool.jobq]\napp = "shop:jobs"\nqueues = "mail"\nconcurrency = 4\nmax-rss = "1M"\n'
    )

    with start("worker", JOBQ_CONCURRENCY="5", JOBQ_MAX_RSS="10G") as process:
        await process.says("queues=mail slots=5")
    with start("worker") as process:
        assert await process.ends() == ExitCode.FAILED
        assert "--max-rss 1M is less than the worker holds before its first job" in process.said


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_either_event_loop_serves(start, db, tmp_path, loop):
    with start("run", "shop:jobs", "--loop", loop) as process:
        await commit(db, "quick")
        await marked(tmp_path, "quick")
        process.signal(signal.SIGINT)

        assert await process.ends() == ExitCode.OK


# --- signals


async def test_sigterm_hands_back_what_outlasts_the_grace_and_another_worker_runs_it(start, db, tmp_path):
    job_id = await commit(db, "slow")
    with start("relay"), start("worker", "shop:jobs", "--grace", "0.1") as process:
        await marked(tmp_path, "slow")
        process.signal(signal.SIGTERM)

        assert await process.ends() == ExitCode.OK
        assert await generation(db, job_id) == (2, 0, 0)
        assert "job interrupted" in process.said

        with start("worker", "shop:jobs"):
            await marked(tmp_path, "slow", times=2)
            (tmp_path / "go").touch()
            await until(lambda: _is_done(db, job_id), "the job was done")


async def test_sigterm_lets_a_job_finish_within_the_grace(start, db, tmp_path):
    job_id = await commit(db, "slow")
    with start("run", "shop:jobs") as process:
        await marked(tmp_path, "slow")
        process.signal(signal.SIGTERM)
        await process.says("worker draining")
        (tmp_path / "go").touch()

        assert await process.ends() == ExitCode.OK
    assert await _is_done(db, job_id)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.FORCED)])
async def test_the_second_signal_hands_back_at_once(start, db, tmp_path, number, code):
    job_id = await commit(db, "slow")
    with start("run", "shop:jobs", "--grace", "600") as process:
        await marked(tmp_path, "slow")
        process.signal(number)
        await process.says("worker draining")
        process.signal(number)

        assert await process.ends() == code
    assert await generation(db, job_id) == (2, 0, 0)


STARTS_FOR_EVER = """
import asyncio
from contextlib import asynccontextmanager
from shop import jobs, mark

async def wait(stubborn):
    mark("starts")
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            mark("cancelled")
            if not stubborn:
                raise

@asynccontextmanager
async def lifespan():
    await wait(stubborn={stubborn})
    yield

jobs.lifespan = lifespan
"""


@pytest.mark.parametrize("command", ["worker", "run"])
async def test_a_signal_ends_a_start_that_takes_for_ever(start, tmp_path, command):
    (tmp_path / "slow_start.py").write_text(STARTS_FOR_EVER.format(stubborn=False))
    with start(command, "slow_start:jobs") as process:
        await marked(tmp_path, "starts")
        process.signal(signal.SIGTERM)

        assert await process.ends() == ExitCode.OK
    assert "worker stopped before it served" in process.said
    await marked(tmp_path, "cancelled")


async def test_the_second_signal_ends_a_start_that_takes_no_notice(start, tmp_path):
    (tmp_path / "slow_start.py").write_text(STARTS_FOR_EVER.format(stubborn=True))
    with start("worker", "slow_start:jobs") as process:
        await marked(tmp_path, "starts")
        process.signal(signal.SIGINT)
        await marked(tmp_path, "cancelled")
        process.signal(signal.SIGINT)

        assert await process.ends() == ExitCode.INTERRUPTED


async def test_code_that_cannot_be_cancelled_ends_with_the_process_and_its_jobs_wait_for_the_lease_to_end(
    start, db, tmp_path, database_url, redis_url
):
    job_ids = [await commit(db, "stubborn"), await commit(db, "blocking")]
    with start("run", "shop:jobs", "--grace", "0") as process:
        await marked(tmp_path, "stubborn")
        await marked(tmp_path, "blocking")
        process.signal(signal.SIGTERM)

        assert await process.ends() == ExitCode.FORCED
    assert all(f"job {job_id}" in process.said.split("ended while jobs still ran")[1] for job_id in job_ids)
    assert [await generation(db, job_id) for job_id in job_ids] == [(2, 0, 0)] * 2
    total = (await Commands(database_url, redis_url).json("status"))["total"]
    assert (total["running"], total["waiting"], total["scheduled"]) == (0, 0, 2)


async def test_sigtstp_makes_a_worker_quiet(start, db, tmp_path):
    await commit(db, "slow")
    with start("run", "shop:jobs") as process:
        await marked(tmp_path, "slow")
        process.signal(signal.SIGTSTP)
        await process.says("worker quiet")
        await commit(db, "quick")
        (tmp_path / "go").touch()
        await marked(tmp_path, "slow done")

        with start("worker", "shop:jobs", "--concurrency", "1"):
            await marked(tmp_path, "quick")  # the other worker had to come for it
        process.signal(signal.SIGTERM)

        assert await process.ends() == ExitCode.OK
    assert "task=quick" not in process.said


async def _is_done(db: asyncpg.Connection, job_id: UUID) -> bool:
    return await generation(db, job_id) is None


# --- what keeps a process from starting


NOT_LISTENING = "postgresql://u:secret@127.0.0.1:1/db"


@pytest.mark.parametrize("command", ["run", "worker", "relay"])
async def test_stores_that_are_not_there_exit_4_and_are_named_without_a_password(start, command):
    with start(command, "shop:jobs", JOBQ_DATABASE_URL=NOT_LISTENING) as process:
        assert await process.ends() == ExitCode.UNREACHABLE
        assert "cannot reach PostgreSQL at postgresql://u:***@127.0.0.1:1/db" in process.said
    with start(command, "shop:jobs", JOBQ_REDIS_URL="redis://:secret@127.0.0.1:1/0") as process:
        assert await process.ends() == ExitCode.UNREACHABLE
        assert "cannot reach Redis at redis://:***@127.0.0.1:1/0" in process.said
        assert "check that it runs and that --redis-url or JOBQ_REDIS_URL is right" in process.said
        assert "secret" not in process.said


@pytest.mark.parametrize("command", ["run", "worker", "relay"])
async def test_tables_of_another_release_exit_5(start, db, command):
    await db.execute("UPDATE jobq.alembic_version SET version_num = 'jobq_9999'")

    with start(command, "shop:jobs") as process:
        assert await process.ends() == ExitCode.SCHEMA
    assert "so upgrade jobq" in process.said


@pytest.mark.parametrize("command", ["run", "worker", "relay"])
async def test_a_replica_is_refused_and_nothing_is_dropped(start, db, tmp_path, command):
    job_id = await commit(db, "quick")
    database = await db.fetchval("SELECT current_database()")
    await db.execute(
        f"CREATE FUNCTION public.pg_is_in_recovery() RETURNS boolean LANGUAGE sql AS 'SELECT true';"
        f"ALTER DATABASE {database} SET search_path = public, pg_catalog"
    )

    with start(command, "shop:jobs") as process:
        assert await process.ends() == ExitCode.FAILED
    assert "the database URL leads to a replica" in process.said
    assert await generation(db, job_id) == (1, 0, 0)


async def test_an_application_that_cannot_be_served_is_refused(start, tmp_path):
    (tmp_path / "empty.py").write_text("from jobq import JobQ\njobs = JobQ()\n")
    (tmp_path / "odd.py").write_text(
        "from jobq import JobQ\njobs = JobQ()\n@jobs.task\nasync def t(x: 'Missing') -> None: ...\n"
    )

    with start("worker", "no_such:jobs") as absent, start("worker", "empty:jobs") as empty:
        assert await absent.ends() == ExitCode.APP
        assert await empty.ends() == ExitCode.FAILED
        assert "empty:jobs has no tasks" in empty.said
    with start("worker", "odd:jobs") as odd:
        assert await odd.ends() == ExitCode.FAILED
        assert "task 't': its annotations cannot be resolved" in odd.said


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["-q", "Mail"], "'Mail' is no queue"),
        (["--strict"], "--strict serves queues in the order of -q"),
        (["--lease", "4", "--beat", "2"], "--beat 2 is too long for --lease 4: a third of it at most"),
        (["-c", "0"], "0 is not in the range"),
        (["--processes", "0"], "0 is not in the range 1<=x<=64"),
        (["--max-jobs", "0"], "0 is not in the range"),
        (["--max-rss", "lots"], "'lots' is no size: write bytes, or a number with K, M or G, like 512M or 1.5G"),
        (["--health", "127.0.0.1:1", "--processes", "2"], "--health and --processes exclude each other"),
        (["--health", "8080"], "'8080' is no HOST:PORT: write 127.0.0.1:8080"),
        (["--frozen-after", "59"], "59.0 is not in the range x>=60"),
    ],
)
def test_what_a_worker_cannot_do_is_wrong_usage(args, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with process_kept():
        result = CliRunner().invoke(cli, ["worker", "shop:jobs", *args])

    assert result.exit_code == ExitCode.USAGE
    assert sentence in result.stderr


async def test_a_relay_without_urls_is_wrong_usage(tmp_path, start):
    with start("relay", JOBQ_REDIS_URL="") as process:
        assert await process.ends() == ExitCode.USAGE
    assert "which Redis? Name an application, or set --redis-url or JOBQ_REDIS_URL" in process.said


async def test_redis_that_evicts_is_said_loudly_at_the_start(start, redis_url):
    import redis

    with redis.Redis.from_url(redis_url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", "200mb")
        try:
            with start("worker", "shop:jobs") as process:
                await process.says("error redis evicts keys: set `maxmemory-policy noeviction`")
        finally:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "0")


@pytest.mark.parametrize("chosen", [None, (5_000, 20, 20)])
def test_a_process_that_serves_looks_for_garbage_seldom_unless_the_application_chose_how_often(chosen):
    before = gc.get_threshold()
    frozen_before = gc.get_freeze_count()
    try:
        if chosen is not None:
            gc.set_threshold(*chosen)
        with serving.garbage_looked_for_seldom():
            assert gc.get_threshold() == (chosen or (10_000, *before[1:]))
            assert (gc.get_freeze_count() > frozen_before) == (chosen is None)
        assert gc.get_threshold() == (chosen or before)
        assert gc.get_freeze_count() <= frozen_before
    finally:
        gc.set_threshold(*before)
