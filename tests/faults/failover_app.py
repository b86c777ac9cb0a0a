"""An application for tests in which PostgreSQL loses its last commits: what ran is noted in a file, outside of it.

A run that waits, waits for a file. Started with JOBQ_TEST_ENGINE, the application has an engine of its own.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from jobq import Context, JobQ, RetryPolicy

TABLES = """
    CREATE TABLE orders (id int PRIMARY KEY);
    CREATE TABLE effect (order_id int, note text);
"""
NOTES = Path("notes")

_engine = os.environ.get("JOBQ_TEST_ENGINE")
jobs = JobQ(database=create_async_engine(_engine)) if _engine else JobQ()
_soon = RetryPolicy(delay=lambda attempt, error: 0.1)


def _note(what: str, order_id: int) -> None:
    with NOTES.open("a") as notes:
        notes.write(f"{what} {order_id}\n")


async def _pass(gate: str) -> None:
    while True:
        if not gate or _is_open(gate):
            return
        await asyncio.sleep(0.01)


def _is_open(gate: str) -> bool:
    return Path(gate).exists()


async def _charge(order_id: int) -> str:
    _note("charge", order_id)
    return "charged"


async def _effect(ctx: Context, order_id: int, note: str, gate: str = "") -> None:
    async with ctx.complete() as session:
        await session.execute(text("INSERT INTO effect VALUES (:id, :note)"), {"id": order_id, "note": note})
        await _pass(gate)


@jobs.task(retry=_soon)
async def book(ctx: Context, order_id: int, gate: str = "") -> None:
    """Wait before `ctx.complete()`."""
    _note("book", order_id)
    await _pass(gate)
    await _effect(ctx, order_id, "booked")


@jobs.task(retry=_soon)
async def book_slowly(ctx: Context, order_id: int, gate: str) -> None:
    """Wait inside `ctx.complete()`, with the effect written."""
    _note("book", order_id)
    await _effect(ctx, order_id, "booked", gate)


@jobs.task(retry=_soon)
async def pay(ctx: Context, order_id: int, gate: str) -> None:
    _note("pay", order_id)
    await _pass(gate)
    await _effect(ctx, order_id, await ctx.step("charge", _charge, order_id))


@jobs.task(retry=_soon)
async def tell(order_id: int, gate: str) -> None:
    """A plain task: its completion has no effects beside it."""
    _note("tell", order_id)
    await _pass(gate)
