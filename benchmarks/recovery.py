"""How long it takes until all is well again after a fault. Called by suite. Calls stage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import redis.asyncio

from jobq.relay.leadership import Relay
from jobq.settings import WorkerSettings
from jobq.worker.worker import Worker

from . import app
from .figures import Measure
from .stage import APP, Stage

ORPHANS = 25
LOST = 10_000
_QUEUE = "orphans"


def _orphans(lease_s: float) -> Callable[[Stage], Awaitable[list[float]]]:
    async def run(stage: Stage) -> list[float]:
        """The worker that takes them back is in this process, which so sees their starts."""
        stopping = asyncio.Event()
        settings = WorkerSettings(queues=(_QUEUE,), lease=lease_s, beat=min(2.0, lease_s / 5))
        app.started_at.clear()
        async with stage.application() as application, stage.redis() as client, asyncio.TaskGroup() as group:
            living = Worker(application, settings)
            group.create_task(Relay(application.database, stage.servers.redis_url, "jobq").run(stopping))
            timing = ("--lease", str(lease_s), "--beat", str(settings.beat))
            with stage.process("worker", APP, "-q", _QUEUE, *timing) as doomed:
                async with application.database.sessions.begin() as session:
                    await application.enqueue_many(session, (app.outlive.job() for _ in range(ORPHANS)))
                await stage.until(lambda: _are_in_hand(client))
                serving = group.create_task(living.run())
                await asyncio.sleep(settings.beat)  # so that some beats have been seen
                killed_at = time.perf_counter()
                doomed.kill()
                await stage.until(_have_all_started)
            living.orders.stopping.set()
            living.orders.wake()
            await serving
            stopping.set()
        return [started - killed_at for started in app.started_at]

    return run


async def redis_loss(stage: Stage) -> float:
    """Seconds from FLUSHALL until Redis knows every waiting job again, with one relay process."""
    await stage.fill(LOST)
    known = (await stage.keys()).known
    with stage.process("relay"):
        async with stage.redis() as client:
            await stage.until(lambda: _are_known(client, known))
            await client.flushall()
            lost_at = time.perf_counter()
            await stage.until(lambda: _are_known(client, known))
            return time.perf_counter() - lost_at


async def _are_known(client: redis.asyncio.Redis, known: str) -> bool:
    return bool(await client.hlen(known) == LOST)


async def _are_in_hand(client: redis.asyncio.Redis) -> bool:
    return sum([await client.llen(key) for key in await client.keys("*:working:*")]) == ORPHANS


async def _have_all_started() -> bool:
    return len(app.started_at) == ORPHANS


_ORPHANS = f"from SIGKILL of a worker to the next run of each of its {ORPHANS} jobs"
MEASURES = [
    Measure("recovery/orphans", "s", _orphans(WorkerSettings().lease), f"{_ORPHANS}, lease 15 s", is_slow=True),
    Measure("recovery/orphans-5s", "s", _orphans(5.0), f"{_ORPHANS}, lease 5 s", is_slow=True),
    Measure(
        "recovery/redis-loss",
        "s",
        redis_loss,
        f"from FLUSHALL until all of {LOST:,} waiting jobs are in Redis again",
        is_slow=True,
    ),
]
