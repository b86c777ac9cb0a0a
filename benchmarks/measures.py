"""What is measured, and how: one function per figure. Every measure starts from empty tables and an empty Redis."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import redis.asyncio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from jobq import JobQ, embedded
from jobq.broker.scripts import Broker
from jobq.migrate import upgrade
from jobq.relay.leadership import Relay
from jobq.relay.relay import Leader
from jobq.settings import RelaySettings, WorkerSettings
from jobq.worker.worker import Worker

from . import app

T = TypeVar("T")

WRITERS = 16
TRANSACTIONS = 2_000
LATENCY_SAMPLES = 200
_IDLE_S = 0.05
"""Between two latency samples, so that each meets an idle system."""


@dataclass
class Stage:
    """The servers, and how much to do on them."""

    servers: embedded.Servers
    jobs: int

    async def fresh(self, measure: Callable[[Stage], Awaitable[T]]) -> T:
        """Run one measure over empty tables and an empty Redis."""
        application = self.application()
        await upgrade(application.database.engine)
        async with application.database.sessions.begin() as session:
            await session.execute(text("TRUNCATE jobq.outbox, jobq.dead, jobq.idempotency_key, jobq.step"))
            await session.execute(text("CREATE TABLE IF NOT EXISTS plain (LIKE jobq.outbox INCLUDING ALL)"))
            await session.execute(text("TRUNCATE plain"))
        async with redis.asyncio.Redis.from_url(self.servers.redis_url) as client:
            await client.flushall()
        await application.database.close()
        return await measure(self)

    def application(self) -> JobQ:
        """The benchmarks' application, on these servers, with connections of its own."""
        jobs = JobQ(database=self.servers.database_url, redis=self.servers.redis_url)
        jobs.tasks = app.jobs.tasks
        return jobs

    @contextmanager
    def process(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """A `jobq` command as a process of its own; ended by SIGTERM."""
        environment = os.environ | {
            "JOBQ_DATABASE_URL": self.servers.database_url,
            "JOBQ_REDIS_URL": self.servers.redis_url,
        }
        command = [sys.executable, "-m", "jobq", *words, "--log-level", "error"]
        with subprocess.Popen(command, env=environment) as process:
            try:
                yield process
            finally:
                process.send_signal(signal.SIGTERM)


async def enqueue(stage: Stage) -> float:
    """Transactions a second of WRITERS writers, each with one enqueue."""
    application = stage.application()
    try:
        return await _transactions_a_second(application, _enqueue_one)
    finally:
        await application.database.close()


async def enqueue_ratio(stage: Stage) -> float:
    """The rate of enqueues over that of plain INSERTs into a table of the same shape, in turn on one pool."""
    application = stage.application()
    try:
        rates: dict[object, list[float]] = {_enqueue_one: [], _insert_one: []}
        for _ in range(3):
            for write in (_enqueue_one, _insert_one):
                rates[write].append(await _transactions_a_second(application, write))
        return statistics.median(rates[_enqueue_one]) / statistics.median(rates[_insert_one])
    finally:
        await application.database.close()


async def enqueue_many(stage: Stage) -> float:
    """Jobs a second through enqueue_many, 10,000 in one transaction, validation and commit included."""
    application = stage.application()
    started = time.perf_counter()
    async with application.database.sessions.begin() as session:
        await application.enqueue_many(session, (app.nothing.job(i, "word") for i in range(10_000)))
    rate = 10_000 / (time.perf_counter() - started)
    await application.database.close()
    return rate


async def relay(stage: Stage) -> float:
    """Entries a second that one relay brings into Redis from a table full of waiting jobs."""
    application = stage.application()
    await fill(application, stage.jobs)
    connection = await application.database.connect(schema="jobq", name="benchmark")
    async with redis.asyncio.Redis.from_url(stage.servers.redis_url) as client:
        broker = Broker(client, await application.database.database_id(connection, "jobq"))
        settings = RelaySettings(ready_limit=stage.jobs + 1)
        leader = await Leader.start(connection, broker, "jobq", settings)
        started = time.perf_counter()
        while await client.hlen(broker.keys("default").known) < stage.jobs:
            await leader.step()
        rate = stage.jobs / (time.perf_counter() - started)
    await connection.close()
    await application.database.close()
    return rate


async def drain(stage: Stage) -> float:
    """Jobs a second from the first completion on, until the outbox is empty: relay and worker as processes."""
    application = stage.application()
    await fill(application, stage.jobs)
    with stage.process("relay"), stage.process("worker", "benchmarks.app:jobs"):
        async with application.database.sessions() as session:
            await _until_left(session, stage.jobs - 1)
            started = time.perf_counter()
            await _until_left(session, 0)
            rate = stage.jobs / (time.perf_counter() - started)
    await application.database.close()
    return rate


async def bounded(stage: Stage) -> float:
    """Redis's memory at its highest while 1,000,000 jobs wait and are drained, over that for 100,000."""
    application = stage.application()
    peaks = []
    for count in (_READY_LIMIT, 10 * _READY_LIMIT):
        async with (
            application.database.sessions() as session,
            redis.asyncio.Redis.from_url(stage.servers.redis_url) as client,
        ):
            await session.execute(_MANY, {"count": count})
            await session.commit()
            peak = 0
            with stage.process("relay"):
                await _until_ready(client, _READY_LIMIT)
                peak = await _used_memory(client)
                with stage.process("worker", "benchmarks.app:jobs"):
                    while (await session.execute(text("SELECT 1 FROM jobq.outbox LIMIT 1"))).first():
                        await session.rollback()
                        peak = max(peak, await _used_memory(client))
                        await asyncio.sleep(0.1)
            await session.rollback()
            peaks.append(peak)
    await application.database.close()
    return peaks[1] / peaks[0]


_READY_LIMIT = RelaySettings().ready_limit
_MANY = text(
    "INSERT INTO jobq.outbox (id, queue, task, args)"
    """ SELECT uuidv7(), 'default', 'nothing', '{"number": 1, "word": "word"}' FROM generate_series(1, :count)"""
)


async def _until_ready(client: redis.asyncio.Redis, count: int) -> None:
    while True:
        lengths = [await client.llen(key) for key in await client.keys("*:ready:2")]
        if sum(lengths) >= count:
            return
        await asyncio.sleep(0.1)


async def _used_memory(client: redis.asyncio.Redis) -> int:
    return int((await client.info("memory"))["used_memory"])


async def latency_p50(stage: Stage) -> float:
    return statistics.median(await _latencies_ms(stage))


async def latency_p99(stage: Stage) -> float:
    return statistics.quantiles(await _latencies_ms(stage), n=100)[98]


async def _latencies_ms(stage: Stage) -> list[float]:
    """From the end of COMMIT to the first line of the task, one job at a time; relay and worker in this process."""
    application = stage.application()
    stopping = asyncio.Event()
    worker = Worker(application, WorkerSettings(queues=("latency",)))
    async with asyncio.TaskGroup() as group:
        group.create_task(Relay(application.database, stage.servers.redis_url, "jobq").run(stopping))
        group.create_task(worker.run())
        committed_at = []
        app.started_at.clear()
        app.started = asyncio.Event()  # one for each event loop
        for number in range(LATENCY_SAMPLES):
            async with application.database.sessions.begin() as session:
                await app.note_start.enqueue(session, number)
            committed_at.append(time.perf_counter())
            await app.started.wait()
            app.started.clear()
            await asyncio.sleep(_IDLE_S)
        stopping.set()
        worker.orders.stopping.set()
        worker.orders.wake()
    await application.database.close()
    pairs = zip(committed_at, app.started_at, strict=True)
    return [max(0.0, started - committed) * 1000 for committed, started in pairs]


async def _transactions_a_second(application: JobQ, write: Callable[[AsyncSession, int], Awaitable[None]]) -> float:
    async def writer(first: int) -> None:
        for number in range(first, TRANSACTIONS, WRITERS):
            async with application.database.sessions.begin() as session:
                await write(session, number)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for first in range(WRITERS):
            group.create_task(writer(first))
    return TRANSACTIONS / (time.perf_counter() - started)


async def _enqueue_one(session: AsyncSession, number: int) -> None:
    await app.nothing.enqueue(session, number, "word")


_PLAIN = text(
    "INSERT INTO plain (id, queue, task, args) VALUES (gen_random_uuid(), 'default', 'nothing', CAST(:args AS json))"
)


async def _insert_one(session: AsyncSession, number: int) -> None:
    await session.execute(_PLAIN, {"args": f'{{"number":{number},"word":"word"}}'})


async def fill(application: JobQ, count: int) -> None:
    for first in range(0, count, 10_000):
        async with application.database.sessions.begin() as session:
            numbers = range(first, min(first + 10_000, count))
            await application.enqueue_many(session, (app.nothing.job(i, "word") for i in numbers))


async def _until_left(session: AsyncSession, most: int) -> None:
    """Wait until at most `most` rows are left. Asks often when few are left, and never for a whole count."""
    probe = text(f"SELECT count(*) FROM (SELECT 1 FROM jobq.outbox LIMIT {most + 1}) AS rest")
    while (await session.execute(probe)).scalar_one() > most:
        await session.rollback()
        await asyncio.sleep(0.02)
