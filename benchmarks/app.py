"""The application that the benchmarks run: a job with two small arguments that does nothing but note its start."""

from __future__ import annotations

import asyncio
import os
import time

from jobq import Context, JobQ

jobs = JobQ(database=os.environ.get("JOBQ_DATABASE_URL"), redis=os.environ.get("JOBQ_REDIS_URL"))

started_at: list[float] = []
started = asyncio.Event()


@jobs.task
async def nothing(number: int, word: str) -> None:
    """Do nothing: what is left to measure is jobq."""


@jobs.task(queue="latency")
async def note_start(number: int) -> None:
    """Note when the run started. Only of use in the process that reads `started_at`."""
    started_at.append(time.perf_counter())
    started.set()


@jobs.task(queue="orphans")
async def outlive(ctx: Context) -> None:
    """Never end, unless a worker has died of this job; then note the start as `note_start` does."""
    if ctx._job.crashes == 0:
        await asyncio.Event().wait()
    started_at.append(time.perf_counter())
    started.set()
