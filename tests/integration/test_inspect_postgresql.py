"""outbox.inspect: what PostgreSQL tells of itself, in the conditions that doctor looks for."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from jobq.outbox import inspect
from jobq.outbox.database import Database

SCHEMA = "jobq"


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def test_a_transaction_that_holds_a_snapshot_or_wrote_something_is_found_and_an_idle_session_is_not(
    db, database_url
):
    reader, writer, idle = [await asyncpg.connect(database_url) for _ in range(3)]
    await reader.execute("SET application_name = 'report'; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
    await writer.execute("SET application_name = 'import'; BEGIN; SELECT pg_current_xact_id()")
    await idle.execute("BEGIN; SELECT 1")

    found = await inspect.snapshot_holders(db, SCHEMA, longer_than_s=0)
    old = await inspect.snapshot_holders(db, SCHEMA, longer_than_s=60)

    assert [(holder.kind, holder.name) for holder in found] == [
        ("session", f"{reader.get_server_pid()} report idle in transaction"),
        ("session", f"{writer.get_server_pid()} import idle in transaction"),
    ]
    assert old == []
    for connection in (reader, writer, idle):
        await connection.close()


@pytest.mark.parametrize(("level", "answer"), [("AUTOCOMMIT", True), ("READ COMMITTED", False)])
async def test_sessions_that_commit_by_themselves_are_told(database_url, level, answer):
    url = database_url.replace("postgresql", "postgresql+asyncpg", 1)
    engine = create_async_engine(url, isolation_level=level)

    assert await inspect.commits_by_itself(Database.of(engine)) is answer
    assert await inspect.commits_by_itself(Database.of(engine.execution_options(isolation_level=level))) is answer
    await engine.dispose()


async def test_server_tells_its_version(db):
    server = await inspect.server(db, SCHEMA)

    assert server.version_number >= 140_000
    assert server.version.startswith(str(server.version_number // 10_000))
