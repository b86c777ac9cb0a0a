"""The limits of what a job may carry hold in every way in, and what lies just inside them goes all the way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from jobq import InvalidArguments, JobQ, RetryPolicy, Task
from jobq.settings import ARGS_LIMIT, ERROR_LIMIT
from tests.builders import Bench, turn
from tests.commands import Commands
from tests.enqueuing import engine_for

LARGEST = "x" * (ARGS_LIMIT - len('{"value":""}'))
WIDE = "\N{GRINNING FACE}"
NAME, KEY = WIDE * 128, WIDE * 500
HEADERS = {"é": "é" * (ARGS_LIMIT // 2 - 5)}
jobs = JobQ()


@jobs.task(name=NAME, aliases=[f"{WIDE * 127}a"])
async def carry(value: str) -> None: ...


Way = Callable[[str, Task[..., Any, Any], str], Awaitable[None]]


async def by_session(url: str, task: Task[..., Any, Any], value: str) -> None:
    async with engine_for(url) as engine, AsyncSession(engine) as session, session.begin():
        await task.enqueue(session, value)


async def by_connection(url: str, task: Task[..., Any, Any], value: str) -> None:
    async with engine_for(url) as engine, engine.begin() as connection:
        await task.enqueue(connection, value)


async def by_asyncpg(url: str, task: Task[..., Any, Any], value: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            await task.enqueue(connection, value)
    finally:
        await connection.close()


async def by_many(url: str, task: Task[..., Any, Any], value: str) -> None:
    async with engine_for(url) as engine, engine.begin() as connection:
        await jobs.enqueue_many(connection, [task.job(value)])


async def by_insert(url: str, task: Task[..., Any, Any], value: str) -> None:
    def execute() -> None:
        engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
        try:
            with engine.begin() as connection:
                connection.execute(task.insert(value))
        finally:
            engine.dispose()

    await asyncio.to_thread(execute)


async def by_sql(url: str, task: Task[..., Any, Any], value: str) -> None:
    def execute() -> None:
        with psycopg.connect(url) as connection:
            connection.execute(*task.sql(value))

    await asyncio.to_thread(execute)


every_way = pytest.mark.parametrize("way", [by_session, by_connection, by_asyncpg, by_many, by_insert, by_sql])


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


@every_way
async def test_what_is_too_large_is_refused_in_every_way_before_anything_is_written(
    shared_database_url: str, bench: Bench, way: Way
) -> None:
    for task, value in ((carry, LARGEST + "x"), (carry, "é" * (ARGS_LIMIT // 2))):
        with pytest.raises(InvalidArguments, match="the limit is"):
            await way(shared_database_url, task, value)

    assert await bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0


@every_way
async def test_what_is_just_small_enough_goes_in_in_every_way(shared_database_url: str, bench: Bench, way: Way) -> None:
    await way(shared_database_url, carry.opts(idempotency_key=KEY, headers=HEADERS), LARGEST)

    row = await bench.db.fetchrow("SELECT octet_length(args::text) AS size, task, headers FROM jobq.outbox")
    assert row is not None
    assert (row["size"], row["task"], json.loads(row["headers"])) == (ARGS_LIMIT, NAME, HEADERS)


def test_options_that_are_too_large_are_refused() -> None:
    for wrong in (
        {"idempotency_key": KEY + "a"},
        {"headers": {"a": "x" * ARGS_LIMIT}},
        {"queue": "q" * 65},
        {"delay": 1e300},
        {"max_attempts": 2**15},
    ):
        with pytest.raises(InvalidArguments):
            carry.opts(**wrong)  # type: ignore[arg-type]


async def test_the_largest_job_with_the_largest_error_dies_and_comes_back(
    bench: Bench, shared_database_url: str, redis_url: str
) -> None:
    kind = type("E" * 5_000, (Exception,), {})

    @bench.app.task(name=NAME, retry=RetryPolicy(max_attempts=1))
    async def fails(value: str) -> None:
        raise kind("\0" + "x" * 1_000_000)

    task = fails.opts(headers=HEADERS)
    job_id = await bench.commit_and_relay(task, LARGEST)
    await turn(await bench.worker())
    dead = await bench.dead(job_id)
    assert dead is not None
    assert (len(dead["last_error"]), len(dead["error_type"])) == (ERROR_LIMIT, 200)

    result = await Commands(shared_database_url, redis_url).run("dead", "retry", job_id)

    assert result.exit_code == 0, result.output
    row = await bench.row(job_id)
    assert row is not None
    assert (row["generation"], len(row["args"])) == (2, ARGS_LIMIT)
