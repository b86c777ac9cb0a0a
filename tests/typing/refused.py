"""Calls that type checkers must refuse: an error on each line marked so, and on no other.

Checked by test_source, never executed.
"""

from __future__ import annotations

import asyncpg
import psycopg
from alembic import op
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from jobq import Context, JobQ, RetryPolicy, migrate
from jobq.testing import Crashes, enqueued, run_pending

jobs = JobQ()


class State:
    name: str


@jobs.task
async def bare(ctx: Context[State], order_id: int, *, locale: str = "en") -> None:
    print(ctx.state.nickname)  # refused
    ctx.state = State()
    await ctx.complete()  # refused


@jobs.task(queue="mail")
async def with_options(ctx: Context[State], order_id: int, *, locale: str = "en") -> None: ...


@jobs.task
async def without_context(order_id: int) -> int:
    return order_id


@jobs.task
def synchronous(order_id: int) -> str:
    return str(order_id)


@jobs.task
async def bare_context(ctx: Context, order_id: int) -> None:
    print(ctx.state.name)  # refused


async def render(order_id: int) -> str:
    return str(order_id)


@jobs.task
async def with_steps(ctx: Context, order_id: int) -> None:
    await ctx.step("render", render)  # refused
    await ctx.step("render", render, "7")  # refused
    await ctx.step("render", render, 7, region="eu")  # refused
    await ctx.step("render", render(7))  # refused
    await ctx.step(render, 7)  # refused
    await ctx.step(name="render", function=render, order_id=7)  # refused
    print(await ctx.step("render", render, 7) + 1)  # refused


async def the_transaction_comes_first(session: AsyncSession) -> None:
    await bare.enqueue(7)  # refused
    await bare.enqueue()  # refused
    await bare.enqueue(order_id=7)  # refused
    await bare.enqueue(7, session)  # refused
    await bare.enqueue(tx=session, order_id=7)  # refused
    await with_options.enqueue(7)  # refused
    await without_context.enqueue(7)  # refused
    await synchronous.enqueue(7)  # refused
    await bare_context.enqueue(7)  # refused
    await jobs.enqueue_many([bare.job(7)])  # refused


async def a_transaction_is_one(
    ctx: Context[State],
    session: Session,
    connection: Connection,
    engine: AsyncEngine,
    maker: async_sessionmaker[AsyncSession],
    pool: asyncpg.Pool[asyncpg.Record],
) -> None:
    await bare.enqueue(session, 7)  # refused
    await bare.enqueue(connection, 7)  # refused
    await bare.enqueue(engine, 7)  # refused
    await bare.enqueue(maker, 7)  # refused
    await bare.enqueue(pool, 7)  # refused
    await bare.enqueue(ctx, 7)  # refused
    await bare.enqueue(None, 7)  # refused
    await jobs.enqueue_many(session, [bare.job(7)])  # refused
    await jobs.cancel(engine, 7)  # refused


async def wrong_types(session: AsyncSession) -> None:
    await bare.enqueue(session, "7")  # refused
    await bare.enqueue(session, 7, locale=5)  # refused
    await bare.enqueue(session, order_id=None)  # refused
    await with_options.enqueue(session, "7")  # refused
    await without_context.enqueue(session, "7")  # refused
    await synchronous.enqueue(session, "7")  # refused
    await bare_context.enqueue(session, "7")  # refused
    await bare.opts(priority=1).enqueue(session, "7")  # refused
    bare.job("7")  # refused


async def missing_arguments(session: AsyncSession) -> None:
    await bare.enqueue(session)  # refused
    await bare.enqueue(session, locale="sv")  # refused
    await with_options.enqueue(session)  # refused
    await without_context.enqueue(session)  # refused
    await synchronous.enqueue(session)  # refused
    await bare_context.enqueue(session)  # refused
    bare.job()  # refused


async def unknown_arguments(session: AsyncSession) -> None:
    await bare.enqueue(session, 7, region="eu")  # refused
    await bare.enqueue(session, 7, "sv")  # refused
    await with_options.enqueue(session, 7, region="eu")  # refused
    await without_context.enqueue(session, 7, region="eu")  # refused
    await bare.enqueue(session, 7, delay=5)  # refused
    await bare.enqueue(session, 7, priority=1)  # refused
    bare.job(7, region="eu")  # refused


def statements(session: Session, connection: Connection, cursor: psycopg.Cursor[tuple[object, ...]]) -> None:
    session.execute(bare.insert("7"))  # refused
    session.execute(bare.insert())  # refused
    session.execute(bare.insert(session, 7))  # refused
    session.execute(bare.insert(7, region="eu"))  # refused
    session.execute(bare.opts(priority=1).insert("7"))  # refused
    connection.execute(with_options.insert(7, locale=5))  # refused
    connection.execute(bare.sql(7))  # refused
    cursor.execute(*bare.sql("7"))  # refused
    cursor.execute(*bare.sql())  # refused
    cursor.execute(*bare.sql(7, delay=5))  # refused
    cursor.execute(*synchronous.sql(cursor, 7))  # refused
    cursor.execute(bare.insert(7))  # refused


async def the_context_is_jobqs_to_give(session: AsyncSession, ctx: Context[State]) -> None:
    await bare.enqueue(session, ctx, 7)  # refused
    await bare.enqueue(session, 7, ctx=ctx)  # refused
    await with_options.enqueue(session, ctx, 7)  # refused
    await bare_context.enqueue(session, ctx, 7)  # refused
    bare.job(ctx, 7)  # refused


async def a_call_is_the_functions(ctx: Context[State]) -> None:
    await bare(7)  # refused
    await bare(ctx, "7")  # refused
    await bare(ctx, 7, "sv")  # refused
    await synchronous(7)  # refused
    print(await without_context(7) + "x")  # refused
    await bare_context(7)  # refused


async def a_context_has_one_state(ctx: Context, other: Context[int]) -> None:
    await bare(ctx, 7)  # refused
    await bare(other, 7)  # refused


async def options(session: AsyncSession) -> None:
    bare.opts(unique=True)  # refused
    bare.opts(delay="5")  # refused
    bare.opts(run_at="tomorrow")  # refused
    bare.opts(priority="1")  # refused
    bare.opts(headers={"a": 1})  # refused
    bare.opts(5)  # refused
    await jobs.enqueue_many(session, [7])  # refused
    await jobs.enqueue_many(session, bare.job(7))  # refused
    await jobs.enqueue_many(session, [bare])  # refused


@jobs.task(que="mail")  # refused
async def misspelt() -> None: ...


@jobs.task(timeout="30")  # refused
async def slow() -> None: ...


@jobs.task("mail")  # refused
async def positional() -> None: ...


@jobs.on_dead  # refused
async def alert(session: AsyncSession) -> None: ...


def configuration(engine: Session) -> None:
    JobQ(database=engine)  # refused
    JobQ("postgresql://localhost/shop")  # refused
    JobQ(redis=6379)  # refused
    RetryPolicy(never=ValueError)  # refused
    RetryPolicy(3)  # refused
    RetryPolicy(max_attempts=3).max_attempts = 5  # refused


async def migrations(engine: AsyncEngine) -> None:
    migrate.upgrade(op)  # refused
    migrate.upgrade(op, to=1)  # refused
    migrate.upgrade(op, to="jobq_0001", lock_timeout=5)  # refused
    migrate.downgrade(op)  # refused
    await migrate.upgrade(engine, since="base")  # refused
    await migrate.downgrade(engine)  # refused


async def tests_of_an_application(session: AsyncSession, engine: AsyncEngine, crashes: Crashes) -> None:
    await enqueued(engine, bare)  # refused
    await enqueued(bare)  # refused
    await enqueued(session, bare.job(7))  # refused
    assert await enqueued(session, bare) == [bare.job("7")]  # refused
    await run_pending(session)  # refused
    await run_pending(jobs, advance="1h")  # refused
    Crashes(jobs)  # refused
    await crashes.at("at_lunch")  # refused
    await crashes.before_commit(bare.job(7))  # refused
