"""Where the application keeps its data, and jobq's own connections to it.

Invariant: every connection jobq opens for itself leads to the primary of the one database that it was opened
for first, runs at read committed, belongs to no pool, and sets nothing in a session that others use after it.
Called by relay, worker, cli. Calls hosts and pooler.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any
from uuid import UUID

import asyncpg
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.util import greenlet_spawn

from ..errors import ConfigurationError, SchemaMismatch, WrongDatabase
from .hosts import Hosts, miss_soon
from .pooler import keeps_session

__all__ = ["UNAVAILABLE", "Database", "PoolTimeout", "hide_values", "is_unavailable"]

UNAVAILABLE: tuple[type[Exception], ...] = (
    OSError,
    asyncio.TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,
    PoolTimeout,
)
"""What asyncpg and SQLAlchemy's pool raise when PostgreSQL cannot be had just now; trying again is the remedy."""

_CONNECT_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 2.0
_SESSION = {
    # At any other level a poll, a pre-read or a completion would see an old snapshot (MUST).
    "default_transaction_isolation": "read committed",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "60s",
    # The outbox fills and empties faster than statistics follow; every statement of ours is meant for an index.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}
_PLANNED_ONCE = {"plan_cache_mode": "force_generic_plan"}
"""To plan a look-up by id anew costs PostgreSQL more than the look-up."""
_ENDLESS = {"idle_in_transaction_session_timeout": "0"}
_POOL_FOR_URL = {"pool_size": 10, "max_overflow": 20}
"""For `ctx.complete()` alone, whose transactions are short: jobs take turns, whatever the concurrency, and several
processes fit into PostgreSQL's 100 connections."""
_CACHE_SIZE = "prepared_statement_cache_size"
"""SQLAlchemy's word for it, so that one URL serves both."""
_STATEMENTS_KEPT = 100

_KEEP = "BEGIN; UNLISTEN *; COMMIT; BEGIN ISOLATION LEVEL READ COMMITTED"
"""A pooler leaves a session to whoever is in a transaction, and closes it if that one dies there. In one message, so
that it is one session: who listens (it may be left from our probe) and stays in a transaction holds up the
notifications of the whole server, until none fit."""

_LOST_SESSION = (
    "the database URL leads through a pooler in transaction mode, where a lock does not stay with its connection: use "
    "a URL that leads to PostgreSQL itself, or to the pooler in session mode"
)


def is_unavailable(error: BaseException) -> bool:
    """Whether `error`, through SQLAlchemy or not, says that PostgreSQL cannot be had just now.

    In a failover the address may lead to the replica before that is the primary.
    """
    if isinstance(error, DBAPIError):
        is_lost = error.connection_invalidated or isinstance(error, (OperationalError, InterfaceError))
        # What goes wrong while SQLAlchemy connects is translated twice, and not marked as a lost connection.
        return is_lost or isinstance(getattr(error.orig, "__cause__", None), UNAVAILABLE)
    return isinstance(error, (*UNAVAILABLE, WrongDatabase))


def hide_values(error: BaseException | None) -> None:
    """Have SQLAlchemy's errors say a statement without its parameters: they are arguments of jobs, as often as not."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, StatementError):
            one.hide_parameters = True
        waiting += [one.__cause__, one.__context__]
        waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else ()


class Database:
    """The application's database, as given to `JobQ(database=...)`.

    `engine` and `sessions` are the application's own where it gave them. `connect()` opens connections of
    jobq's own with the same credentials, and refuses replicas and other databases.
    """

    def __init__(self, engine: AsyncEngine, sessions: async_sessionmaker[AsyncSession], *, owned: bool):
        self.engine = engine
        self.sessions = sessions
        self.is_own = owned
        """Whether the engine was made here, from a URL."""
        self._database_id: UUID | None = None
        self._keeps_sessions: bool | None = None

    @classmethod
    def of(cls, value: str | AsyncEngine | async_sessionmaker[Any]) -> Database:
        """Take a URL, an engine or a sessionmaker. Raises ConfigurationError. Opens nothing."""
        if isinstance(value, str):
            engine = _engine_for(value)
            return cls(engine, async_sessionmaker(engine, expire_on_commit=False), owned=True)
        if isinstance(value, AsyncEngine):
            _refuse_other_drivers(value)
            return cls(value, async_sessionmaker(value, expire_on_commit=False), owned=False)
        if isinstance(value, async_sessionmaker):
            bind = value.kw.get("bind")
            bind = bind.engine if isinstance(bind, AsyncConnection) else bind
            if not isinstance(bind, AsyncEngine):
                raise ConfigurationError("JobQ(database=...): this async_sessionmaker is not bound to an engine")
            _refuse_other_drivers(bind)
            return cls(bind, value, owned=False)
        raise ConfigurationError(
            f"JobQ(database=...) takes a PostgreSQL URL, an AsyncEngine or an async_sessionmaker, "
            f"not {type(value).__name__}"
        )

    @property
    def keeps_sessions(self) -> bool:
        """Whether what is set in a connection of `connect()` stays there; known once one was opened."""
        return self._keeps_sessions is not False

    @property
    def pool_limit(self) -> int | None:
        """Connections that the engine hands out at most at one time; None for no limit."""
        pool = self.engine.sync_engine.pool
        overflow = getattr(pool, "_max_overflow", -1)
        size = getattr(pool, "size", None)
        return None if size is None or overflow < 0 else int(size()) + int(overflow)

    async def connect(
        self, *, schema: str, name: str, holds_locks: bool = False, repeats: bool = False
    ) -> asyncpg.Connection:
        """Open a connection of jobq's own on the primary. `name` is what pg_stat_activity shows.

        On one that `repeats` its statements PostgreSQL plans each of them once, where session and statement are kept:
        for statements that look rows up by id, whose plan is the same however many there are.
        One that `holds_locks` keeps them until it is closed. Where a pooler keeps no sessions, it is handed over in
        a transaction that is never ended: write nothing through it, and LISTEN does nothing there.

        Raises WrongDatabase for a replica or another database than the first time (nothing may be dropped on
        the word of either), SchemaMismatch when the tables are missing, and asyncpg's errors.
        """
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            connection = await self._open()
            session = _SESSION | {"application_name": name} | (_PLANNED_ONCE if repeats else {})
            try:
                if await self._is_session_kept(connection):
                    await _set(connection, session, is_local=False)
                elif holds_locks:
                    await connection.execute(_KEEP)
                    await _set(connection, session | _ENDLESS, is_local=True)
                else:
                    await _require_read_committed(connection)
                await self._check_identity(connection, schema)
            except BaseException as error:
                connection.terminate()
                _explain_lost_statements(error)
                raise
        return connection

    async def require_sessions(self) -> None:
        """Raise ConfigurationError where a pooler keeps no session for a connection: its locks would stay behind."""
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            connection = await self._open()
            try:
                if not await self._is_session_kept(connection):
                    raise ConfigurationError(_LOST_SESSION)
            finally:
                connection.terminate()

    async def database_id(self, connection: asyncpg.Connection, schema: str) -> UUID:
        """The identity of the database behind `connection`; part of every Redis key."""
        try:
            found = await connection.fetchval(f'SELECT database_id FROM "{schema}".meta')
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            found = None
        if found is None:
            raise SchemaMismatch(f"the tables of jobq are missing in schema {schema!r}: run `jobq migrate upgrade`")
        return UUID(bytes=found.bytes)

    async def close(self) -> None:
        """Close the engine if it was made here; the application's own stays as it is."""
        while self.is_own:
            # One that leads nowhere any more would be asked to say goodbye, for ever; the next try finds it gone.
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self.engine.dispose()
                return

    async def _open(self) -> asyncpg.Connection:
        try:
            # Made as the application's pool makes them, and not out of it: jobs that fill it, or wait for it, hold
            # up no relay and no settling.
            pooled = await greenlet_spawn(self.engine.sync_engine.pool.recreate().connect)
        except Exception as error:
            # SQLAlchemy wraps what the driver raises while it connects: a server that starts or stops, say.
            _explain_lost_statements(error)
            cause = error.__cause__
            if cause is not None and isinstance(cause, (asyncpg.PostgresError, *UNAVAILABLE)):
                raise cause from None
            raise
        connection: asyncpg.Connection | None = pooled.driver_connection
        pooled.detach()
        assert connection is not None
        miss_soon(connection)
        return connection

    async def _is_session_kept(self, connection: asyncpg.Connection) -> bool:
        if self._keeps_sessions is None:
            self._keeps_sessions = await keeps_session(connection, self._open)
        return self._keeps_sessions

    async def _check_identity(self, connection: asyncpg.Connection, schema: str) -> None:
        if await connection.fetchval("SELECT pg_is_in_recovery()"):
            raise WrongDatabase(
                "the database URL leads to a replica (pg_is_in_recovery() is true): jobq reads the outbox on the "
                "primary only, since a row that a replica does not show yet would be taken for done"
            )
        found = await self.database_id(connection, schema)
        if self._database_id not in (None, found):
            raise WrongDatabase(
                f"the database URL leads to another database than at the start ({found}, not {self._database_id}): "
                "restart this process if that is meant"
            )
        self._database_id = found


async def _set(connection: asyncpg.Connection, settings: dict[str, str], *, is_local: bool) -> None:
    query = (
        "SELECT set_config(name, value, $3) FROM unnest(CAST($1 AS text[]), CAST($2 AS text[])) AS given (name, value)"
    )
    await connection.fetch(query, list(settings), list(settings.values()), is_local)


def _explain_lost_statements(error: BaseException) -> None:
    """Raise ConfigurationError if a prepared statement was not there any more, or there already."""
    if getattr(getattr(error, "orig", error), "sqlstate", None) in ("26000", "42P05"):
        raise ConfigurationError(
            "the database URL leads through a pooler that mixes up prepared statements: add "
            "prepared_statement_cache_size=0 to the URL, or statement_cache_size=0 to connect_args of your engine"
        ) from error


async def _require_read_committed(connection: asyncpg.Connection) -> None:
    # What would be set here would meet the application's transactions, and not ours.
    level = await connection.fetchval("SELECT current_setting('default_transaction_isolation')")
    if level != _SESSION["default_transaction_isolation"]:
        raise ConfigurationError(
            f"the isolation level is {level} by default, and behind a pooler in transaction mode jobq cannot change "
            "it: ALTER ROLE ... SET default_transaction_isolation = 'read committed', or use a direct URL"
        )


def _engine_for(url: str) -> AsyncEngine:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("postgresql", "postgres", "postgresql+asyncpg"):
        raise ConfigurationError(
            f"the database URL must begin with postgresql://, not {scheme if separator else '...'}"
        )
    rest, cache_size = _without_cache_size(rest)
    # asyncpg reads the URL itself, so that libpq's parameters (sslmode, host, ...) mean what they say. Without a cache
    # it gives statements no names either, so that those of two processes cannot meet.
    hosts = Hosts(rest, timeout_s=_CONNECT_TIMEOUT_S, statement_cache_size=cache_size)

    async def open_connection() -> asyncpg.Connection:
        connection = await hosts.open()
        miss_soon(connection)
        return connection

    return create_async_engine("postgresql+asyncpg://", async_creator=open_connection, **_POOL_FOR_URL)


def _without_cache_size(rest: str) -> tuple[str, int]:
    """Take the one parameter out that is not libpq's: how many prepared statements a connection keeps."""
    place, _, query = rest.partition("?")
    parameters = [parameter for parameter in query.split("&") if parameter]
    given = [parameter for parameter in parameters if parameter.partition("=")[0] == _CACHE_SIZE]
    if not given:
        return rest, _STATEMENTS_KEPT
    size = given[-1].partition("=")[2]
    if not size.isdecimal():
        raise ConfigurationError(f"{_CACHE_SIZE} in the database URL must be a number, 0 for none")
    left = "&".join(parameter for parameter in parameters if parameter not in given)
    return f"{place}?{left}" if left else place, int(size)


def _refuse_other_drivers(engine: AsyncEngine) -> None:
    if engine.dialect.name != "postgresql" or engine.dialect.driver != "asyncpg":
        raise ConfigurationError(
            f"jobq works on PostgreSQL through asyncpg, not {engine.dialect.name}+{engine.dialect.driver}: "
            "use postgresql+asyncpg:// for the engine you give to JobQ(database=...)"
        )
