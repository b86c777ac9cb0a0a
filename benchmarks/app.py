"""The application that the benchmarks run. Tasks have two small arguments and do next to nothing."""

from __future__ import annotations

import asyncio
import os
import time
from uuid import UUID

from jobq import Context, JobQ

jobs = JobQ(database=os.environ.get("JOBQ_DATABASE_URL"), redis=os.environ.get("JOBQ_REDIS_URL"))

started_at: list[float] = []
"""Starts of `outlive`. Only of use in the process that runs it."""


@jobs.task
async def nothing(number: int, word: str) -> None:
    """Do nothing: what is left to measure is jobq."""


@jobs.task
async def complete(ctx: Context, number: int, word: str) -> None:
    """Do nothing in the transaction that finishes the job."""
    async with ctx.complete():
        pass


@jobs.task
async def probe(ctx: Context) -> None:
    """Say when it starts, if anybody listens."""
    note_start(ctx.id)


def note_start(job_id: UUID) -> None:
    """Replaced where starts are timed."""


@jobs.task
async def sleep_1ms(number: int, word: str) -> None:
    await asyncio.sleep(0.001)


@jobs.task
async def sleep_20ms(number: int, word: str) -> None:
    await asyncio.sleep(0.020)


@jobs.task(queue="orphans")
async def outlive(ctx: Context) -> None:
    """Never end, unless a worker has died of this job; then note the start."""
    if ctx._job.crashes == 0:
        await asyncio.Event().wait()
    started_at.append(time.perf_counter())
