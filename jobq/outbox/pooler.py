"""Poolers between jobq and PostgreSQL: whether a connection keeps its session.

A pooler in transaction mode gives every transaction some session of its pool. What one client sets, locks or listens
for in a session is then there for the next, and gone for itself.
Called by database and inspect. Calls nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from uuid import uuid4

import asyncpg

PROBE_S = 2.0
"""A notification that has not come by then does not come."""


async def is_pooled(connection: asyncpg.Connection) -> bool:
    """Whether a pooler stands between: it answers with a process number of its own."""
    return bool(connection.get_server_pid() != await connection.fetchval("SELECT pg_backend_pid()"))


async def keeps_session(connection: asyncpg.Connection, connect: Callable[[], Awaitable[asyncpg.Connection]]) -> bool:
    """Whether what is set on `connection` stays with it, and with nobody else.

    Whether a pooler gives each client a session, a notification from a second connection tells: it finds a listener
    only in a session that was kept for it.
    """
    if not await is_pooled(connection):
        return True
    heard = asyncio.Event()
    channel = f"jobq_probe_{uuid4().hex}"

    def hear(*_: object) -> None:
        heard.set()

    await connection.add_listener(channel, hear)
    other = await connect()
    try:
        await other.fetchval("SELECT pg_notify($1, '')", channel)
        async with asyncio.timeout(PROBE_S):
            await heard.wait()
    except TimeoutError:
        return False
    finally:
        other.terminate()
        await connection.remove_listener(channel, hear)
    return True
