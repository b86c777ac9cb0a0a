"""A relay and workers that serve by themselves in the test's process, and a record of what their jobs did.

The Redis they use is the test's to break; PostgreSQL stays. At the end `assert_nothing_lost` says what must hold
whatever happened to Redis.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import UUID

from jobq import Context
from jobq.broker.client import TROUBLE
from jobq.relay.leadership import Relay
from jobq.settings import RelaySettings, WorkerSettings
from jobq.worker.worker import Worker
from tests.builders import Bench, running, write_effect
from tests.waiting import until

BEAT_S = 0.2
LEASE_S = 30.0
"""No worker dies in these tests, so that none may be swept."""
_KEPT = ("relay", "stats", "queues", "beats", "workers", "bell")
"""Keys of a queue that has workers and nothing to do."""


class Serving:
    """What the jobs did so far, and how to give them more."""

    def __init__(self, bench: Bench, keys: Callable[[], Awaitable[list[str]]]):
        self.bench = bench
        self._keys = keys
        self.jobs: list[UUID] = []
        self.starts: Counter[UUID] = Counter()
        self.started_again: list[UUID] = []
        """Jobs that started after they had completed."""
        self._done: set[UUID] = set()
        self._gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.open("")

        @bench.app.task
        async def book(ctx: Context, gate: str) -> None:
            self.starts[ctx.id] += 1
            if ctx.id in self._done:
                self.started_again.append(ctx.id)
            await self._gates[gate].wait()
            async with ctx.complete() as session:
                await write_effect(session, ctx)
            self._done.add(ctx.id)

        self.task = book

    async def enqueue(self, count: int, *, gate: str = "", queue: str = "default") -> list[UUID]:
        """Commit jobs that wait for a gate; "" stands open."""
        async with self.bench.app.database.sessions.begin() as session:
            wanted = [self.task.opts(queue=queue).job(gate) for _ in range(count)]
            jobs = [job.id for job in await self.bench.app.enqueue_many(session, wanted)]
        self.jobs += jobs
        return jobs

    def open(self, gate: str) -> None:
        self._gates[gate].set()

    async def have_started(self, jobs: Iterable[UUID], least: int) -> None:
        wanted = set(jobs)
        await until(lambda: len(wanted & self.starts.keys()) >= least, f"{least} jobs have started")

    async def are_done(self, jobs: Iterable[UUID] | None = None, deadline: float = 30) -> None:
        wanted = set(self.jobs if jobs is None else jobs)
        await until(lambda: wanted <= self._done, "the jobs are done", deadline)

    async def waiting(self, queue: str = "default") -> int:
        """How many entries wait in Redis, by what it answers; -1 while it answers nothing."""
        try:
            return len(await self.bench.ready(queue))
        except TROUBLE:
            return -1

    async def assert_nothing_lost(self) -> None:
        """Every job is done, with one effect, none of them twice, and Redis comes to hold nothing for any of them."""
        await self.are_done()
        assert await self.bench.effects() == len(self.jobs)
        assert await self.bench.db.fetchval("SELECT count(DISTINCT job_id) FROM effect") == len(self.jobs)

        async def is_drained() -> bool:
            try:
                return await self._left() == []
            except TROUBLE:
                return False

        try:
            await until(is_drained, "Redis holds nothing for jobs that are done")
        except AssertionError as error:
            raise AssertionError(f"{error}: {await self._left()}") from None
        assert self.started_again == []

    async def _left(self) -> list[str]:
        """Keys that hold something of jobs, and rows."""
        rows = await self.bench.db.fetchval("SELECT count(*) FROM jobq.outbox")
        names = [name for name in await self._keys() if name.rpartition(":")[2] not in _KEPT]
        return names + ["a row"] * rows


@asynccontextmanager
async def serving(
    database_url: str,
    redis_url: str,
    *,
    queues: tuple[str, ...] = ("default",),
    workers: int = 2,
    concurrency: int = 5,
    keys: Callable[[], list[str]] | None = None,
) -> AsyncIterator[Serving]:
    """Run a relay and workers; they stop in order at the end. `keys` lists those of all nodes of a cluster.

    The relay does not scrub: what Redis loses it must notice.
    """
    async with Bench.open(database_url, redis_url) as bench, AsyncExitStack() as stack:

        async def all_keys() -> list[str]:
            if keys is not None:
                return await asyncio.to_thread(keys)
            return [name.decode("utf-8", "surrogateescape") for name in await bench.redis.keys("*")]

        served = Serving(bench, all_keys)
        stopping = asyncio.Event()
        settings = RelaySettings(beat=BEAT_S, scrub_every=3600.0)
        relay = asyncio.create_task(Relay(bench.app.database, redis_url, bench.app.schema, settings).run(stopping))
        for _ in range(workers):
            options = WorkerSettings(queues=queues, concurrency=concurrency, beat=BEAT_S, lease=LEASE_S, grace=1)
            await stack.enter_async_context(running(Worker(bench.app, options)))
        try:
            yield served
        finally:
            stopping.set()
            await asyncio.wait_for(asyncio.shield(relay), 20)
