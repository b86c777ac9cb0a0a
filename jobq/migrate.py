"""The versions of jobq's tables: which one is there, which one this release needs, and the way between them.

Invariant: one migrator at a time changes a schema, and a revision and its mark in the version table are one
transaction, so that the tables are always at exactly one revision. A revision is the file
`versions/<revision>_<words>.py`; their order is that of their names.
Called by cli, worker, relay. Calls errors; alembic is loaded when a revision is run, not before.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
from sqlalchemy import text

from .errors import ConfigurationError, SchemaMismatch

if TYPE_CHECKING:
    import asyncpg
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

log = logging.getLogger(__name__)

SCHEMA = "jobq"
"""The schema of the tables where nothing else was said."""

_LOCK = 0x6A6F626D
"""The first half of the migrators' advisory lock; the second is a hash of the schema."""
_LOCK_RETRY_S = 0.2
_BASE = "base"


class Revision(NamedTuple):
    """One step in the life of the tables."""

    id: str
    after: str | None
    title: str
    drops: tuple[str, ...]
    """Tables whose rows are lost when this revision is taken back."""


def checked_schema(name: str) -> str:
    """Return `name` if it can be the schema of jobq. Raises ConfigurationError."""
    if re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name) is None:
        raise ConfigurationError(
            f"{name!r} cannot be the schema of jobq: at most 63 of a-z, 0-9 and _, and no digit first"
        )
    return name


def scripts(package: Path = Path(__file__).parent) -> Path:
    """Find the revisions: inside the package where it was installed, beside it in a checkout."""
    for folder in (package / "migrations", package.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise ConfigurationError(f"jobq's migrations are missing beside {package}: install jobq again")


def revisions() -> list[str]:
    """List every revision that this release knows, oldest first, without loading any."""
    return sorted(file.name[:9] for file in (scripts() / "versions").glob("jobq_????_*.py"))


def heads() -> list[str]:
    """List the newest revisions. There is one: the chain never forks."""
    return revisions()[-1:]


def history() -> list[Revision]:
    """List every revision of this release, oldest first."""
    from alembic.script import ScriptDirectory

    directory: ScriptDirectory = ScriptDirectory.from_config(_config(SCHEMA))
    found = []
    for id_ in revisions():
        script = directory.get_revision(id_)
        after = script.down_revision
        assert after is None or isinstance(after, str)
        found.append(Revision(id_, after, script.doc, script.module.DROPS))
    return found


async def check(connection: asyncpg.Connection[Any], schema: str = SCHEMA) -> None:
    """Raise SchemaMismatch unless the tables are at the revision this release needs. Two short reads."""
    problem = mismatch(await _recorded(connection.fetchval, checked_schema(schema)), schema)
    if problem is not None:
        raise SchemaMismatch(problem)


def mismatch(found: str | None, schema: str = SCHEMA) -> str | None:
    """Say what is wrong with tables at revision `found`, and the remedy; None if this release fits them."""
    needed = revisions()[-1]
    if found == needed:
        return None
    if found is None:
        return f"the tables of jobq are missing in schema {schema!r}: run `jobq migrate upgrade`"
    if found in revisions():
        return f"the tables in schema {schema!r} are at {found}, not {needed}: run `jobq migrate upgrade`"
    return (
        f"the tables in schema {schema!r} are at {found}, and this jobq knows {needed} at most: "
        "it is older than the tables, so upgrade jobq"
    )


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

    target = _revision(to)
    async with _alone(engine, checked_schema(schema), lock_timeout) as connection:
        found = await _recorded(_scalar(connection), schema)
        if _position(found, schema) >= _position(target, schema):
            return
        await _create_schema(connection, schema)
        await connection.run_sync(lambda bare: command.upgrade(_config(schema, bare), target))


async def downgrade(engine: AsyncEngine, to: str, *, schema: str = SCHEMA, lock_timeout: float = 5.0) -> None:
    """Take the tables back to revision `to`, or away with `base`. `losses()` says what is lost with them."""
    from alembic import command

    target = _revision(to)
    async with _alone(engine, checked_schema(schema), lock_timeout) as connection:
        found = await _recorded(_scalar(connection), schema)
        if _position(found, schema) < _position(target, schema):
            raise ConfigurationError(f"the tables are at {found or _BASE} already, which is before {target}")
        if _position(found, schema) > _position(target, schema):
            await connection.run_sync(lambda bare: command.downgrade(_config(schema, bare), target))
        if target == _BASE:
            await connection.execute(text(f'DROP TABLE IF EXISTS "{schema}".alembic_version'))
            await connection.commit()


async def losses(engine: AsyncEngine, to: str, *, schema: str = SCHEMA) -> dict[str, int]:
    """Count the rows, by table, that a downgrade to revision `to` would drop."""
    target = _position(_revision(to), schema)
    async with engine.connect() as connection:
        found = await _recorded(_scalar(connection), checked_schema(schema))
        undone = history()[target : _position(found, schema)]
        tables = [table for revision in undone for table in revision.drops]
        counted = {table: text(f'SELECT count(*) FROM "{schema}".{table}') for table in tables}
        return {table: await connection.scalar(count) or 0 for table, count in counted.items()}


async def stamp(engine: AsyncEngine, to: str, *, schema: str = SCHEMA) -> None:
    """Record revision `to` as that of the tables, whatever was recorded before, and touch nothing else."""
    from alembic import command

    target = _revision(to)
    async with _alone(engine, checked_schema(schema), lock_timeout=5.0) as connection:
        await _create_schema(connection, schema)
        await connection.run_sync(lambda bare: command.stamp(_config(schema, bare), target, purge=True))


def sql(from_to: str = "base:head", *, schema: str = SCHEMA) -> str:
    """Return the statements that lead `FROM:TO`, up or down, for others to run. `TO` alone starts at base."""
    from alembic import command

    start, _, end = from_to.rpartition(":")
    path = (_revision(start or _BASE), _revision(end or "head"))
    first, last = (_position(step, schema) for step in path)
    config = _config(checked_schema(schema), path=path)
    config.output_buffer = output = StringIO()
    if first < last:
        command.upgrade(config, ":".join(path), sql=True)
    elif first > last:
        command.downgrade(config, ":".join(path), sql=True)
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
    while not await connection.scalar(ask, {"lock": _LOCK, "schema": schema}):
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


def _revision(name: str) -> str:
    """Resolve `head`, `base` or a revision's own name."""
    named = {"head": revisions()[-1], _BASE: _BASE, **{id_: id_ for id_ in revisions()}}
    if name not in named:
        raise ConfigurationError(f"no revision {name!r}: there are {', '.join(named)}")
    return named[name]


def _position(revision: str | None, schema: str) -> int:
    """Count the revisions up to and with this one. Raises SchemaMismatch for one of a later release."""
    order = [_BASE, *revisions()]
    if (revision or _BASE) not in order:
        raise SchemaMismatch(mismatch(revision, schema))
    return order.index(revision or _BASE)


def _config(schema: str, connection: Connection | None = None, path: tuple[str, str] | None = None) -> Config:
    """Say to alembic, and through it to env.py, where the revisions are and where they go."""
    from alembic.config import Config

    def log_step(*, step: Any, **_: Any) -> None:
        phrase = "stamped" if step.is_stamp else "applied" if step.is_upgrade else "taken back"
        log.info("revision %s", phrase, extra={"fields": {"revision": step.up_revision_id, "schema": schema}})

    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    config.attributes.update(schema=schema, connection=connection, path=path, on_apply=log_step)
    return config
