"""What the relay asks of PostgreSQL: new rows since a snapshot, rows that come due, pages of the walk.

Invariant: reads only, but for the janitor's deletes at the end; and every question has a deadline. Called by
relay. Calls statement.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from .statement import Statement

LEADER_LOCK = 0x6A6F6271
"""The first half of the leader's advisory lock; the second, here and below, is the hash of the schema."""
WAKE_LOCK = 0x6A6F6277
"""K: writers share it, and the leader holds it alone while it sleeps. The trigger on outbox has the same number."""
_CHANNEL = "jobq"

ANSWER_TIMEOUT_S = 30.0
"""A connection that says nothing for this long leads nowhere any more."""
TIDY_LOCK_TIMEOUT_S = 2.0
"""How long the janitor waits for a table that somebody has locked."""

_keep_alive = Statement("keep_alive")
_snapshot = Statement("snapshot")
_poll = Statement("poll")
_timers = Statement("timers")
_clock = Statement("clock")
_page = Statement("page")
_reread = Statement("reread")
_try_lock = Statement("try_lock")
_unlock = Statement("unlock")
_end_leader = Statement("end_leader")
_begin_tidy = Statement("begin_tidy")
_tidy = (Statement("tidy_keys"), Statement("tidy_steps"))
_tidy_dead = Statement("tidy_dead")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one poll could see: everything below `xmax` except the transactions in `xip`."""

    xmax: int
    xip: Sequence[int]


@dataclass(frozen=True, slots=True)
class NewRows:
    """New rows of one ready list, in id order; the three columns run side by side."""

    queue: str
    priority: int
    entries: Sequence[str]
    again: Sequence[bool]
    """Whether the row is a later generation, or had a run_at: those may go beyond the limit of their list."""
    delays: Sequence[float | None]
    """Seconds until due; None or 0 and less: now."""


class Timer(NamedTuple):
    queue: str
    priority: int
    entry: str
    delay_s: float
    run_at: datetime


@dataclass(frozen=True, slots=True)
class Page:
    """Rows that follow each other by id."""

    lists: dict[tuple[str, int], list[tuple[UUID, int]]]
    """By queue and priority the id and generation of those that are due, in id order."""
    last: UUID
    """The id behind which the next page begins."""
    is_empty: bool
    is_last: bool


async def keep_alive(connection: asyncpg.Connection, schema: str) -> None:
    """Let the server end this session, and its lock, soon after this machine is gone."""
    await _ask(_keep_alive, connection, schema)


async def take_snapshot(connection: asyncpg.Connection, schema: str) -> tuple[Snapshot, datetime]:
    """Where a relay begins, and the database's clock at that moment."""
    ((xmax, xip, now),) = await _ask(_snapshot, connection, schema)
    return Snapshot(xmax, xip), now


async def poll(
    connection: asyncpg.Connection, schema: str, since: Snapshot, *, horizon: datetime, limit: int
) -> tuple[Snapshot, list[NewRows], bool]:
    """Rows that `since` did not show, the new snapshot, and whether `limit` cut the answer short.

    A row is answered at least once by the polls that follow the commit that made it, however late that was.
    """
    rows = await _ask(_poll, connection, schema, xmax=since.xmax, xip=since.xip, horizon=horizon, limit=limit)
    snapshot = Snapshot(rows[0][0], rows[0][1])
    lists = [NewRows(*row[2:]) for row in rows if row[2] is not None]
    return snapshot, lists, sum(len(new.entries) for new in lists) >= limit


async def timers(
    connection: asyncpg.Connection, schema: str, *, after: datetime, horizon: datetime, limit: int
) -> list[Timer]:
    """Rows that come due after `after` and up to `horizon`, soonest first."""
    rows = await _ask(_timers, connection, schema, after=after, horizon=horizon, limit=limit)
    return [Timer._make(row) for row in rows]


async def clock(connection: asyncpg.Connection, schema: str, *, ahead_s: float) -> datetime:
    """The database's clock, `ahead_s` seconds from now."""
    ((at,),) = await _ask(_clock, connection, schema, ahead_s=ahead_s)
    return at  # type: ignore[no-any-return]


async def page(connection: asyncpg.Connection, schema: str, *, after: UUID, overdue_s: float, limit: int) -> Page:
    """The next `limit` rows by id, of which those count as due that have been so for `overdue_s` seconds."""
    rows = await _ask(_page, connection, schema, after=after, overdue_s=overdue_s, limit=limit)
    lists: dict[tuple[str, int], list[tuple[UUID, int]]] = defaultdict(list)
    for id_, generation, queue, priority, is_due in rows:
        if is_due:
            lists[queue, priority].append((id_, generation))
    last = rows[-1][0] if rows else after
    return Page(dict(lists), last, is_empty=not rows, is_last=len(rows) < limit)


async def reread(connection: asyncpg.Connection, schema: str, ids: Sequence[UUID]) -> list[str]:
    """The entries of those of `ids` that are still in the outbox and due, as they are now, in id order."""
    ((entries,),) = await _ask(_reread, connection, schema, ids=ids)
    return entries  # type: ignore[no-any-return]


async def try_lead(connection: asyncpg.Connection, schema: str) -> bool:
    """Try for the leader's session lock, without waiting."""
    ((leads,),) = await _ask(_try_lock, connection, schema, space=LEADER_LOCK, schema_name=schema)
    return bool(leads)


async def listen(connection: asyncpg.Connection, schema: str, woken: Callable[[], None]) -> None:
    """Call `woken` after every commit of rows of this schema that happened while the relay slept."""

    def hear(_connection: object, _pid: int, _channel: str, payload: object) -> None:
        if payload == schema:
            woken()

    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        await connection.add_listener(_CHANNEL, hear)


async def try_sleep(connection: asyncpg.Connection, schema: str) -> bool:
    """Try for K: refused while a transaction that wrote is not yet over.

    A statement of its own (MUST): what was committed before it is visible to the next one, not to this one.
    """
    ((granted,),) = await _ask(_try_lock, connection, schema, space=WAKE_LOCK, schema_name=schema)
    return bool(granted)


async def end_sleep(connection: asyncpg.Connection, schema: str) -> None:
    """Give K back."""
    await _ask(_unlock, connection, schema, space=WAKE_LOCK, schema_name=schema)


async def end_leader(connection: asyncpg.Connection, schema: str) -> int:
    """End the sessions that hold the leader's lock. Works for sessions of the same role."""
    ((ended,),) = await _ask(_end_leader, connection, schema, space=LEADER_LOCK, schema_name=schema)
    return int(ended)


async def _ask(statement: Statement, connection: asyncpg.Connection, schema: str, **values: Any) -> Sequence[Any]:
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        return await statement.on(connection, schema, **values)


async def tidy(connection: asyncpg.Connection, schema: str, *, dead_kept_s: float, limit: int) -> int:
    """Delete at most `limit` rows of each kind that have outlived their use, or none; returns how many went.

    After an error the connection is of no more use: a ROLLBACK might wait for ever for its answer.
    """
    gone: list[Any] = []
    transaction = connection.transaction()
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        await transaction.start()
    lock = f"{round(1000 * TIDY_LOCK_TIMEOUT_S)}ms"
    # The server ends what takes too long: it would not notice that nobody waits for it any more.
    await _ask(_begin_tidy, connection, schema, lock=lock, longest=f"{round(1000 * ANSWER_TIMEOUT_S / 2)}ms")
    for statement in _tidy:
        gone += await _ask(statement, connection, schema, limit=limit)
    # Crash here: nothing was deleted.
    gone += await _ask(_tidy_dead, connection, schema, kept_s=dead_kept_s, limit=limit)
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        await transaction.commit()
    return len(gone)
