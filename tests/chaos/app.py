"""The application that chaos runs: tasks of every kind, each of which journals its runs.

Invariant: a run is journalled before anything else happens in it, and its end however it ends; neither asks a store.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from sqlalchemy import text

from jobq import Context, JobQ, Reject, RetryPolicy, Snooze
from jobq.model import DeadJob
from jobq.outbox import settle
from tests.chaos.journal import VARIABLE, Journal
from tests.chaos.samples import VARIABLE as SAMPLES
from tests.chaos.samples import sample_tasks

QUEUES = ("desk", "mail")
SOON = RetryPolicy(max_attempts=25, delay=lambda attempt, error: 0.2 * min(attempt, 5))


@asynccontextmanager
async def _watched() -> AsyncIterator[None]:
    """Of a worker: have its reads noted while it serves."""
    settle.read = _noting_read  # type: ignore[assignment]
    yield


jobs = JobQ(lifespan=_watched)

_EFFECT = text("INSERT INTO chaos.effect VALUES (:order_id, :job_id, :generation, :note)")
_ORDER = text("INSERT INTO chaos.orders (id, kind, job_id, failures) VALUES (:id, 'book', :job_id, 0)")
_OVER = "SELECT job_id FROM chaos.history WHERE job_id = ANY($1) AND next IS NULL"
_read: dict[UUID, str] = {}
"""What this worker saw of each job when it read its row last."""


@cache
def journal() -> Journal:
    return Journal(Path(os.environ[VARIABLE]), "run")


@contextmanager
def journalled(ctx: Context, order: UUID) -> Iterator[None]:
    """A run, from its first moment to its last."""
    name = journal().name()
    seen = _read.pop(ctx.id, "unread")
    journal().write("start", name, ctx._run.worker, ctx.id, order, ctx.task, _generation(ctx), ctx.attempt, seen)
    outcome = "done"
    try:
        yield
    except BaseException as error:
        outcome = type(error).__name__
        raise
    finally:
        journal().write("end", name, outcome)


async def effect(session: Any, ctx: Context, order: UUID, note: str = "") -> None:
    await session.execute(_EFFECT, {"order_id": order, "job_id": ctx.id, "generation": _generation(ctx), "note": note})


@jobs.task(queue="desk", retry=SOON)
async def book(ctx: Context, order: UUID, before_s: float, inside_s: float, failures: int = 0) -> None:
    """The ordinary job: one effect, after so many attempts that fail."""
    with journalled(ctx, order):
        await asyncio.sleep(before_s)
        if ctx.attempt <= failures:
            raise RuntimeError("fails on order")
        async with ctx.complete() as session:
            await effect(session, ctx, order)
            await asyncio.sleep(inside_s)


@jobs.task(queue="desk", retry=SOON)
async def parent(ctx: Context, order: UUID, before_s: float) -> None:
    """An effect, and another order with a job of its own, in one COMMIT."""
    with journalled(ctx, order):
        await asyncio.sleep(before_s)
        async with ctx.complete() as session:
            await effect(session, ctx, order)
            child = uuid5(order, "child")
            job = await book.enqueue(session, child, before_s, 0.0)
            await session.execute(_ORDER, {"id": child, "job_id": job.id})


@jobs.task(queue="desk", retry=SOON)
async def nap(ctx: Context, order: UUID) -> None:
    """Snoozes at its first generation."""
    with journalled(ctx, order):
        if _generation(ctx) == 1:
            raise Snooze(0.3)
        async with ctx.complete() as session:
            await effect(session, ctx, order)


@jobs.task(queue="desk", retry=SOON)
async def stepwise(ctx: Context, order: UUID, before_s: float) -> None:
    """Its effect carries the result of a step."""
    with journalled(ctx, order):

        async def charge() -> str:
            name = journal().name()
            journal().write("step", name, ctx.id)
            return name

        note = await ctx.step("charge", charge)
        await asyncio.sleep(before_s)
        async with ctx.complete() as session:
            await effect(session, ctx, order, note)


@jobs.task(queue="mail", retry=SOON)
async def plain(ctx: Context, order: UUID, before_s: float, failures: int = 0) -> None:
    """Leaves nothing in the database."""
    with journalled(ctx, order):
        await asyncio.sleep(before_s)
        if ctx.attempt <= failures:
            raise RuntimeError("fails on order")


@jobs.task(queue="mail", retry=SOON)
def in_thread(ctx: Context, order: UUID, before_s: float) -> None:
    """Cannot be interrupted."""
    with journalled(ctx, order):
        time.sleep(before_s)


@jobs.task(queue="mail", retry=RetryPolicy(max_attempts=2, delay=lambda attempt, error: 0.1))
async def doomed(ctx: Context, order: UUID, rejects: bool) -> None:
    """Never succeeds: its one effect is that of its burial."""
    with journalled(ctx, order):
        raise Reject("no") if rejects else RuntimeError("fails on order")


@jobs.task(queue="desk", retry=SOON)
async def die(ctx: Context, order: UUID) -> None:
    """Kill the process, as running out of memory does."""
    with journalled(ctx, order):
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)


@jobs.task(queue="desk", retry=SOON)
async def block(ctx: Context, order: UUID, seconds: float) -> None:
    """Keep the event loop from turning."""
    with journalled(ctx, order):
        time.sleep(seconds)  # noqa: ASYNC251
        async with ctx.complete() as session:
            await effect(session, ctx, order)


@jobs.on_dead
async def buried(session: Any, job: DeadJob) -> None:
    """The effect of an order whose job has died."""
    values = {"order_id": json.loads(job.args)["order"], "job_id": job.id, "generation": 0, "note": job.reason}
    await session.execute(_EFFECT, values)


async def _noting_read(tx: Any, schema: str, ids: list[UUID]) -> Any:
    """The worker's own read, and beside it what was over by then: no such job may start."""
    over = {row[0] for row in await tx.fetch(_OVER, ids)}
    found = await _own_read(tx, schema, ids)
    for job_id in found:
        _read[job_id] = "over" if job_id in over else "due"
    return found


def _generation(ctx: Context) -> int:
    return ctx._job.generation


_own_read = settle.read
if SAMPLES in os.environ:
    sample_tasks(journal())
