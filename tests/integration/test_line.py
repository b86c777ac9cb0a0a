"""A connection that a part of the worker keeps for itself: used by one at a time, and never after an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from jobq.outbox import database as database_module
from jobq.outbox import line as line_module
from jobq.outbox import settle
from jobq.outbox.database import Database
from jobq.outbox.line import Line
from tests.faults.proxy import postgres_proxy
from tests.waiting import until


@pytest.fixture
async def line(shared_database_url: str) -> AsyncIterator[Line]:
    database = Database.of(shared_database_url)
    line = Line(database, "jobq", "jobq:test")
    yield line
    await line.close()
    await database.close()


async def test_the_same_connection_serves_again_and_again(line: Line) -> None:
    async with line.open() as first:
        name = await first.fetchval("SELECT current_setting('application_name')")
    async with line.open() as second:
        pass

    assert second is first
    assert name == "jobq:test"


async def test_statements_that_come_again_and_again_are_planned_once(line: Line) -> None:
    async with line.open() as connection:
        for number in range(10):
            await settle.read(connection, "jobq", [uuid4()])
            await settle.complete(connection, "jobq", [(uuid4(), number + 1)])
        query = "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement LIKE $1"
        planned = await connection.fetch(query, '%"jobq".outbox%')

    assert [tuple(counts) for counts in planned] == [(10, 0), (10, 0)]


async def test_a_connection_that_saw_an_error_is_not_used_again(line: Line) -> None:
    with pytest.raises(LookupError):
        async with line.open() as first:
            raise LookupError
    async with line.open() as second:
        assert await second.fetchval("SELECT 1") == 1

    assert second is not first
    assert first.is_closed()


async def test_a_cancelled_use_closes_the_connection(line: Line) -> None:
    entered = asyncio.Event()

    async def use() -> None:
        async with line.open() as connection:
            entered.set()
            await connection.execute("SELECT pg_sleep(60)")

    using = asyncio.create_task(use())
    await entered.wait()
    using.cancel()
    await asyncio.gather(using, return_exceptions=True)

    async with line.open() as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def test_a_connection_that_was_cut_is_opened_anew(line: Line) -> None:
    async with line.open() as first:
        pass
    first.terminate()
    await until(first.is_closed, "it is closed")

    async with line.open() as second:
        assert await second.fetchval("SELECT 1") == 1


async def test_one_user_at_a_time(line: Line) -> None:
    inside: list[str] = []

    async def use(name: str) -> None:
        async with line.open() as connection:
            inside.append(f"{name} in")
            await connection.execute("SELECT 1")
            inside.append(f"{name} out")

    await asyncio.gather(use("a"), use("b"))

    assert inside == ["a in", "a out", "b in", "b out"]


async def test_a_network_that_swallows_everything_raises_after_the_deadline(
    shared_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with postgres_proxy(shared_database_url) as (proxy, through):
        database = Database.of(through)
        line = Line(database, "jobq", "jobq:test")
        async with line.open():
            pass
        proxy.is_black_hole = True

        with monkeypatch.context() as patched:
            patched.setattr(line_module, "DEADLINE_S", 0.1)
            with pytest.raises(TimeoutError):
                async with line.open() as connection:
                    await connection.execute("SELECT 1")
            # And while it connects.
            with pytest.raises(TimeoutError):
                async with line.open():
                    pass

        proxy.is_black_hole = False
        proxy.cut()
        async with line.open() as connection:
            assert await connection.fetchval("SELECT 1") == 1
        await line.close()
        await database.close()


async def test_closing_a_connection_that_leads_nowhere_is_no_error(shared_database_url: str) -> None:
    async with postgres_proxy(shared_database_url) as (proxy, through):
        database = Database.of(through)
        line = Line(database, "jobq", "jobq:test")
        async with line.open() as connection:
            pass
        proxy.half_open()

        await line.close()

        assert connection.is_closed()
        await database.close()


async def test_an_engine_of_jobqs_own_is_closed_although_a_connection_leads_nowhere(
    shared_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_CLOSE_TIMEOUT_S", 0.2)
    async with postgres_proxy(shared_database_url) as (proxy, through):
        database = Database.of(through)
        async with database.engine.connect(), database.engine.connect():
            pass
        proxy.half_open()

        await database.close()

        await until(lambda: proxy.clients == 0, "nothing is open")
