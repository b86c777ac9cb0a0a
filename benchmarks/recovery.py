"""How long it takes until all is well again after a fault. Every measure starts from empty tables and Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import redis.asyncio

from jobq.broker.keys import Keys
from jobq.relay.leadership import Relay
from jobq.settings import WorkerSettings
from jobq.worker.worker import Worker

from . import app
from .measures import Stage, fill

ORPHANS = 25
LOST = 10_000
_QUEUE = "orphans"
_POLL_S = 0.005


async def orphans(stage: Stage) -> list[float]:
    """Seconds from SIGKILL of a worker until each job it ran starts again, with the defaults."""
    return await _orphans(stage, WorkerSettings().lease)


async def orphans_of_short_lease(stage: Stage) -> list[float]:
    """The same with a lease of 5 s."""
    return await _orphans(stage, 5.0)


async def _orphans(stage: Stage, lease_s: float) -> list[float]:
    """The worker that takes them back is in this process, which so sees their starts."""
    application = stage.application()
    stopping = asyncio.Event()
    settings = WorkerSettings(queues=(_QUEUE,), lease=lease_s, beat=min(2.0, lease_s / 5))
    living = Worker(application, settings)
    app.started_at.clear()
    async with asyncio.TaskGroup() as group:
        group.create_task(Relay(application.database, stage.servers.redis_url, "jobq").run(stopping))
        timing = ("--lease", str(lease_s), "--beat", str(settings.beat))
        with stage.process("worker", "benchmarks.app:jobs", "-q", _QUEUE, *timing) as doomed:
            async with application.database.sessions.begin() as session:
                await application.enqueue_many(session, (app.outlive.job() for _ in range(ORPHANS)))
            async with redis.asyncio.Redis.from_url(stage.servers.redis_url) as client:
                await _until(lambda: _are_in_hand(client))
            serving = group.create_task(living.run())
            await asyncio.sleep(settings.beat)  # so that some beats have been seen
            killed_at = time.perf_counter()
            doomed.kill()
            await _until(lambda: _are_all(len(app.started_at)))
        living.orders.stopping.set()
        living.orders.wake()
        await serving
        stopping.set()
    await application.database.close()
    return [started - killed_at for started in app.started_at]


async def redis_loss(stage: Stage) -> list[float]:
    """Seconds from FLUSHALL until Redis knows every waiting job again, with one relay process."""
    application = stage.application()
    await fill(application, LOST)
    connection = await application.database.connect(schema="jobq", name="benchmark")
    known = Keys(await application.database.database_id(connection, "jobq"), "default").known
    await connection.close()
    with stage.process("relay"):
        async with redis.asyncio.Redis.from_url(stage.servers.redis_url) as client:
            await _until_known(client, known)
            await client.flushall()
            lost_at = time.perf_counter()
            await _until_known(client, known)
            took_s = time.perf_counter() - lost_at
    await application.database.close()
    return [took_s]


async def _until_known(client: redis.asyncio.Redis, known: str) -> None:
    async def are_known() -> bool:
        return bool(await client.hlen(known) == LOST)

    await _until(are_known)


async def _are_in_hand(client: redis.asyncio.Redis) -> bool:
    return sum([await client.llen(key) for key in await client.keys("*:working:*")]) == ORPHANS


async def _are_all(count: int) -> bool:
    return count == ORPHANS


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    while True:
        if await condition():
            return
        await asyncio.sleep(_POLL_S)
