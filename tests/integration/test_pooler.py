"""Behind PgBouncer: what jobq does through a pooler in transaction mode, and what it refuses."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker

from jobq import ConfigurationError, Context, JobQ
from jobq.outbox import follow, pooler
from jobq.outbox.database import Database
from jobq.relay.leadership import Relay
from jobq.settings import RelaySettings, WorkerSettings
from jobq.worker.worker import Worker
from tests.commands import Commands
from tests.enqueuing import connection_to, fetch
from tests.markdown import files
from tests.pgbouncer import PROGRAM, pgbouncer
from tests.waiting import until

PAGE = Path(__file__).parents[2] / "docs" / "pgbouncer.md"
NO_CACHE = "&prepared_statement_cache_size=0"

with_pgbouncer = pytest.mark.skipif(PROGRAM is None, reason="there is no pgbouncer here: apt-get install pgbouncer")


@pytest.fixture(autouse=True)
def _short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests here wait for a notification that does not come."""
    monkeypatch.setattr(pooler, "PROBE_S", 0.3)


@pytest.fixture
async def pooled_url(database_url: str) -> AsyncIterator[str]:
    async with pgbouncer(database_url) as url:
        yield url


# The URL


async def test_a_url_may_ask_for_no_prepared_statements(database_url: str) -> None:
    database = Database.of(database_url + NO_CACHE)

    async with database.sessions() as session, AsyncExitStack() as stack:
        for query, answer in (("SELECT 1", 1), ("SELECT 'a'", "a"), ("SELECT 1", 1)):
            assert await session.scalar(text(query)) == answer
        own = await database.connect(schema="jobq", name="jobq:test")
        stack.push_async_callback(own.close)
        assert await own.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''") == 0
    await database.close()


async def test_a_url_keeps_its_other_parameters_beside_the_one_about_statements(database_url: str) -> None:
    database = Database.of(f"{database_url}{NO_CACHE}&application_name=shop")

    async with database.sessions() as session:
        assert await session.scalar(text("SHOW application_name")) == "shop"
    await database.close()


def test_a_number_of_statements_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="must be a number, 0 for none"):
        Database.of("postgresql://localhost/shop?prepared_statement_cache_size=no")


# What works in transaction mode


@with_pgbouncer
async def test_enqueue_and_workers_work_through_transaction_mode_as_the_page_says(
    database_url: str, pooled_url: str, redis_url: str
) -> None:
    await fetch(database_url, "CREATE TABLE effect (number int)")
    jobs = JobQ(database=session_of_the_page(pooled_url), redis=redis_url)

    @jobs.task
    async def plain(number: int) -> None:
        pass

    @jobs.task
    async def count(ctx: Context, number: int) -> None:
        async with ctx.complete() as session:
            await session.execute(text("INSERT INTO effect VALUES (:number)"), {"number": number})

    async def order(number: int) -> None:
        async with jobs.database.sessions.begin() as session:
            await count.opts(idempotency_key=str(number)).enqueue(session, number)
            await jobs.enqueue_many(session, [plain.job(number), plain.job(number)])

    async with relay(database_url, redis_url), worker(jobs), worker(jobs), connection_to(database_url) as own:
        await asyncio.gather(*[order(number) for number in range(100)])
        await until(lambda: nobody_in("jobq.outbox", own), "all jobs are done", 30)

    found = await fetch(database_url, "SELECT count(*), count(DISTINCT number) FROM effect")
    assert [tuple(row) for row in found] == [(100, 100)]
    await jobs.database.engine.dispose()


@with_pgbouncer
async def test_jobq_leaves_nothing_in_the_sessions_of_a_pooler(database_url: str) -> None:
    async with pgbouncer(database_url, sessions=1) as url:
        database = Database.of(url + NO_CACHE)
        own = await database.connect(schema="jobq", name="jobq:test")
        connection = await asyncpg.connect(url, statement_cache_size=0)

        changed = await connection.fetch("SELECT name FROM pg_settings WHERE source = 'session'")

        assert {row[0] for row in changed} <= {"application_name", "client_encoding"}
        assert await connection.fetchval("SHOW application_name") == ""
        await own.close()
        await connection.close()
        await database.close()


@with_pgbouncer
async def test_commands_that_read_work_through_transaction_mode(pooled_url: str, redis_url: str) -> None:
    result = await Commands(pooled_url + NO_CACHE, redis_url).run("status")

    assert result.exit_code == 0, result.output


@with_pgbouncer
async def test_relays_work_through_transaction_mode_by_polling_and_one_of_them_leads(
    database_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(pgbouncer(database_url, sessions=8)) + NO_CACHE
        jobs = JobQ(database=url, redis=redis_url)
        stack.push_async_callback(jobs.database.close)
        own = await stack.enter_async_context(connection_to(database_url))

        @jobs.task
        async def nothing(number: int) -> None:
            pass

        await stack.enter_async_context(worker(jobs))
        tidy = {"tidy_every": 0.05}
        async with relay(url, redis_url, **tidy) as first, relay(url, redis_url, **tidy) as second:
            await until(lambda: first.is_leading or second.is_leading, "a relay leads")
            assert not (first.is_leading and second.is_leading)
            assert "a pooler in transaction mode passes no notifications on, polling" in caplog.messages
            await own.execute(EXPIRED_KEY)
            for number in range(50):
                async with jobs.database.sessions.begin() as session:
                    await nothing.enqueue(session, number)
            await until(lambda: nobody_in("jobq.outbox", own), "all jobs are done", 30)
            await until(lambda: nobody_in("jobq.idempotency_key", own), "the janitor's work is committed")
            xid = await own.fetchval("SELECT pg_current_xact_id()")
            await until(lambda: holds_no_snapshot_before(own, xid), "the snapshots of the relays move on")
            writing = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'jobq:relay' AND backend_xid IS NOT NULL"
            assert await own.fetch(writing) == []


@with_pgbouncer
async def test_the_next_relay_leads_when_one_behind_transaction_mode_is_killed(
    database_url: str, redis_url: str
) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(pgbouncer(database_url, sessions=4)) + NO_CACHE
        database = Database.of(url)
        stack.push_async_callback(database.close)
        killed = await database.connect(schema="jobq", name="jobq:relay", holds_locks=True)
        assert await follow.try_lead(killed, "jobq")
        next_one = await stack.enter_async_context(relay(url, redis_url))
        await until(lambda: waits_for(database_url), "the other stands by")
        assert not next_one.is_leading

        killed.terminate()

        await until(lambda: next_one.is_leading, "the other leads")


@with_pgbouncer
async def test_the_session_that_a_relay_keeps_listens_to_nothing(database_url: str) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(pgbouncer(database_url, sessions=1))
        listener = await asyncpg.connect(url, statement_cache_size=0)
        stack.callback(listener.terminate)
        await listener.execute("LISTEN left_behind")
        database = Database.of(url + NO_CACHE)
        stack.push_async_callback(database.close)

        own = await database.connect(schema="jobq", name="jobq:relay", holds_locks=True)
        stack.callback(own.terminate)

        # In a transaction that never ends it would hold up the notifications of the whole server, until none fit.
        assert await own.fetch("SELECT pg_listening_channels()") == []
        assert own.is_in_transaction()
        assert await own.fetchval("SHOW transaction_isolation") == "read committed"


EXPIRED_KEY = """
    INSERT INTO jobq.idempotency_key (scope, key, job_id, expires_at)
    VALUES ('task', 'key', gen_random_uuid(), now() - interval '1 s')
"""


async def nobody_in(table: str, connection: asyncpg.Connection) -> bool:
    return await connection.fetch(f"SELECT 1 FROM {table} LIMIT 1") == []


async def holds_no_snapshot_before(connection: asyncpg.Connection, xid: int) -> bool:
    query = """
        SELECT count(*) FROM pg_stat_activity
        WHERE application_name = 'jobq:relay' AND CAST(CAST(backend_xmin AS text) AS bigint) < $1
    """
    return await connection.fetchval(query, xid) == 0


async def waits_for(database_url: str) -> bool:
    query = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'jobq:relay' AND state = 'idle in transaction'"
    return len(await fetch(database_url, query)) == 2


@with_pgbouncer
async def test_session_mode_is_like_no_pooler(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooler, "PROBE_S", 10)
    async with pgbouncer(database_url, mode="session", sessions=5) as pooled, relay(pooled, redis_url) as serving:
        await until(lambda: serving.is_leading, "the relay leads")
        database = Database.of(pooled)
        own = await database.connect(schema="jobq", name="jobq:test", holds_locks=True)
        assert not own.is_in_transaction()
        assert await own.fetchval("SHOW enable_seqscan") == "off"
        await own.close()
        await database.close()


# What does not


@with_pgbouncer
@pytest.mark.parametrize("verb", ["upgrade", "stamp head", "downgrade base --yes"])
async def test_migrations_refuse_transaction_mode_and_leave_no_lock(
    verb: str, database_url: str, pooled_url: str, redis_url: str
) -> None:
    result = await Commands(pooled_url + NO_CACHE, redis_url).run("migrate", *verb.split())

    assert result.exit_code == 1
    assert "leads through a pooler in transaction mode" in result.stderr
    assert await fetch(database_url, "SELECT pid FROM pg_locks WHERE locktype = 'advisory'") == []
    assert await fetch(database_url, "SELECT FROM jobq.outbox") == []


@with_pgbouncer
async def test_another_isolation_level_behind_transaction_mode_is_refused(database_url: str) -> None:
    name = await fetch(database_url, "SELECT current_database()")
    await fetch(database_url, f"ALTER DATABASE {name[0][0]} SET default_transaction_isolation = 'repeatable read'")

    async with pgbouncer(database_url) as url:
        with pytest.raises(ConfigurationError, match="the isolation level is repeatable read by default"):
            await Database.of(url + NO_CACHE).connect(schema="jobq", name="jobq:test")


@with_pgbouncer
async def test_prepared_statements_that_a_pooler_mixes_up_are_named_with_the_remedy(database_url: str) -> None:
    async with pgbouncer(database_url, sessions=1) as url, connection_to(database_url) as counter:
        # The names that another process's asyncpg would have given, as this one's counter says.
        last = int((await counter.prepare("SELECT 1")).get_name().strip("_").removeprefix("asyncpg_stmt_"), 16)

        await take_names(url, range(last, last + 500))

        with pytest.raises(ConfigurationError, match="add prepared_statement_cache_size=0 to the URL"):
            await Database.of(url).connect(schema="jobq", name="jobq:test")
        for remedy in (url + NO_CACHE, session_of_the_page(url)):
            database = Database.of(remedy)
            async with database.sessions() as session:
                assert await session.scalar(text("SELECT 1")) == 1
            await database.engine.dispose()


async def take_names(url: str, numbers: Iterable[int]) -> None:
    """Use up names of prepared statements in the one session of a pooler."""
    connection = await asyncpg.connect(url, statement_cache_size=0)
    for number in numbers:
        await connection.execute(f"PREPARE __asyncpg_stmt_{number:x}__ AS SELECT 1")
    await connection.close()


def session_of_the_page(url: str) -> async_sessionmaker[Any]:
    """The `Session` of docs/pgbouncer.md, on this URL."""
    module: dict[str, Any] = {}
    before = os.environ.get("JOBQ_DATABASE_URL")
    os.environ["JOBQ_DATABASE_URL"] = url
    try:
        exec(files(PAGE)["shop/database.py"], module)
    finally:
        if before is None:
            del os.environ["JOBQ_DATABASE_URL"]
        else:
            os.environ["JOBQ_DATABASE_URL"] = before
    made: async_sessionmaker[Any] = module["Session"]
    return made


@asynccontextmanager
async def relay(database_url: str, redis_url: str, **settings: Any) -> AsyncIterator[Relay]:
    stopping = asyncio.Event()
    database = Database.of(database_url)
    serving = Relay(database, redis_url, "jobq", RelaySettings(beat=0.2, **settings))
    running = asyncio.create_task(serving.run(stopping))
    try:
        yield serving
    finally:
        stopping.set()
        await running
        await database.close()


@asynccontextmanager
async def worker(jobs: JobQ) -> AsyncIterator[None]:
    serving = Worker(jobs, WorkerSettings(concurrency=10, grace=1, beat=0.2))
    running = asyncio.create_task(serving.run())
    yield
    serving.orders.stopping.set()
    serving.orders.wake()
    await running
