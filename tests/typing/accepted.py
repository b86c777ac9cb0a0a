"""Calls that type checkers must accept, and the types they must see. Checked by test_source, never executed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type
from uuid import UUID

import asyncpg
import psycopg
from alembic import op
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session

from jobq import Context, DeadJob, Enqueued, Intent, JobQ, Reject, Retry, RetryPolicy, Snooze, Task, migrate
from jobq.testing import CRASH_POINTS, Attempt, Crashes, CrashPoint, EnqueuedJob, enqueued, run_pending


class Http:
    async def post(self, url: str, *, headers: dict[str, str]) -> int:
        raise NotImplementedError


class State:
    http: Http


class BadAddress(Exception):
    pass


@asynccontextmanager
async def lifespan() -> AsyncIterator[State]:
    yield State()


AsyncSessions = async_sessionmaker[AsyncSession]()
jobs = JobQ(database=AsyncSessions, redis="redis://localhost", lifespan=lifespan)
JobQ()
JobQ(database="postgresql://localhost/shop", schema="work")


# The forms of a task


@jobs.task
async def bare(ctx: Context[State], order_id: int, *, locale: str = "en") -> None:
    assert_type(ctx.state, State)
    assert_type(await ctx.state.http.post("/", headers=dict(ctx.headers)), int)
    raise Retry(delay=2.5)


@jobs.task(queue="mail", retry=RetryPolicy(max_attempts=8, never=(BadAddress,)), timeout=30)
async def with_options(ctx: Context[State], order_id: int, *, locale: str = "en") -> None:
    raise Reject("no such address")


@jobs.task()
async def with_empty_brackets(order_id: int) -> None:
    raise Snooze(timedelta(hours=1))


@jobs.task
async def without_context(order_id: int, note: str | None = None) -> int:
    return order_id


@jobs.task
def synchronous(order_id: int) -> str:
    return str(order_id)


@jobs.task(aliases=["old_name"], timeout=timedelta(minutes=1))
def synchronous_with_context(ctx: Context[State], order_id: int) -> str:
    return f"{ctx.state} {order_id}"


@jobs.task
async def bare_context(ctx: Context, invoice_id: int) -> None:
    assert_type(ctx.id, UUID)
    assert_type(ctx.attempt, int)
    assert_type(ctx.stopping, bool)
    async with ctx.complete() as session:
        assert_type(session, AsyncSession)
        await bare.enqueue(session, invoice_id)


@jobs.task
async def no_arguments() -> None: ...


@jobs.task(name="only.context")
async def only_context(ctx: Context) -> None: ...


@jobs.on_dead
async def alert(session: AsyncSession, job: DeadJob) -> None:
    await with_options.enqueue(session, 7)


class Gateway:
    async def charge(self, invoice_id: int, *, currency: str = "SEK") -> UUID:
        raise NotImplementedError


async def load(name: str) -> dict[str, int]:
    raise NotImplementedError


def render(invoice_id: int) -> str:
    return str(invoice_id)


@jobs.task
async def with_steps(ctx: Context, invoice_id: int, gateway: Gateway) -> None:
    assert_type(await ctx.step("charge", gateway.charge, invoice_id, currency="EUR"), UUID)
    assert_type(await ctx.step("render", render, invoice_id), str)
    assert_type(await ctx.step("load", load, name="a parameter of the function's own"), dict[str, int])
    assert_type(await ctx.step("lambda", lambda: gateway.charge(invoice_id)), UUID)
    assert_type(await ctx.step("task", without_context, invoice_id), int)
    assert_type(ctx.idempotency_key("charge"), str)


# Every transaction


async def every_transaction(
    session: AsyncSession,
    connection: AsyncConnection,
    scoped: async_scoped_session[AsyncSession],
    driver: asyncpg.Connection[asyncpg.Record],
    pool: asyncpg.Pool[asyncpg.Record],
) -> None:
    for tx in (session, connection, scoped):
        await bare.enqueue(tx, 7)
    await bare.enqueue(driver, 7)
    async with pool.acquire() as proxy, proxy.transaction():
        await bare.enqueue(proxy, 7)
        await jobs.enqueue_many(proxy, [bare.job(7)])
        await jobs.cancel(proxy, UUID(int=7))


async def every_form(session: AsyncSession) -> None:
    assert_type(await bare.enqueue(session, 7), Enqueued)
    await bare.enqueue(session, 7, locale="sv")
    await bare.enqueue(session, order_id=7, locale="sv")
    await with_options.enqueue(session, 7, locale="sv")
    await with_empty_brackets.enqueue(session, 7)
    await without_context.enqueue(session, 7)
    await without_context.enqueue(session, 7, None)
    await without_context.enqueue(session, 7, note="x")
    await synchronous.enqueue(session, 7)
    await synchronous_with_context.enqueue(session, 7)
    await bare_context.enqueue(session, 7)
    await no_arguments.enqueue(session)
    await only_context.enqueue(session)


# Statements, for synchronous drivers


def every_driver(
    sync_session: Session, sync_connection: Connection, cursor: psycopg.Cursor[tuple[UUID, bool]], order_id: int
) -> None:
    _id, _created = sync_session.execute(bare.insert(order_id, locale="sv")).one()
    sync_connection.execute(synchronous.opts(delay=5).insert(order_id=order_id))
    cursor.execute(*bare.sql(order_id, locale="sv"))
    cursor.execute(*without_context.opts(idempotency_key="order:7").sql(order_id))
    psycopg.ClientCursor(cursor.connection).execute(*no_arguments.sql())
    queries = [bare.sql(number) for number in range(3)]
    cursor.executemany(queries[0][0], [values for _, values in queries])


async def every_async_driver(session: AsyncSession, cursor: psycopg.AsyncCursor[tuple[UUID, bool]]) -> None:
    assert_type((await session.execute(bare.insert(7))).one().created, Any)
    await cursor.execute(*bare.sql(7))


# Options, intents, answers


async def options(session: AsyncSession, ids: list[int]) -> None:
    urgent = with_options.opts(
        delay=5,
        priority=1,
        queue="mail",
        max_attempts=3,
        timeout=timedelta(seconds=1),
        idempotency_key="order:7",
        idempotency_ttl=3600.0,
        headers={"traceparent": "00"},
    )
    job = await urgent.enqueue(session, 7, locale="sv")
    assert_type(job.id, UUID)
    assert_type(job.created, bool)
    await bare.opts(run_at=datetime.now(UTC)).opts(priority=1).enqueue(session, 7)
    assert_type(bare.job(7, locale="sv"), Intent)
    assert_type(await jobs.enqueue_many(session, (bare.job(id_) for id_ in ids)), list[Enqueued])
    await jobs.enqueue_many(session, [synchronous.job(7), bare.opts(delay=1).job(8)])
    assert_type(await jobs.cancel(session, job.id), bool)


# A task is still its function


async def still_a_function(ctx: Context[State]) -> None:
    assert_type(await bare(ctx, 7), None)
    await with_options(ctx, 7, locale="sv")
    assert_type(await without_context(7), int)
    await bare_context(ctx, 7)
    assert_type(synchronous(7), str)
    assert_type(synchronous_with_context(ctx, 7), str)
    await no_arguments()


def any_task(task: Task[..., Any, Any]) -> str:
    return task.name


any_task(bare)
any_task(synchronous)


async def databases(engine: AsyncEngine) -> None:
    JobQ(database=engine)
    await migrate.upgrade(engine)
    await migrate.downgrade(engine, "base", schema="work", lock_timeout=1)


def a_revision_of_the_application() -> None:
    migrate.upgrade(op, to="jobq_0001")
    migrate.upgrade(op, "jobq_0001", since="base", schema="work")
    migrate.downgrade(op, since="jobq_0001", to="base")


def policies() -> None:
    RetryPolicy(delay=lambda attempt, error: attempt * 2.0)


# Tests of an application


async def tests(
    session: AsyncSession, connection: AsyncConnection, driver: asyncpg.Connection[asyncpg.Record], engine: AsyncEngine
) -> None:
    assert_type(await enqueued(session, bare), list[EnqueuedJob])
    assert await enqueued(driver, bare) == [bare.job(7, locale="sv"), bare.opts(delay=5).job(8)]
    assert await enqueued(connection) == [synchronous.job(7), only_context.job()]
    assert_type(await run_pending(jobs), list[Attempt])
    for attempt in await run_pending(jobs, advance=timedelta(days=1), raises=False, state=State(), database=connection):
        assert_type(attempt.error, BaseException | None)
    async with Crashes(jobs, redis="redis://localhost", database=engine) as crashes:
        assert_type(await crashes.before_commit(bare), UUID)
        for point in CRASH_POINTS:
            assert_type(point, CrashPoint)
            await crashes.at(point)
