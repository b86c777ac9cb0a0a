"""What PostgreSQL tells of itself, for people who look whether everything is set up as it has to be.

Invariant: reads only. Called by cli's doctor. Calls statement, database.
"""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

import asyncpg
from sqlalchemy.ext.asyncio import AsyncSession

from .database import Database
from .follow import WAKE_LOCK, clock
from .pooler import is_pooled
from .statement import Statement, Transaction

_connections = Statement("connections")
_idle_slots = Statement("idle_slots")
_logged = Statement("logged")
_prepared = Statement("prepared")
_server = Statement("server")
_snapshot_holders = Statement("snapshot_holders")
_table_lockers = Statement("table_lockers")
_vacuums = Statement("vacuums")
_wake_holders = Statement("wake_holders")

_CLOCK_READINGS = 5


class Server(NamedTuple):
    version: str
    version_number: int
    has_fsync: bool


class SnapshotHolder(NamedTuple):
    """What keeps vacuum from its work. Of a hidden session this role may not see the age."""

    kind: Literal["session", "hidden", "slot"]
    name: str
    held_s: float | None


class Prepared(NamedTuple):
    """A transaction that waits for COMMIT PREPARED."""

    gid: str
    owner: str
    age_s: float
    has_jobs: bool
    """Whether it wrote to the outbox."""


class IdleSlot(NamedTuple):
    name: str
    kept_bytes: int


class TableLocker(NamedTuple):
    session: str
    lock: str
    age_s: float


class WakeHolder(NamedTuple):
    """A transaction that enqueued and is still open; without a pid it is a prepared one."""

    pid: int | None
    session: str
    age_s: float | None


class ConnectionLimit(NamedTuple):
    which: str
    allowed: int
    used: int


class Vacuums(NamedTuple):
    runs: bool
    is_left_out: bool


class Skew(NamedTuple):
    """How far another clock is ahead of this host's, and how far off that may be, in seconds."""

    ahead_s: float
    uncertain_s: float


Pooling = Literal["direct", "session", "transaction"]


async def server(tx: Transaction, schema: str) -> Server:
    """The PostgreSQL behind the connection."""
    return Server(*(await _server.on(tx, schema))[0])


async def snapshot_holders(tx: Transaction, schema: str, *, longer_than_s: float) -> list[SnapshotHolder]:
    """What has kept vacuum from removing dead rows for that long, the oldest first."""
    return [SnapshotHolder(*row) for row in await _snapshot_holders.on(tx, schema, longer_than_s=longer_than_s)]


async def prepared(tx: Transaction, schema: str) -> list[Prepared]:
    """Prepared transactions, the oldest first."""
    return [Prepared(*row) for row in await _prepared.on(tx, schema)]


async def idle_slots(tx: Transaction, schema: str) -> list[IdleSlot]:
    """Replication slots that nobody reads."""
    return [IdleSlot(*row) for row in await _idle_slots.on(tx, schema)]


async def table_lockers(tx: Transaction, schema: str, *, longer_than_s: float) -> list[TableLocker]:
    """Who keeps others from writing to the outbox."""
    return [TableLocker(*row) for row in await _table_lockers.on(tx, schema, longer_than_s=longer_than_s)]


async def wake_holders(tx: Transaction, schema: str, *, longer_than_s: float) -> list[WakeHolder]:
    """Who keeps the relay from sleeping."""
    rows = await _wake_holders.on(tx, schema, space=WAKE_LOCK, schema_name=schema, longer_than_s=longer_than_s)
    return [WakeHolder(*row) for row in rows]


async def connection_limits(tx: Transaction, schema: str) -> list[ConnectionLimit]:
    """How many connections there may be, and how many there are."""
    return [ConnectionLimit(*row) for row in await _connections.on(tx, schema)]


async def vacuums(tx: Transaction, schema: str) -> Vacuums:
    """Whether dead rows of the outbox are ever removed."""
    return Vacuums(*(await _vacuums.on(tx, schema))[0])


async def logged(tx: Transaction, schema: str) -> list[str]:
    """The settings that write arguments of jobs to the server's log."""
    return [row[0] for row in await _logged.on(tx, schema)]


async def commits_by_itself(database: Database) -> bool:
    """Whether the application's sessions are in autocommit, where `enqueue()` would refuse to write."""
    async with database.sessions() as session:
        assert isinstance(session, AsyncSession)
        connection = await session.connection()
        assert connection.sync_connection is not None
        return bool(getattr(connection.sync_connection.connection.dbapi_connection, "autocommit", False))


async def skew(connection: asyncpg.Connection, schema: str) -> Skew:
    """Compare the database's clock with this host's, by the quickest of several answers."""
    readings: list[Skew] = []
    for _ in range(_CLOCK_READINGS):
        asked_at = time.time()
        there = (await clock(connection, schema, ahead_s=0)).timestamp()
        readings.append(skew_of(asked_at, there, time.time()))
    return min(readings, key=lambda reading: reading.uncertain_s)


def skew_of(asked_at: float, there: float, answered_at: float) -> Skew:
    """The other clock was read somewhere between question and answer: half of that time is the uncertainty."""
    return Skew(there - (asked_at + answered_at) / 2, (answered_at - asked_at) / 2)


async def pooling(connection: asyncpg.Connection, database: Database) -> Pooling:
    """Whether a pooler stands between, and whether it keeps a session for `connection`, which `database` opened."""
    if not await is_pooled(connection):
        return "direct"
    return "session" if database.keeps_sessions else "transaction"
