"""Builders for the tests of the worker: an application on real servers, and its parts to be stepped by hand.

A `Bench` is one database, one Redis and one application. Workers opened on it take no turn and beat only once
by themselves, so that a test decides what happens next: `turns.step()`, `settler.step()`, `heartbeat.step()`,
`sweeper.step()`, or `turn(worker)` for all of a turn.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID

import anyio
import asyncpg
from sqlalchemy import text

from jobq import Context, JobQ, Task
from jobq.broker.client import connect
from jobq.broker.keys import prefix
from jobq.broker.scripts import ADOPT_TOKEN, Broker
from jobq.model import Entry
from jobq.relay.relay import Leader
from jobq.settings import RelaySettings, WorkerSettings
from jobq.worker.worker import Worker
from tests.waiting import POLL_S, until

KEPT_KEYS = {"relay", "stats"}
"""What a drained queue leaves in Redis, beside the set of queue names."""


class Bench:
    """Everything a test of the worker needs, opened once and closed with the test."""

    def __init__(self, stack: AsyncExitStack, app: JobQ, db: asyncpg.Connection, broker: Broker):
        self._stack = stack
        self.app = app
        self.db = db
        """A connection beside the application's, for looking and for editing by hand."""
        self.broker = broker
        self.redis = broker.client

    @classmethod
    @asynccontextmanager
    async def open(cls, database_url: str, redis_url: str, **given: Any) -> AsyncIterator[Bench]:
        """`given` overrides what the application is made of, say its `database` or `lifespan`."""
        async with AsyncExitStack() as stack:
            app = JobQ(**{"database": database_url, "redis": redis_url, **given})
            stack.push_async_callback(app.database.close)
            db = await asyncpg.connect(database_url)
            stack.push_async_callback(db.close)
            await db.execute("CREATE TABLE effect (id bigserial PRIMARY KEY, job_id uuid, note text)")
            client = connect(redis_url)
            stack.push_async_callback(client.aclose)
            database_id = await db.fetchval("SELECT database_id FROM jobq.meta")
            yield cls(stack, app, db, Broker(client, UUID(bytes=database_id.bytes)))

    async def worker(self, *, app: JobQ | None = None, **settings: Any) -> Worker:
        """An open worker that has beaten once; it beats again when told, and its lease outlasts any test."""
        defaults = {"beat": 3600.0, "lease": 36_000.0, "concurrency": 10}
        worker = Worker(app or self.app, WorkerSettings(**{**defaults, **settings}))
        await worker.open(self._stack)
        await until(lambda: worker.heartbeat.may_start, "the worker's first beat was answered")
        return worker

    async def leader(self, **settings: Any) -> Leader:
        """A relay that leads, to be stepped by hand. It reaches both stores as the application does."""
        connection = await self.app.database.connect(schema=self.app.schema, name="jobq:relay")
        self._stack.callback(connection.terminate)
        client = connect(self.app.redis_url)
        self._stack.push_async_callback(client.aclose)
        broker = Broker(client, self.broker.database_id)
        return await Leader.start(connection, broker, self.app.schema, RelaySettings(**{"beat": 0.05, **settings}))

    def closes(self, close: Callable[[], Awaitable[object]]) -> None:
        """Call this at the end of the test."""
        self._stack.push_async_callback(close)

    async def enqueue(self, task: Task[..., Any, Any], *args: Any, **options: Any) -> UUID:
        """Commit one job."""
        async with self.app.database.sessions.begin() as session:
            return (await task.opts(**options).enqueue(session, *args)).id

    async def relay(self) -> None:
        """Push every row that is due and that Redis does not know, as a relay's walk would."""
        rows = await self.db.fetch(
            "SELECT queue, id, generation, priority FROM jobq.outbox "
            "WHERE run_at IS NULL OR run_at <= clock_timestamp() ORDER BY id"
        )
        for queue in {row["queue"] for row in rows}:
            entries = [entry_of(row) for row in rows if row["queue"] == queue]
            await self.broker.push(queue, entries, expected=ADOPT_TOKEN, token="by hand")

    async def commit_and_relay(self, task: Task[..., Any, Any], *args: Any, **options: Any) -> UUID:
        """Commit one job, and push it."""
        job_id = await self.enqueue(task, *args, **options)
        await self.relay()
        return job_id

    async def row(self, job_id: UUID) -> asyncpg.Record | None:
        return await self.db.fetchrow("SELECT *, run_at - now() AS due_in FROM jobq.outbox WHERE id = $1", job_id)

    async def dead(self, job_id: UUID) -> asyncpg.Record | None:
        return await self.db.fetchrow("SELECT * FROM jobq.dead WHERE id = $1", job_id)

    async def effects(self, job_id: UUID | None = None) -> int:
        """How many effects were committed, by one job or by all."""
        found = await self.db.fetchval(
            "SELECT count(*) FROM effect WHERE $1::uuid IS NULL OR job_id = $1",
            job_id,
        )
        return int(found)

    async def stats(self, queue: str = "default") -> dict[str, int]:
        found = await self.redis.hgetall(self.broker.keys(queue).stats)
        return {name.decode(): int(value) for name, value in found.items()}

    async def ready(self, queue: str = "default") -> list[bytes]:
        """Entries in the ready lists, most urgent first."""
        lists = [await self.redis.lrange(key, 0, -1) for key in self.broker.keys(queue).ready]
        return [entry for entries in lists for entry in entries]

    async def working(self, worker: Worker, queue: str = "default") -> list[bytes]:
        return await self.broker.working(queue, worker.name)

    async def working_of(self, name: str, queue: str = "default") -> list[bytes]:
        return await self.broker.working(queue, name)

    async def keys_left(self) -> set[str]:
        """Names of the keys in Redis, without what every drained queue keeps."""
        start = prefix(self.broker.database_id)
        names = {name.decode().removeprefix(start) for name in await self.redis.keys("*")}
        return {name for name in names if name != "queues" and name.rpartition(":")[2] not in KEPT_KEYS}

    async def assert_drained(self) -> None:
        """No row is left, and no key but those of workers that live."""
        assert await self.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0
        left = {name for name in await self.keys_left() if name.rpartition(":")[2] not in ("beats", "workers")}
        assert left == set()

    async def second_app(self, **given: Any) -> JobQ:
        """Another application on the same servers, with no tasks yet: another release, or another service."""
        app = JobQ(**{"database": self.app.given_database, "redis": self.app.redis_url, **given})
        self._stack.push_async_callback(app.database.close)
        return app


def entry_of(row: Any) -> bytes:
    """The entry of a row, as Redis holds it."""
    return Entry.of(UUID(bytes=row["id"].bytes), row["generation"], row["priority"]).raw


async def turn(worker: Worker) -> None:
    """Fetch, read, start, wait for the runs to end, and settle them. For a worker that has something to fetch."""
    worker.orders.wake()
    await worker.turns.step()
    await until(lambda: not worker.turns.runs, "the runs ended")
    await settled(worker)


async def started(worker: Worker) -> None:
    """Fetch, read and start."""
    worker.orders.wake()
    await worker.turns.step()


async def settled(worker: Worker) -> None:
    """Settle what has ended, until nothing is pending."""

    async def is_settled() -> bool:
        await worker.settler.step()
        return not worker.settler.pending

    await until(is_settled, "everything was settled")


async def write_effect(session: Any, ctx: Context[Any], note: str = "") -> None:
    """An effect of a job, in the transaction that completes it."""
    await session.execute(
        text("INSERT INTO effect (job_id, note) VALUES (:job_id, :note)"), {"job_id": ctx.id, "note": note}
    )


class Gate:
    """Where a task waits until the test lets it go on, and says that it has come."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.open = asyncio.Event()

    async def wait(self) -> None:
        self.arrived.set()
        await self.open.wait()

    async def opened(self) -> None:
        self.open.set()


@asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[asyncio.Task[int]]:
    """A worker that runs by itself; it is told to stop, in a hurry, when the block ends."""
    task = asyncio.create_task(worker.run(), name=f"worker {worker.name}")
    try:
        yield task
    finally:
        worker.orders.stopping.set()
        worker.orders.hurry.set()
        worker.orders.wake()
        await asyncio.wait_for(asyncio.shield(task), 20)


@asynccontextmanager
async def beating(worker: Worker) -> AsyncIterator[None]:
    """A worker that takes no turns, and beats all the while."""

    async def beat() -> None:
        while True:
            await asyncio.to_thread(worker.heartbeat.step)
            await asyncio.sleep(POLL_S)

    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        yield
        group.cancel_scope.cancel()


def any_id() -> UUID:
    return uuid.uuid4()
