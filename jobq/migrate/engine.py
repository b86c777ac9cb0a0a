"""The way between the versions of the tables, on an engine and under a lock.

Invariant: one migrator at a time changes a schema, and a revision and its mark in the version table are one
transaction, so that the tables are always at exactly one revision. Called by the package, cli, worker, relay.
Calls versions; alembic is loaded when a revision is run, not before.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any

import anyio
from sqlalchemy import text

from ..errors import ConfigurationError, SchemaMismatch
from .versions import BASE, LOCK, SCHEMA, checked_schema, config, history, mismatch, named, position

if TYPE_CHECKING:
    import asyncpg
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

log = logging.getLogger(__name__)

_LOCK_RETRY_S = 0.2


async def check(connection: asyncpg.Connection[Any], schema: str = SCHEMA) -> None:
    """Raise SchemaMismatch unless the tables are at the revision this release needs. Two short reads."""
    problem = mismatch(await _recorded(connection.fetchval, checked_schema(schema)), schema)
    if problem is not None:
        raise SchemaMismatch(problem)


async def current(engine: AsyncEngine, *, schema: str = SCHEMA) -> str | None:
    """Return the revision of the tables, known here or not; None when there are none."""
    async with engine.connect() as connection:
        return await _recorded(_scalar(connection), checked_schema(schema))


async def upgrade(engine: AsyncEngine, to: str = "head", *, schema: str = SCHEMA, lock_timeout: float = 5.0) -> None:
    """Bring the tables up to revision `to`, creating the schema if need be.

    May be repeated, and called by many at once: one works, the others wait for it and find nothing to do.
    `lock_timeout` is in seconds: all traffic queues behind a revision that waits for its table lock, so one
    that waits longer is rolled back, with PostgreSQL's error. Raises SchemaMismatch when the tables are
    newer than this release.
    """
    from alembic import command

    target = named(to)
    async with _alone(engine, checked_schema(schema), lock_timeout) as connection:
        found = await _recorded(_scalar(connection), schema)
        if position(found, schema) >= position(target, schema):
            return
        await _create_schema(connection, schema)
        # Crash here, or in a revision: its lock ends with the session, and the tables are at one revision or another.
        await connection.run_sync(lambda bare: command.upgrade(config(schema, bare), target))


async def downgrade(engine: AsyncEngine, to: str, *, schema: str = SCHEMA, lock_timeout: float = 5.0) -> None:
    """Take the tables back to revision `to`, or away with `base`. `losses()` says what is lost with them."""
    from alembic import command

    target = named(to)
    async with _alone(engine, checked_schema(schema), lock_timeout) as connection:
        found = await _recorded(_scalar(connection), schema)
        if position(found, schema) < position(target, schema):
            raise ConfigurationError(f"the tables are at {found or BASE} already, which is before {target}")
        if position(found, schema) > position(target, schema):
            await connection.run_sync(lambda bare: command.downgrade(config(schema, bare), target))
        if target == BASE:
            await connection.execute(text(f'DROP TABLE IF EXISTS "{schema}".alembic_version'))
            await connection.commit()


async def losses(engine: AsyncEngine, to: str, *, schema: str = SCHEMA) -> dict[str, int]:
    """Count the rows, by table, that a downgrade to revision `to` would drop."""
    target = position(named(to), schema)
    async with engine.connect() as connection:
        found = await _recorded(_scalar(connection), checked_schema(schema))
        undone = history()[target : position(found, schema)]
        tables = [table for revision in undone for table in revision.drops]
        counted = {table: text(f'SELECT count(*) FROM "{schema}".{table}') for table in tables}
        return {table: await connection.scalar(count) or 0 for table, count in counted.items()}


async def stamp(engine: AsyncEngine, to: str, *, schema: str = SCHEMA) -> None:
    """Record revision `to` as that of the tables, whatever was recorded before, and touch nothing else."""
    from alembic import command

    target = named(to)
    async with _alone(engine, checked_schema(schema), lock_timeout=5.0) as connection:
        await _create_schema(connection, schema)
        await connection.run_sync(lambda bare: command.stamp(config(schema, bare), target, purge=True))


def sql(from_to: str = "base:head", *, schema: str = SCHEMA) -> str:
    """Return the statements that lead `FROM:TO`, up or down, for others to run. `TO` alone starts at base."""
    from alembic import command

    start, _, end = from_to.rpartition(":")
    path = (named(start or BASE), named(end or "head"))
    first, last = (position(step, schema) for step in path)
    offline = config(checked_schema(schema), path=path)
    offline.output_buffer = output = StringIO()
    if first < last:
        command.upgrade(offline, ":".join(path), sql=True)
    elif first > last:
        command.downgrade(offline, ":".join(path), sql=True)
    return output.getvalue()


@asynccontextmanager
async def _alone(engine: AsyncEngine, schema: str, lock_timeout: float) -> AsyncIterator[AsyncConnection]:
    """Open a connection that no other migrator of this schema works beside."""
    async with engine.connect() as connection:
        # Whatever the engine's isolation is: in autocommit a revision could be left half applied.
        await connection.execution_options(isolation_level="READ COMMITTED")
        settings = (
            "SELECT set_config('application_name', 'jobq migrate', false),"
            " set_config('statement_timeout', '0', false), set_config('lock_timeout', :lock_timeout, false)"
        )
        try:
            await connection.execute(text(settings), {"lock_timeout": f"{round(lock_timeout * 1000)}ms"})
            await _lock(connection, schema)
            yield connection
        finally:
            # Not back to the pool: the lock and the settings end with it, however this ended.
            await connection.invalidate()


async def _lock(connection: AsyncConnection, schema: str) -> None:
    """Wait for the lock by asking again, in a new transaction each time.

    A statement that waited would hold a snapshot, which a CREATE INDEX CONCURRENTLY of the one that has the
    lock waits for in turn: PostgreSQL would end one of the two as a deadlock.
    """
    ask = text("SELECT pg_try_advisory_lock(:lock, hashtext(:schema))")
    waiting = False
    while not await connection.scalar(ask, {"lock": LOCK, "schema": schema}):
        await connection.commit()
        if not waiting:
            log.info("waiting for another migrator", extra={"fields": {"schema": schema}})
            waiting = True
        await anyio.sleep(_LOCK_RETRY_S)
    await connection.commit()


async def _create_schema(connection: AsyncConnection, schema: str) -> None:
    # Not IF NOT EXISTS: that needs the right to create schemas even where there is nothing to create.
    exists = text(f"SELECT to_regnamespace('\"{schema}\"') IS NOT NULL")
    if not await connection.scalar(exists):
        await connection.execute(text(f'CREATE SCHEMA "{schema}"'))
    await connection.commit()


async def _recorded(scalar: Callable[[str], Awaitable[Any]], schema: str) -> str | None:
    """Read the version table with `scalar`, which runs one statement and returns one value."""
    if not await scalar(f"SELECT to_regclass('\"{schema}\".alembic_version') IS NOT NULL"):
        return None
    found = await scalar(f'SELECT version_num FROM "{schema}".alembic_version')
    return None if found is None else str(found)


def _scalar(connection: AsyncConnection) -> Callable[[str], Awaitable[Any]]:
    async def scalar(statement: str) -> Any:
        value = await connection.scalar(text(statement))
        await connection.rollback()  # nothing stays open for alembic to find
        return value

    return scalar
