"""What the tests of the relay share: rows for the outbox, a leader to drive by hand, and what it pushed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from jobq.broker.client import connect
from jobq.broker.scripts import Broker
from jobq.model import new_job_id
from jobq.outbox.database import Database
from jobq.relay.relay import Leader
from jobq.settings import RelaySettings

SCHEMA = "jobq"
TURNS = 2_000
"""A relay that takes more turns than this for what a test asks of it will not do it."""


async def add(
    connection: asyncpg.Connection,
    count: int = 1,
    *,
    queue: str = "default",
    priority: int = 2,
    delay_s: float | None = None,
    generation: int = 1,
    ids: Sequence[UUID] = (),
) -> list[UUID]:
    """Insert rows, in a transaction of their own unless one is open. Ids ascend unless given."""
    ids = list(ids) or [UUID(int=new_job_id().int) for _ in range(count)]
    await connection.execute(
        """
        INSERT INTO jobq.outbox (id, queue, task, args, priority, generation, run_at)
        SELECT id, $2, 'task', '{}', $3, $4, clock_timestamp() + make_interval(secs => CAST($5 AS float8))
        FROM unnest(CAST($1 AS uuid[])) AS t (id)
        """,
        ids,
        queue,
        priority,
        generation,
        delay_s,
    )
    return ids


async def delete(connection: asyncpg.Connection, ids: Sequence[UUID]) -> None:
    await connection.execute("DELETE FROM jobq.outbox WHERE id = ANY ($1)", ids)


def entries(ids: Sequence[UUID], generation: int = 1, priority: int = 2) -> list[str]:
    return [f"{id_.hex}:{generation}:{priority}" for id_ in ids]


@asynccontextmanager
async def own_connection(url: str) -> AsyncIterator[asyncpg.Connection]:
    """The application's connection: not the relay's."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        connection.terminate()


@dataclass
class RelayUnderTest:
    """A leader that takes a turn only when it is told to, and both stores."""

    leader: Leader
    broker: Broker
    database: asyncpg.Connection
    connection: asyncpg.Connection
    """The leader's own."""

    async def ready(self, queue: str = "default", priority: int = 2) -> list[str]:
        found = await self.broker.client.lrange(self.broker.keys(queue).ready[priority - 1], 0, -1)
        return [raw.decode() for raw in found]

    async def stats(self, queue: str = "default") -> dict[str, int]:
        found = await self.broker.client.hgetall(self.broker.keys(queue).stats)
        return {name.decode(): int(value) for name, value in found.items()}

    async def turn(self, count: int = 1) -> None:
        for _ in range(count):
            await self.leader.step()

    async def turn_until(self, condition: Callable[[], Any], message: str) -> None:
        """Take turns until `condition`, sync or async, is true."""
        for _ in range(TURNS):
            await self.leader.step()
            reached = condition()
            if await reached if hasattr(reached, "__await__") else reached:
                return
        raise AssertionError(f"After {TURNS} turns: not yet so that {message}")

    async def settle(self, *, also_held: bool = False) -> None:
        """Take turns until nothing is known to be missing from Redis."""
        backlog = self.leader._backlog
        await self.turn_until(lambda: backlog.is_clean and not self.leader._walk.is_repairing, "the backlog is clean")


@asynccontextmanager
async def open_relay(
    database_url: str, redis_url: str, *, relay_database_url: str | None = None, **settings: Any
) -> AsyncIterator[RelayUnderTest]:
    """Start a leader. The defaults leave out what goes by the clock: tests ask for it where they want it."""
    chosen: dict[str, Any] = {"scrub_every": 1e6, "detect_loss_every": 1e6, "beat": 0.001, "scrub_pause": 0.0}
    database = Database.of(relay_database_url or database_url)
    connection = await database.connect(schema=SCHEMA, name="jobq:relay")
    client = connect(redis_url)
    try:
        broker = Broker(client, await database.database_id(connection, SCHEMA))
        leader = await Leader.start(connection, broker, SCHEMA, RelaySettings(**(chosen | settings)))
        async with own_connection(database_url) as own:
            yield RelayUnderTest(leader, broker, own, connection)
    finally:
        connection.terminate()
        await client.aclose()
        await database.close()
