"""The application whose processes are killed: every run, effect, call and alert leaves a row, whatever comes after.

Runs and calls are noted at once, in a statement that commits by itself. `inside` and `inside_hook` are places to
die in.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from jobq import Context, JobQ, Reject, Retry

TABLES = """
    CREATE TABLE run (id bigserial, job_id uuid, task text, generation int, crashes int, attempts int);
    CREATE TABLE call (job_id uuid);
    CREATE TABLE alert (job_id uuid);
"""


noted: set[bytes] = set()
"""Ids of the jobs of which this process has noted a run, as they stand in entries."""


async def inside() -> None:
    """The block of `ctx.complete()`, with its effect written."""


async def inside_hook() -> None:
    """The hook, with its alert written."""


def application(*, release: int) -> JobQ:  # noqa: C901  all its tasks
    """Release 2 has one task more."""
    jobs = JobQ()

    @jobs.task
    async def book(ctx: Context) -> None:
        await _note_run(ctx)
        await _complete(ctx)

    @jobs.task
    async def plain(ctx: Context) -> None:
        await _note_run(ctx)

    @jobs.task
    async def wait(ctx: Context) -> None:
        """Take for ever, the first time."""
        await _note_run(ctx)
        if ctx._job.generation == 1:
            await asyncio.Event().wait()
        await _complete(ctx)

    @jobs.task
    async def retry(ctx: Context) -> None:
        await _note_run(ctx)
        if ctx.attempt == 1:
            raise Retry(delay=0)
        await _complete(ctx)

    @jobs.task
    async def reject(ctx: Context) -> None:
        await _note_run(ctx)
        raise Reject("no")

    @jobs.task
    async def charge(ctx: Context) -> None:
        await _note_run(ctx)
        await ctx.step("charge", _call, _engine(ctx), ctx.id)
        await _complete(ctx)

    @jobs.on_dead
    async def alert(session: AsyncSession, job: Any) -> None:
        await session.execute(text("INSERT INTO alert (job_id) VALUES (:job_id)"), {"job_id": job.id})
        await inside_hook()

    if release == 2:

        @jobs.task
        async def later(ctx: Context) -> None:
            await _note_run(ctx)
            await _complete(ctx)

    return jobs


jobs = application(release=1)
newer = application(release=2)


async def enqueue_one() -> None:
    """What a process of the application does: one transaction, with data of its own and a job."""
    jobs.connect_to(database=os.environ["JOBQ_DATABASE_URL"])
    await place_order(jobs)


async def place_order(jobs: JobQ, **options: Any) -> UUID:
    async with jobs.database.sessions.begin() as session:
        return (await jobs.tasks["book"].opts(idempotency_key="order 1", **options).enqueue(session)).id


async def _complete(ctx: Context) -> None:
    async with ctx.complete() as session:
        await session.execute(text("INSERT INTO effect (job_id) VALUES (:job_id)"), {"job_id": ctx.id})
        await inside()


async def _note_run(ctx: Context) -> None:
    job = ctx._job
    await _note(
        _engine(ctx),
        "INSERT INTO run (job_id, task, generation, crashes, attempts)"
        " VALUES (:id, :task, :generation, :crashes, :attempts)",
        {
            "id": job.id,
            "task": job.task,
            "generation": job.generation,
            "crashes": job.crashes,
            "attempts": job.attempts,
        },
    )
    noted.add(job.id.hex.encode())


async def _call(engine: AsyncEngine, job_id: UUID) -> None:
    await _note(engine, "INSERT INTO call (job_id) VALUES (:id)", {"id": job_id})


async def _note(engine: AsyncEngine, statement: str, values: dict[str, Any]) -> None:
    async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        await connection.execute(text(statement), values)


def _engine(ctx: Context) -> AsyncEngine:
    sessions = ctx._run.sessions
    assert sessions is not None
    engine = sessions.kw["bind"]
    assert isinstance(engine, AsyncEngine)
    return engine
