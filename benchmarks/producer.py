"""A process of the application that enqueues: steadily, or as fast as the rest keeps up.

    python -m benchmarks.producer --processes P --writers W --batch B [--rate R] [--limit L]

W writers take turns; each transaction enqueues B jobs (1: `enqueue`, more: `enqueue_many`). R is the transactions a
second of this process. P processes like this one share the work: they pause while more than L of what all have
enqueued is not acked. Run by pipeline and latency.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time

import redis.asyncio
import uvloop

from jobq import JobQ

from . import app
from .stage import application_on, counted, keys_on

_LOOK_S = 0.01


class Producer:
    """Writers, and the brake on them."""

    def __init__(self, jobs: JobQ, options: argparse.Namespace):
        self._jobs = jobs
        self._options = options
        self._enqueued = 0
        self._transactions = 0
        self._began_at = time.perf_counter()
        self._free = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._brake())
            for _ in range(self._options.writers):
                group.create_task(self._write())

    async def _brake(self) -> None:
        keys = await keys_on(os.environ["JOBQ_DATABASE_URL"])
        async with redis.asyncio.Redis.from_url(os.environ["JOBQ_REDIS_URL"]) as client:
            before = await counted(client, keys, "acked")
            while True:
                settled = (await counted(client, keys, "acked") - before) / self._options.processes
                is_ahead = self._enqueued - settled > self._options.limit / self._options.processes
                (self._free.clear if is_ahead else self._free.set)()
                await asyncio.sleep(_LOOK_S)

    async def _write(self) -> None:
        batch = self._options.batch
        while True:
            await self._free.wait()
            self._transactions += 1
            await self._keep_pace(self._transactions)
            self._enqueued += batch
            async with self._jobs.database.sessions.begin() as session:
                if batch == 1:
                    await app.nothing.enqueue(session, self._enqueued, "word")
                else:
                    jobs = (app.nothing.job(number, "word") for number in range(batch))
                    await self._jobs.enqueue_many(session, jobs)

    async def _keep_pace(self, transaction: int) -> None:
        if self._options.rate:
            await asyncio.sleep(self._began_at + transaction / self._options.rate - time.perf_counter())


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.producer")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--limit", type=int, default=5_000)
    options = parser.parse_args()
    jobs = application_on(os.environ["JOBQ_DATABASE_URL"], os.environ["JOBQ_REDIS_URL"], options.writers)
    await Producer(jobs, options).run()


if __name__ == "__main__":
    uvloop.run(main())
