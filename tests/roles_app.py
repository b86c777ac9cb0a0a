"""An application that comes by every way a job can go, for processes that have no more rights than they need."""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy import text

from jobq import Context, JobQ, Reject, RetryPolicy
from jobq.model import DeadJob

TABLES = """
    CREATE TABLE effect (id bigserial PRIMARY KEY, job_id uuid, note text);
    CREATE TABLE gate (name text);
"""

jobs = JobQ()
at_once = RetryPolicy(max_attempts=2, delay=lambda attempt, error: 0.0)


async def _note(session: Any, ctx: Context, note: str) -> None:
    await session.execute(text("INSERT INTO effect (job_id, note) VALUES (:id, :note)"), {"id": ctx.id, "note": note})


async def _complete(ctx: Context, note: str) -> None:
    async with ctx.complete() as session:
        await _note(session, ctx, note)


@jobs.task(queue="mail")
async def send_receipt(ctx: Context, order_id: int, *, locale: str = "en") -> None:
    await _complete(ctx, f"receipt {order_id}")


@jobs.task
async def plain(ctx: Context, way: str) -> None:
    async with jobs.database.sessions.begin() as session:
        await _note(session, ctx, way)


@jobs.task(retry=at_once)
async def flaky(ctx: Context, note: str) -> None:
    await ctx.step("charge", lambda: "paid")
    if ctx.attempt == 1:
        raise ConnectionError("not yet")
    await _complete(ctx, note)


@jobs.task
async def parent(ctx: Context) -> None:
    async with ctx.complete() as session:
        await _note(session, ctx, "parent")
        await plain.opts(idempotency_key="child").enqueue(session, "child")
        await jobs.enqueue_many(session, [plain.job("many"), plain.job("many")])


@jobs.task
async def refuse(ctx: Context) -> None:
    raise Reject("never")


@jobs.on_dead
async def tell(session: Any, dead: DeadJob) -> None:
    await plain.opts(idempotency_key=f"dead:{dead.id}:{dead.reason}").enqueue(session, f"dead {dead.reason}")


@jobs.task
async def hold(ctx: Context) -> None:
    """Wait for the gate with the job's row locked."""
    async with ctx.complete() as session:
        await _note(session, ctx, "held")
        async with jobs.database.sessions.begin() as other:
            await other.execute(text("INSERT INTO gate VALUES ('arrived')"))
        while True:
            async with jobs.database.sessions() as other:
                if (await other.execute(text("SELECT 1 FROM gate WHERE name = 'open'"))).first() is not None:
                    return
            await asyncio.sleep(0.01)
