"""What the demo reads of both stores, to see for itself what became of the jobs.

Invariant: nothing here writes, but for FLUSHALL. Called by faults, verdict and demo. Calls outbox and broker.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Self
from uuid import UUID

import anyio

from .. import migrate
from ..broker.client import connect
from ..broker.scripts import Broker
from ..model import Entry
from ..outbox.database import Database
from ..outbox.follow import LEADER_LOCK
from ..outbox.statement import AsyncpgConnection

SCHEMA = migrate.SCHEMA


class InRedis(NamedTuple):
    """Entries in Redis at one moment."""

    ready: int
    working: int


class Stores:
    """PostgreSQL and Redis, as an outsider sees them."""

    def __init__(self, connection: AsyncpgConnection, broker: Broker, queues: Sequence[str]):
        self._connection = connection
        self._turn = anyio.Lock()
        self._broker = broker
        self._queues = queues

    @classmethod
    @asynccontextmanager
    async def open(cls, database_url: str, redis_url: str, queues: Sequence[str]) -> AsyncIterator[Self]:
        """Connect to both, and create jobq's tables unless they are there."""
        database = Database.of(database_url)
        client = connect(redis_url)
        try:
            await migrate.upgrade(database.engine, schema=SCHEMA)
            connection = await database.connect(schema=SCHEMA, name="jobq:demo")
            try:
                yield cls(connection, Broker(client, await database.database_id(connection, SCHEMA)), queues)
            finally:
                connection.terminate()
        finally:
            with anyio.CancelScope(shield=True):
                await client.aclose()
                await database.close()

    async def rows(self, query: str, *values: Any) -> list[Any]:
        async with self._turn:
            found: list[Any] = await self._connection.fetch(query, *values)
            return found

    async def value(self, query: str, *values: Any) -> Any:
        return (await self.rows(query, *values))[0][0]

    async def waiting(self) -> set[UUID]:
        """The jobs that are committed and not done."""
        return {row["id"] for row in await self.rows(f"SELECT id FROM {SCHEMA}.outbox")}

    async def are_done(self, jobs: Collection[UUID]) -> bool:
        """Whether none of these jobs has a row any more: the row is the job."""
        query = f"SELECT NOT EXISTS (SELECT FROM {SCHEMA}.outbox WHERE id = ANY($1))"
        return bool(await self.value(query, list(jobs)))

    async def leading_session(self) -> int | None:
        """The backend that holds the relays' lock."""
        query = "SELECT max(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = CAST($1 AS oid)"
        found: int | None = await self.value(query, LEADER_LOCK)
        return found

    async def tokens(self) -> list[bytes | None]:
        """What the leading relay left at its last push, queue by queue."""
        return [await self._broker.token(queue) for queue in self._queues]

    async def worker_of(self, pid: int) -> str | None:
        """The name that the worker with this pid goes by in Redis."""
        found = await self._broker.client.hgetall(self._broker.keys(self._queues[0]).workers)
        return next((name.decode() for name, about in found.items() if json.loads(about)["pid"] == pid), None)

    async def in_hand(self, worker: str) -> dict[str, list[UUID]]:
        """The jobs in one worker's working lists, by queue."""
        lists = {queue: await self._broker.working(queue, worker) for queue in self._queues}
        return {queue: [entry.id for entry in map(Entry.parse, raws) if entry] for queue, raws in lists.items()}

    async def in_redis(self) -> InRedis:
        """Count what waits and what runs."""
        ready, working = await self._lists()
        return InRedis(*_counted(await self._lengths([*ready, *working]), len(ready)))

    async def flush(self) -> InRedis:
        """Empty Redis. Returns what was in it at that very moment."""
        ready, working = await self._lists()
        return InRedis(*_counted(await self._lengths([*ready, *working], flush=True), len(ready)))

    async def left_in_redis(self) -> int:
        """Count everything that Redis still holds of jobs: entries in lists, and ids it knows."""
        lists: list[str] = []
        known = 0
        for queue in self._queues:
            keys = self._broker.keys(queue)
            known += await self._broker.client.hlen(keys.known)
            lists += [*keys.ready, *[name async for name in self._scan(keys.working("*"))]]
            lists += [name async for name in self._scan(keys.parked("*"))]
        return known + sum(await self._lengths(lists))

    async def _lists(self) -> tuple[list[str], list[str]]:
        ready = [name for queue in self._queues for name in self._broker.keys(queue).ready]
        working = [name for queue in self._queues async for name in self._scan(self._broker.keys(queue).working("*"))]
        return ready, working

    async def _scan(self, pattern: str) -> AsyncIterator[str]:
        async for name in self._broker.client.scan_iter(match=pattern, count=1000):
            yield name.decode()

    async def _lengths(self, lists: list[str], *, flush: bool = False) -> list[int]:
        """The lengths of lists at one moment, which is the last one before a FLUSHALL."""
        async with self._broker.client.pipeline(transaction=True) as together:
            for name in lists:
                together.llen(name)
            if flush:
                together.flushall()
            found: list[int] = await together.execute()
        return found[: len(lists)]


def _counted(lengths: list[int], ready: int) -> tuple[int, int]:
    return sum(lengths[:ready]), sum(lengths[ready:])
