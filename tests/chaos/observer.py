"""What an outsider sees in both stores. It writes nothing of jobq's, and waits for a store that is away."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from uuid import UUID

import asyncpg

from jobq.broker.client import UNAVAILABLE, connect
from jobq.broker.scripts import Broker
from jobq.model import Entry
from jobq.outbox.database import is_unavailable

T = TypeVar("T")
Key = tuple[UUID, int]
"""(job id, generation)"""

NAME = "chaos:observer"
PATIENCE_S = 60.0
_NAMED = {"application_name": NAME}


class Observer:
    """Both stores, from outside."""

    def __init__(self, database_url: str, redis_url: str, queues: Sequence[str]):
        self._database_url = database_url
        self._queues = queues
        self._connection: asyncpg.Connection | None = None
        self._turn = asyncio.Lock()
        self._held: asyncpg.Connection | None = None
        self._held_since = 0.0
        self.redis = connect(redis_url)
        self.broker: Broker

    @classmethod
    @asynccontextmanager
    async def open(cls, database_url: str, redis_url: str, queues: Sequence[str]) -> AsyncIterator[Observer]:
        observer = cls(database_url, redis_url, queues)
        found = await observer.value("SELECT database_id FROM jobq.meta")
        observer.broker = Broker(observer.redis, UUID(bytes=found.bytes))
        try:
            yield observer
        finally:
            await observer.redis.aclose()
            observer.let_go()
            if observer._connection is not None:
                observer._connection.terminate()

    async def rows(self, query: str, *values: Any) -> list[Any]:
        """Ask PostgreSQL, as often as it takes."""

        async def ask() -> list[Any]:
            async with self._turn:
                if self._connection is None or self._connection.is_closed():
                    self._connection = await asyncpg.connect(self._database_url, server_settings=_NAMED)
                found: list[Any] = await self._connection.fetch(query, *values)
                return found

        return await _patiently(ask)

    async def value(self, query: str, *values: Any) -> Any:
        return (await self.rows(query, *values))[0][0]

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[asyncpg.Connection]:
        """A transaction on a connection of its own, for orders that a fault brings along."""
        connection = await _patiently(lambda: asyncpg.connect(self._database_url))
        try:
            async with connection.transaction():
                yield connection
        finally:
            connection.terminate()

    async def hold(self) -> float:
        """See to it that a transaction is open that has written and has a snapshot. Returns for how long it is."""
        if self._held is None or self._held.is_closed():
            self._held = await _patiently(lambda: asyncpg.connect(self._database_url, server_settings=_NAMED))
            await self._held.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT pg_current_xact_id()")
            self._held_since = time.monotonic()
        return time.monotonic() - self._held_since

    def let_go(self) -> None:
        if self._held is not None:
            self._held.terminate()

    async def due(self) -> list[Key]:
        """The jobs that are committed and due, and not done."""
        query = "SELECT id, generation FROM jobq.outbox WHERE run_at IS NULL OR run_at <= clock_timestamp()"
        return [(row[0], row[1]) for row in await self.rows(query)]

    async def left_of(self, keys: Sequence[Key]) -> list[Key]:
        """Those of these jobs of which no run has ended since: done, failed, or snoozed."""
        query = (
            "SELECT id, seen FROM jobq.outbox JOIN unnest($1::uuid[], $2::int[]) AS before (id, seen) USING (id)"
            " WHERE generation = seen OR crashes > 0"
        )
        rows = await self.rows(query, [id_ for id_, _ in keys], [generation for _, generation in keys])
        return [(row[0], row[1]) for row in rows]

    async def whereabouts(self, keys: Sequence[Key], most: int = 5) -> str:
        """What both stores hold of some jobs, for whoever looks into a run that failed."""
        lines = []
        for id_, _ in keys[:most]:
            rows = await self.rows("SELECT * FROM jobq.outbox WHERE id = $1", id_)
            history = await self.rows("SELECT * FROM chaos.history WHERE job_id = $1 ORDER BY at", id_)
            lines += [f"  {dict(row)}" for row in (*rows, *history)]
            async for key in self.redis.scan_iter(count=1000):
                if key.endswith(b":known"):
                    lines.append(f"  {key.decode()}: {await self.redis.hget(key, id_.hex)}")
                elif await self.redis.type(key) == b"list":
                    held = [raw for raw in await self.redis.lrange(key, 0, -1) if raw.startswith(id_.hex.encode())]
                    lines += [f"  {key.decode()}: {raw.decode()}" for raw in held]
        return "\n".join(lines)

    async def at_generation(self, keys: Sequence[Key]) -> list[Key]:
        """Those whose rows are at that very generation."""
        rows = await self.rows("SELECT id, generation FROM jobq.outbox WHERE id = ANY($1)", [id_ for id_, _ in keys])
        return sorted({(row[0], row[1]) for row in rows} & set(keys))

    async def names(self) -> dict[int, str]:
        """What the workers go by in Redis, by their pids."""

        async def ask() -> dict[int, str]:
            found: dict[int, str] = {}
            for queue in self._queues:
                workers = await self.redis.hgetall(self.broker.keys(queue).workers)
                found |= {json.loads(about)["pid"]: name.decode() for name, about in workers.items()}
            return found

        return await _patiently(ask)

    async def in_hand(self, *workers: str) -> list[Key]:
        """What stands in the working lists of these workers; of all when none is named."""

        async def ask() -> list[Key]:
            found: list[Key] = []
            for queue in self._queues:
                keys = self.broker.keys(queue)
                names = workers or [name.decode() for name in await self.redis.hkeys(keys.beats)]
                for name in names:
                    raws = await self.redis.lrange(keys.working(name), 0, -1)
                    found += [entry.key for entry in map(Entry.parse, raws) if entry is not None]
            return found

        return await _patiently(ask)

    async def inside_complete(self) -> set[str]:
        """The names of the workers that have a transaction of `ctx.complete()` open at this moment."""
        query = (
            "SELECT substr(application_name, 6) FROM pg_stat_activity"
            " WHERE application_name LIKE 'jobq:w-%' AND application_name NOT LIKE 'jobq:w-%:%'"
            " AND backend_xid IS NOT NULL"
        )
        return {row[0] for row in await self.rows(query)}


async def _patiently(ask: Callable[[], Awaitable[T]]) -> T:
    ends_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await ask()
        except Exception as error:
            is_away = is_unavailable(error) or isinstance(error, (*UNAVAILABLE, asyncpg.PostgresError))
            if not is_away or time.monotonic() > ends_at:
                raise
        await asyncio.sleep(0.05)
