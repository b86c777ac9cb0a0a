"""An application whose tasks misbehave on order, for tests that kill the processes it runs in.

Every start of a run is noted in the table `run` at once, whatever becomes of it; effects go into `effect`. A task
that waits, waits for a row in the table `gate`.
"""

from __future__ import annotations

import asyncio
import os
import signal

from sqlalchemy import text

from jobq import Context, JobQ

TABLES = """
    CREATE TABLE run (job_id uuid, pid int, beside int);
    CREATE TABLE gate (name text);
"""

jobs = JobQ()
_running = 0


async def _note(ctx: Context) -> None:
    async with jobs.database.sessions.begin() as session:
        await session.execute(
            text("INSERT INTO run VALUES (:job_id, :pid, :beside)"),
            {"job_id": ctx.id, "pid": os.getpid(), "beside": _running},
        )


async def _pass(gate: str) -> None:
    while True:
        async with jobs.database.sessions() as session:
            if (
                await session.execute(text("SELECT 1 FROM gate WHERE name = :name"), {"name": gate})
            ).first() is not None:
                return
        await asyncio.sleep(0.01)


@jobs.task
async def book(ctx: Context, gate: str) -> None:
    """Wait inside `ctx.complete()`, with the effect written."""
    global _running
    await _note(ctx)
    _running += 1
    try:
        async with ctx.complete() as session:
            await session.execute(text("INSERT INTO effect (job_id) VALUES (:job_id)"), {"job_id": ctx.id})
            await _pass(gate)
    finally:
        _running -= 1


@jobs.task
async def book_late(ctx: Context, gate: str) -> None:
    """Wait before `ctx.complete()`."""
    await _note(ctx)
    await _pass(gate)
    async with ctx.complete() as session:
        await session.execute(text("INSERT INTO effect (job_id) VALUES (:job_id)"), {"job_id": ctx.id})


@jobs.task
async def plain(ctx: Context, gate: str) -> None:
    await _note(ctx)
    await _pass(gate)


@jobs.task
async def die(ctx: Context, gate: str) -> None:
    """Kill the process, as running out of memory does."""
    await _note(ctx)
    await _pass(gate)
    os.kill(os.getpid(), signal.SIGKILL)


@jobs.task
async def die_before_commit(ctx: Context) -> None:
    await _note(ctx)
    async with ctx.complete() as session:
        await session.execute(text("INSERT INTO effect (job_id) VALUES (:job_id)"), {"job_id": ctx.id})
        await session.flush()
        os.kill(os.getpid(), signal.SIGKILL)


@jobs.task
async def swallow(ctx: Context) -> None:
    """Take no notice of being cancelled."""
    await _note(ctx)
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue
