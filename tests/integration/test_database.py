"""Database: what `JobQ(database=...)` takes, and jobq's own connections on the one primary."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID

import anyio.to_thread
import asyncpg
import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from jobq import ConfigurationError, JobQ, SchemaMismatch, WrongDatabase, embedded, migrate
from jobq.outbox.database import Database, PoolTimeout, is_unavailable
from tests.enqueuing import connection_to, engine_for, fetch
from tests.waiting import until

SECRET = "hunter2"
NOWHERE = f"postgresql://jobq:{SECRET}@127.0.0.1:1/none"


@asynccontextmanager
async def database_of(value: Any) -> AsyncIterator[Database]:
    database = Database.of(value)
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def connected(database: Database, *, schema: str = "jobq", name: str = "jobq:test") -> AsyncIterator[Any]:
    connection = await database.connect(schema=schema, name=name)
    try:
        yield connection
    finally:
        await connection.close()


def database_name(url: str) -> str:
    return make_url(url).database or ""


# What it takes


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+asyncpg"])
async def test_a_url_may_begin_in_three_ways(scheme, database_url):
    url = database_url.replace("postgresql://", f"{scheme}://", 1)

    async with database_of(url) as database, connected(database) as connection, database.sessions() as session:
        assert await connection.fetchval("SELECT current_database()") == database_name(database_url)
        assert await session.scalar(text("SELECT current_database()")) == database_name(database_url)


async def test_parameters_of_libpq_in_a_url_mean_what_they_say(database_url):
    url = f"{database_url}&application_name=shop&options=-c%20work_mem%3D7MB"

    async with database_of(url) as database, database.sessions() as session:
        assert await session.scalar(text("SHOW work_mem")) == "7MB"
        assert await session.scalar(text("SHOW application_name")) == "shop"


async def test_an_engine_is_used_as_it_is_and_stays_open(database_url):
    async with engine_for(database_url, pool_size=1, max_overflow=0) as engine:
        pool = engine.pool
        async with database_of(engine) as database:
            assert database.engine is engine
            async with database.sessions() as session:
                assert await session.scalar(text("SELECT 1")) == 1

        assert engine.pool is pool, "close() is for engines that jobq made"


async def test_a_sessionmaker_makes_the_sessions(database_url):
    class ShopSession(AsyncSession):
        pass

    async with engine_for(database_url) as engine:
        sessions = async_sessionmaker(engine, class_=ShopSession, info={"shop": 7})
        async with database_of(sessions) as database, database.sessions() as session:
            assert database.engine is engine
            assert isinstance(session, ShopSession)
            assert session.info == {"shop": 7}


async def test_a_sessionmaker_on_a_connection_gives_that_connections_engine(database_url):
    async with engine_for(database_url) as engine, engine.connect() as connection:
        assert Database.of(async_sessionmaker(connection)).engine is engine


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (f"mysql://shop:{SECRET}@db/shop", "postgresql://, not mysql"),
        (f"postgresql+psycopg://shop:{SECRET}@db/shop", "not postgresql+psycopg"),
        (f"redis://:{SECRET}@cache", "not redis"),
        (f"shop:{SECRET}@db/shop", "postgresql://"),
        ("", "postgresql://"),
        (7, "not int"),
        (create_engine("sqlite://"), "not Engine"),
        (JobQ(), "not JobQ"),
        (async_sessionmaker(), "not bound"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_database_is_refused_without_its_password(wrong, said):
    with pytest.raises(ConfigurationError) as caught:
        Database.of(wrong)

    assert said in str(caught.value)
    assert SECRET not in str(caught.value)


def test_an_engine_with_another_driver_is_refused():
    engine = create_async_engine("postgresql+asyncpg://", async_creator=None)
    engine.sync_engine.dialect.driver = "psycopg"  # what such an engine says; the driver is not installed here

    for value in (engine, async_sessionmaker(engine)):
        with pytest.raises(ConfigurationError, match=r"not postgresql\+psycopg.*postgresql\+asyncpg://"):
            Database.of(value)


def test_taking_a_database_opens_nothing():
    assert Database.of(NOWHERE).pool_limit == 30
    assert JobQ(database=NOWHERE).database is not None


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 15),
        ({"pool_size": 3, "max_overflow": 4}, 7),
        ({"pool_size": 3, "max_overflow": 0}, 3),
        ({"max_overflow": -1}, None),
        ({"poolclass": NullPool}, None),
    ],
    ids=str,
)
def test_the_pools_limit_is_known(options, limit):
    engine = create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/none", **options)

    assert Database.of(engine).pool_limit == limit


# Connections of jobq's own


@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
async def test_a_connection_reads_what_is_committed_whatever_the_database_says(level, database_url):
    await fetch(
        database_url, f"ALTER DATABASE {database_name(database_url)} SET default_transaction_isolation = '{level}'"
    )

    async with database_of(database_url) as database, connected(database) as connection, connection.transaction():
        assert await connection.fetchval("SHOW transaction_isolation") == "read committed"
        before = await connection.fetchval("SELECT count(*) FROM jobq.dead")
        await fetch(
            database_url,
            "INSERT INTO jobq.dead (id, generation, queue, task, args, priority, attempts, crashes, created_at, reason)"
            " VALUES (gen_random_uuid(), 1, 'q', 't', '{}', 2, 0, 0, now(), 'poison')",
        )
        assert await connection.fetchval("SELECT count(*) FROM jobq.dead") == before + 1


async def test_the_isolation_level_of_the_applications_engine_does_not_matter(database_url):
    async with engine_for(database_url, isolation_level="SERIALIZABLE") as engine, AsyncExitStack() as stack:
        connection = await stack.enter_async_context(connected(Database.of(engine)))
        await stack.enter_async_context(connection.transaction())

        assert await connection.fetchval("SHOW transaction_isolation") == "read committed"


async def test_a_connection_is_not_cut_by_the_databases_timeouts_and_says_whose_it_is(database_url):
    name = database_name(database_url)
    await fetch(database_url, f"ALTER DATABASE {name} SET statement_timeout = '500ms'")

    async with database_of(database_url) as database, connected(database, name="jobq:relay") as connection:
        assert await connection.fetchval("SHOW statement_timeout") == "0"
        assert await connection.fetchval("SHOW idle_in_transaction_session_timeout") == "1min"
        assert await connection.fetchval("SHOW application_name") == "jobq:relay"
        await connection.execute("SELECT pg_sleep(0.6)")


async def test_a_connection_belongs_to_no_pool(database_url):
    async with (
        engine_for(database_url, pool_size=1, max_overflow=0, pool_timeout=0.2) as engine,
        AsyncExitStack() as stack,
    ):
        database = Database.of(engine)
        opened = [await stack.enter_async_context(connected(database)) for _ in range(3)]

        async with engine.connect() as connection:
            level = await connection.scalar(text("SHOW application_name"))

        assert len({connection.get_server_pid() for connection in opened}) == 3
        assert level != "jobq:test", "the application has none of jobq's settings"
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_the_identity_of_the_database_is_the_one_in_its_tables(database_url):
    [(expected,)] = await fetch(database_url, "SELECT database_id FROM jobq.meta")

    async with database_of(database_url) as database, connected(database) as connection:
        found = await database.database_id(connection, "jobq")

    assert found == expected
    assert type(found) is UUID


@pytest.mark.parametrize(
    "damage",
    ["DROP SCHEMA jobq CASCADE", "DROP TABLE jobq.meta", "DELETE FROM jobq.meta"],
)
async def test_missing_tables_are_a_schema_mismatch_with_the_remedy(damage, database_url):
    await fetch(database_url, damage)

    async with database_of(database_url) as database:
        with pytest.raises(SchemaMismatch, match=r"'jobq'.*jobq migrate upgrade"):
            await database.connect(schema="jobq", name="jobq:test")

    await until(lambda: nobody_else_on(database_url), "the refused connection is closed")


async def nobody_else_on(url: str) -> bool:
    rows = await fetch(
        url, "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    return not rows


@asynccontextmanager
async def swapped(servers: Any, url: str) -> AsyncIterator[None]:
    """Another database of jobq's stands behind the URL."""
    name = database_name(url)
    async with connection_to(make_url(servers.database_url).render_as_string(hide_password=False)) as admin:
        await admin.execute(f"CREATE DATABASE {name}_other TEMPLATE {name}")
        other = make_url(url).set(database=f"{name}_other").render_as_string(hide_password=False)
        await fetch(other, "UPDATE jobq.meta SET database_id = gen_random_uuid()")
        await admin.execute(f"ALTER DATABASE {name} RENAME TO {name}_first")
        await admin.execute(f"ALTER DATABASE {name}_other RENAME TO {name}")
        try:
            yield
        finally:
            await admin.execute(f"DROP DATABASE {name}_first WITH (FORCE)")


async def test_another_database_behind_the_url_is_refused(servers, database_url):
    async with database_of(database_url) as database:
        async with connected(database):
            pass
        async with connected(database):
            pass  # the same one again will do
        await database.engine.dispose()

        async with swapped(servers, database_url):
            with pytest.raises(WrongDatabase, match="another database than at the start"):
                await database.connect(schema="jobq", name="jobq:test")

        await until(lambda: nobody_else_on(database_url), "the refused connection is closed")


def restart_as_replica(servers: embedded.Servers) -> None:
    servers.postgres.stop()
    (servers.postgres.data / "standby.signal").touch()
    servers.postgres.start()


async def test_a_replica_behind_the_url_is_refused():
    servers = await anyio.to_thread.run_sync(embedded.start)
    try:
        async with engine_for(servers.database_url) as engine:
            await migrate.upgrade(engine, schema="jobq")
        await anyio.to_thread.run_sync(restart_as_replica, servers)
        assert await fetch(servers.database_url, "SELECT pg_is_in_recovery()") == [(True,)]

        async with database_of(servers.database_url) as database:
            with pytest.raises(WrongDatabase, match="replica"):
                await database.connect(schema="jobq", name="jobq:test")

        assert await nobody_else_on(servers.database_url)
    finally:
        await anyio.to_thread.run_sync(servers.stop)


# What is worth another try


async def test_a_server_that_is_not_there_is_unavailable():
    async with database_of(NOWHERE) as database:
        with pytest.raises(OSError) as caught:  # noqa: PT011  the system's words
            await database.connect(schema="jobq", name="jobq:test")

    assert is_unavailable(caught.value)
    assert SECRET not in str(caught.value)


async def test_a_connection_that_was_cut_is_unavailable(database_url):
    async with database_of(database_url) as database, connected(database) as connection:
        await fetch(database_url, "SELECT pg_terminate_backend($1)", connection.get_server_pid())
        with pytest.raises(Exception) as caught:  # noqa: PT011  one of several, by the moment
            await connection.fetchval("SELECT 1")
        assert is_unavailable(caught.value)

        with pytest.raises(asyncpg.InterfaceError) as again:
            await connection.fetchval("SELECT 1")
        assert is_unavailable(again.value)


async def test_a_session_whose_connection_was_cut_is_unavailable(database_url):
    async with database_of(database_url) as database, database.sessions() as session:
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await fetch(database_url, "SELECT pg_terminate_backend($1)", pid)
        with pytest.raises(DBAPIError) as caught:
            await session.execute(text("SELECT 1"))

    assert is_unavailable(caught.value)


async def test_an_error_of_the_application_is_not_unavailability(database_url):
    async with database_of(database_url) as database:
        async with database.sessions() as session:
            with pytest.raises(IntegrityError) as constraint:
                await session.execute(text("INSERT INTO jobq.meta DEFAULT VALUES"))
        async with connected(database) as connection:
            with pytest.raises(asyncpg.UndefinedTableError) as missing:
                await connection.execute("SELECT FROM no_such_table")

    assert not is_unavailable(constraint.value)
    assert not is_unavailable(missing.value)
    assert not is_unavailable(ValueError())


async def test_a_full_pool_is_unavailable(database_url):
    small_pool = engine_for(database_url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    async with small_pool as engine, engine.connect():
        with pytest.raises(PoolTimeout) as full:
            await engine.raw_connection()
    assert is_unavailable(full.value)


@pytest.mark.parametrize(
    "options", [{"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}, {"poolclass": NullPool}]
)
async def test_jobqs_own_connections_wait_for_none_of_the_applications(database_url, options):
    opened: list[object] = []
    async with engine_for(database_url, **options) as engine, engine.connect():
        event.listen(engine.sync_engine, "connect", lambda *_: opened.append(1))
        async with connected(Database.of(engine)) as connection:
            assert await connection.fetchval("SHOW application_name") == "jobq:test"
        assert opened, "made as the application makes its own"
