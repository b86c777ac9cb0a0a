"""`jobq doctor`: what it finds in set-ups that are wrong in one known way."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import redis
from sqlalchemy.engine import make_url

from jobq.broker.scripts import ADOPT_TOKEN
from jobq.cli.failures import ExitCode
from jobq.model import Entry
from jobq.outbox.database import Database
from jobq.outbox.follow import try_lead
from jobq.relay.leadership import Relay
from jobq.settings import RelaySettings
from tests.builders import Bench, any_id, beating, running
from tests.commands import Commands
from tests.waiting import until


@pytest.fixture
async def bench(database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(database_url, redis_url) as bench:
        yield bench


@pytest.fixture
def commands(database_url: str, redis_url: str) -> Commands:
    return Commands(database_url, redis_url)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Write an application into the working directory; returns APP."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source: str) -> str:
        name = f"shop_{uuid4().hex}"
        (tmp_path / f"{name}.py").write_text(source)
        return f"{name}:jobs"

    yield write
    for name in [name for name in sys.modules if name.startswith("shop_")]:
        del sys.modules[name]


async def findings(commands: Commands, *args: str, code: int, **env: str) -> dict[str, dict[str, str]]:
    """What doctor found, by what it is about."""
    found = await commands.json("doctor", *args, code=code, **env)
    return {finding["about"]: finding for finding in found}


@asynccontextmanager
async def relaying(database_url: str, redis_url: str) -> AsyncIterator[None]:
    """A relay that leads."""
    database = Database.of(database_url)
    relay, stopping = Relay(database, redis_url, "jobq", RelaySettings(detect_loss_every=0.1)), asyncio.Event()
    serving = asyncio.create_task(relay.run(stopping))
    await until(lambda: relay.is_leading, "it leads")
    try:
        yield
    finally:
        stopping.set()
        await serving
        await database.close()


async def test_a_set_up_that_serves_is_well(bench, commands, database_url, redis_url):
    @bench.app.task(queue="mail")
    async def send() -> None: ...

    worker = await bench.worker(queues=("mail",), beat=0.1)
    await bench.enqueue(send, delay=300)

    async with relaying(database_url, redis_url):
        found = await findings(commands, code=ExitCode.OK)

    server = found.pop("postgresql")  # the tests' own runs without fsync
    assert server["found"].startswith("PostgreSQL ")
    assert found.pop("persistence")["level"] == "note"  # nor does theirs keep a file
    assert {about: finding["level"] for about, finding in found.items()} == dict.fromkeys(
        [
            *("versions", "zones", "pooler", "tables", "primary", "connections", "clocks", "snapshots", "prepared"),
            *("slots", "locks", "wake-up", "vacuum", "logging", "redis", "replica", "eviction", "memory", "relay"),
            *("workers", "oldest"),
        ],
        "ok",
    )
    assert found["workers"]["found"] == f"1 live, with {worker.settings.concurrency} slots and 0 jobs"
    assert "sqlalchemy " in found["versions"]["found"]
    assert " leads, connected for " in found["relay"]["found"]


async def test_a_leader_that_pushes_nothing_is_told(bench, commands, monkeypatch):
    monkeypatch.setattr("jobq.cli.findings.work._WATCHED_S", 0.6)
    leader = await bench.app.database.connect(schema="jobq", name="a relay")
    assert await try_lead(leader, "jobq")

    found = await findings(commands, code=ExitCode.OK)

    assert found["relay"]["level"] == "warn"
    assert found["relay"]["found"].startswith(f"session {leader.get_server_pid()} leads, connected for ")
    assert "has pushed nothing for 1 s" in found["relay"]["found"]
    leader.terminate()


async def test_queues_and_tasks_that_no_live_worker_has_are_told(bench, commands, write):
    @bench.app.task(queue="mail", name="send")
    async def send() -> None: ...

    elsewhere = await bench.second_app()

    @elsewhere.task(queue="mail")
    async def unheard_of() -> None: ...

    await bench.worker(queues=("mail",), beat=0.1)
    await bench.enqueue(unheard_of, delay=300)
    await bench.enqueue(unheard_of, queue="later", delay=300)
    await bench.broker.announce(["gone"])
    await bench.broker.push("gone", [Entry.of(any_id(), 1, 2).raw], expected=ADOPT_TOKEN, token="by hand")
    app = write("from jobq import JobQ\njobs = JobQ()\n@jobs.task(queue='news')\nasync def send() -> None: ...\n")

    result = await commands.run("doctor", app, "--json")
    found = [(f["level"], f["about"], f["found"]) for f in json.loads(result.stdout) if f["about"] in ("queue", "task")]

    assert found == [
        ("note", "queue", "no live worker serves gone, where Redis holds 1 entries of jobs that are gone"),
        ("warn", "queue", "no live worker serves later (0 waiting, 1 later)"),
        ("note", "queue", "no live worker serves news, which tasks of the application name"),
        ("warn", "task", "no live worker of mail knows task unheard_of (1 jobs)"),
    ]


@pytest.mark.parametrize(
    ("grants", "about", "found", "others"),
    [
        (
            "GRANT SELECT (id, generation, queue, priority, run_at, xid) ON jobq.outbox TO jobq_role;"
            "GRANT SELECT ON jobq.dead, jobq.meta, jobq.alembic_version TO jobq_role",
            "oldest",
            "cannot be looked at: permission denied for table outbox",
            ("vacuum", "relay", "workers"),
        ),
        (
            "GRANT INSERT, SELECT (id) ON jobq.outbox TO jobq_role",
            "postgresql",
            "cannot be looked at: permission denied for table meta",
            ("redis", "memory"),
        ),
    ],
    ids=["relay", "web"],
)
async def test_what_a_role_may_not_see_is_told_with_the_grant_and_the_rest_is_looked_at(
    bench, commands, database_url, grants, about, found, others
):
    await bench.db.execute(f"CREATE ROLE jobq_role LOGIN; GRANT USAGE ON SCHEMA jobq TO jobq_role; {grants}")
    url = make_url(database_url).set(username="jobq_role").render_as_string(hide_password=False)
    try:
        all_found = await findings(commands, code=ExitCode.OK, JOBQ_DATABASE_URL=url)
    finally:
        await bench.db.execute("DROP OWNED BY jobq_role; DROP ROLE jobq_role")

    assert all_found[about]["level"] == "warn"
    assert all_found[about]["found"] == found
    assert "GRANT USAGE ON SCHEMA jobq and SELECT ON jobq.outbox, jobq.dead, jobq.meta" in all_found[about]["remedy"]
    assert set(others) <= set(all_found)


async def test_jobs_that_nobody_brings_or_runs_fail(bench, commands):
    @bench.app.task(queue="mail")
    async def send() -> None: ...

    await bench.enqueue(send)
    await bench.db.execute("UPDATE jobq.outbox SET created_at = now() - interval '1 hour'")

    found = await findings(commands, code=ExitCode.FAILED)

    assert (found["relay"]["level"], found["relay"]["remedy"]) == ("fail", "jobq relay")
    assert found["queue"]["level"] == "fail"
    assert found["queue"]["found"] == "no live worker serves mail (1 waiting, 0 later)"
    assert found["oldest"]["level"] == "warn"
    assert found["oldest"]["found"] == "the oldest job that waits has been due for 60m"
    assert found["workers"]["level"] == "warn"


async def test_a_worker_that_does_not_beat_is_not_counted_as_live(bench, commands):
    worker = await bench.worker(queues=("mail",))  # it beats once an hour

    found = await findings(commands, code=ExitCode.OK)

    assert found["worker"]["level"] == "warn"
    assert found["worker"]["found"].startswith(f"{worker.name} (")
    assert "does not beat and holds 0 jobs" in found["worker"]["found"]
    assert found["workers"]["found"] == "none live"


async def test_parked_and_dead_jobs_are_told(bench, commands):
    elsewhere = await bench.second_app()

    @elsewhere.task
    async def unheard_of() -> None: ...

    worker = await bench.worker(beat=0.1, lease=36_000.0)
    await bench.commit_and_relay(unheard_of)
    await bench.db.execute(
        "INSERT INTO jobq.dead (id, generation, queue, task, args, priority, attempts, crashes, created_at, reason)"
        " VALUES (gen_random_uuid(), 1, 'mail', 'send', '{}', 2, 1, 0, now(), 'rejected')"
    )
    async with running(worker):

        async def is_parked() -> bool:
            return (await bench.stats()).get("parked") == 1

        await until(is_parked, "the job was parked")
        found = await findings(commands, code=ExitCode.OK)

    assert found["parked"]["level"] == "warn"
    assert found["parked"]["found"] == "1 jobs of task unheard_of are parked in default: no live worker offers it"
    assert found["dead"] == {
        "level": "warn",
        "about": "dead",
        "found": "1 jobs need a person",
        "remedy": "jobq dead list",
    }


async def test_parked_jobs_that_a_live_worker_will_call_back_need_nobody(bench, commands):
    newer = await bench.second_app()

    @newer.task
    async def resize() -> None: ...

    older = await bench.worker(beat=0.1)
    await bench.commit_and_relay(resize)
    async with running(older):

        async def is_parked() -> bool:
            return (await bench.stats()).get("parked") == 1

        await until(is_parked, "the job was parked")
        offering = await bench.worker(app=newer)  # it takes no turns, and calls nothing back

        async with beating(offering):
            found = await findings(commands, code=ExitCode.OK)

    assert found["parked"]["level"] == "ok"
    assert "; a live worker offers it, and will call them back" in found["parked"]["found"]


# --- the application


ENGINE = """
from sqlalchemy.ext.asyncio import create_async_engine
from jobq import JobQ
jobs = JobQ(database=create_async_engine({url!r}, {options}))
@jobs.task(queue="mail")
async def send() -> None: ...
"""


async def test_an_autocommit_engine_fails_and_a_small_pool_warns(commands, write, database_url):
    url = database_url.replace("postgresql", "postgresql+asyncpg", 1)
    wrong = write(ENGINE.format(url=url, options="isolation_level='AUTOCOMMIT', pool_size=3, max_overflow=4"))
    right = write(ENGINE.format(url=url, options="pool_size=3, max_overflow=4"))

    bad = await findings(commands, wrong, code=ExitCode.FAILED)
    good = await findings(commands, right, "--concurrency", "7", code=ExitCode.OK)

    assert bad["sessions"]["level"] == "fail"
    assert "AUTOCOMMIT, so enqueue() raises NotInTransaction" in bad["sessions"]["found"]
    assert bad["pool"]["level"] == "warn"
    assert bad["pool"]["found"].startswith("7 connections for 100 slots")
    assert {good[about]["level"] for about in ("sessions", "pool", "tasks")} == {"ok"}
    assert good["tasks"]["found"] == "1 in mail"

    # No worker lives, which one line says for every queue that the tasks name.
    assert (good["workers"]["level"], "queue" in good) == ("warn", False)


async def test_the_pool_is_compared_with_the_concurrency_that_workers_have(commands, write, database_url, tmp_path):
    url = database_url.replace("postgresql", "postgresql+asyncpg", 1)
    app = write(ENGINE.format(url=url, options="pool_size=3, max_overflow=4"))
    (tmp_path / "pyproject.toml").write_text("[tool.jobq]\nconcurrency = 7\n")

    found = await findings(commands, app, code=ExitCode.OK)

    assert found["pool"]["found"] == "7, for 7 slots"


async def test_the_pool_that_jobq_makes_from_a_url_is_no_fault_of_the_application(commands, write):
    app = write("from jobq import JobQ\njobs = JobQ()\n@jobs.task\nasync def send() -> None: ...\n")

    found = await findings(commands, app, code=ExitCode.OK)

    assert (found["pool"]["level"], found["pool"]["remedy"]) == ("ok", "")
    assert found["pool"]["found"].startswith("30, made from the URL")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("", "the application has none"),
        ("@jobs.task\nasync def t(x: 'Missing') -> None: ...\n", "task 't': its annotations cannot be resolved"),
    ],
)
async def test_tasks_that_no_worker_could_serve_fail(commands, write, source, sentence):
    app = write(f"from jobq import JobQ\njobs = JobQ()\n{source}")

    found = await findings(commands, app, code=ExitCode.FAILED)

    assert found["tasks"]["level"] == "fail"
    assert sentence in found["tasks"]["found"]


# --- PostgreSQL


async def test_tables_of_another_release_fail_and_redis_is_still_looked_at(bench, commands):
    await bench.db.execute("UPDATE jobq.alembic_version SET version_num = 'jobq_9999'")

    found = await findings(commands, code=ExitCode.FAILED)

    assert found["postgresql"]["level"] == "fail"
    assert "jobq_9999" in found["postgresql"]["found"]
    assert found["eviction"]["level"] == "ok"


async def test_a_replica_fails(bench, commands):
    database = await bench.db.fetchval("SELECT current_database()")
    await bench.db.execute(
        f"CREATE FUNCTION public.pg_is_in_recovery() RETURNS boolean LANGUAGE sql AS 'SELECT true';"
        f"ALTER DATABASE {database} SET search_path = public, pg_catalog"
    )

    found = await findings(commands, code=ExitCode.FAILED)

    assert "the database URL leads to a replica" in found["postgresql"]["found"]


async def test_a_transaction_open_for_long_is_found(bench, commands, database_url, monkeypatch):
    monkeypatch.setattr("jobq.cli.findings.transactions._HELD_TOO_LONG_S", 0.0)
    reader = await asyncpg.connect(database_url, server_settings={"application_name": "report"})
    await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")

    found = await findings(commands, code=ExitCode.OK)

    assert found["snapshots"]["level"] == "warn"
    assert f"by session {reader.get_server_pid()} report idle in transaction" in found["snapshots"]["found"]
    assert "pg_terminate_backend" in found["snapshots"]["remedy"]
    await reader.close()


async def test_both_stores_away_are_two_findings_with_the_passwords_hidden(commands):
    away = {
        "JOBQ_DATABASE_URL": "postgresql://u:secret@127.0.0.1:1/db",
        "JOBQ_REDIS_URL": "redis://:secret@127.0.0.1:1/0",
    }

    found = await findings(commands, code=ExitCode.FAILED, **away)

    assert found["postgresql"]["found"].startswith("cannot reach PostgreSQL at postgresql://u:***@127.0.0.1:1/db")
    assert found["redis"]["found"].startswith("cannot reach Redis at redis://:***@127.0.0.1:1/0")
    assert found["redis"]["remedy"] == "check that it runs and that --redis-url or JOBQ_REDIS_URL is right"


# --- Redis


@pytest.mark.parametrize(("limit", "level", "code"), [("200mb", "fail", ExitCode.FAILED), ("0", "warn", ExitCode.OK)])
async def test_a_redis_that_evicts_is_found(bench, commands, redis_url, limit, level, code):
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", limit)
        try:
            found = await findings(commands, code=code)
        finally:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "0")

    assert found["eviction"]["level"] == level
    assert "maxmemory-policy is allkeys-lru" in found["eviction"]["found"]
    assert "noeviction" in found["eviction"]["remedy"]


async def test_the_text_has_a_line_a_finding_and_its_remedy_below(bench, commands):
    result = await commands.run("doctor", FORCE_COLOR="1")

    assert result.exit_code == ExitCode.OK
    lines = result.stdout.splitlines()
    assert lines[0].startswith("ok    versions     jobq 0.1.0, python 3.")
    at = lines.index("warn  relay        none leads, so nothing reaches Redis")
    assert lines[at + 1].strip() == "jobq relay"
    assert result.stderr.endswith("need attention\n")
