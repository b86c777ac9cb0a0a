"""`jobs.enqueue_many`: many jobs in few statements, in order, all or none."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from jobq import Enqueued, Intent, InvalidArguments, JobQ
from jobq.outbox import enqueue as module
from jobq.settings import ARGS_LIMIT
from jobq.testing.servers import database as create_database
from tests.enqueuing import (
    OPENERS,
    asyncpg_connection,
    connection_to,
    emptied,
    engine_for,
    fetch,
    outbox,
    rolled_back,
    session,
)

jobs = JobQ()


@pytest.fixture(scope="module")
async def module_database(servers: Any, template_database: str, anyio_backend: str) -> AsyncIterator[str]:
    with create_database(servers.database_url, f"jobq_test_{uuid4().hex}", template_database) as url:
        yield url


@pytest.fixture
async def database_url(module_database: str) -> AsyncIterator[str]:
    async with emptied(module_database) as url:
        yield url


@jobs.task
def keep(value: Any) -> None: ...


@jobs.task(queue="mail")
async def send_receipt(order_id: int) -> None: ...


@asynccontextmanager
async def recorded(url: str) -> AsyncIterator[tuple[asyncpg.Connection, list[str]]]:
    """A connection in a transaction, and the statements that PostgreSQL was sent through it."""
    statements: list[str] = []
    async with asyncpg_connection(url) as connection:
        connection.add_query_logger(lambda query: statements.append(query.query))
        yield connection, statements


async def values(url: str) -> list[Any]:
    """What the jobs of `keep` carry, in the order of their ids."""
    return [json.loads(row["args"])["value"] for row in await outbox(url)]


def inserts(statements: list[str]) -> int:
    """How many statements were jobq's; asyncpg has its own, and there is the COMMIT."""
    return sum("jobq" in statement for statement in statements)


@pytest.mark.parametrize("opened", OPENERS, ids=lambda opener: opener.__name__)
async def test_many_jobs_are_written_with_the_transaction(opened, database_url):
    async with opened(database_url) as tx:
        answers = await jobs.enqueue_many(tx, [keep.job(n) for n in range(3)])
        assert await outbox(database_url) == []

    rows = await outbox(database_url)
    assert answers == [Enqueued(row["id"], created=True) for row in rows]
    assert await values(database_url) == [0, 1, 2]


async def test_25_000_jobs_take_three_statements_and_keep_their_order(database_url):
    async with recorded(database_url) as (connection, statements):
        answers = await jobs.enqueue_many(connection, (keep.job(n) for n in range(25_000)))

    assert inserts(statements) == 3
    assert await values(database_url) == list(range(25_000))
    assert [answer.id for answer in answers] == [row["id"] for row in await outbox(database_url)]
    assert all(answer.created for answer in answers)


@pytest.mark.parametrize(("number", "statements"), [(1, 1), (10_000, 1), (10_001, 2)])
async def test_a_statement_takes_ten_thousand_jobs(number, statements, database_url):
    async with recorded(database_url) as (connection, seen):
        await jobs.enqueue_many(connection, [keep.job(None)] * number)

    assert inserts(seen) == statements
    assert await fetch(database_url, "SELECT count(*) FROM jobq.outbox") == [(number,)]


async def test_sqlalchemy_sends_as_many_statements(database_url):
    seen: list[str] = []
    async with engine_for(database_url) as engine, AsyncSession(engine) as session, session.begin():
        event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
        await jobs.enqueue_many(session, [keep.job(None)] * 10_001)

    assert inserts(seen) == 2


async def test_large_arguments_are_spread_over_statements_that_postgresql_takes(database_url):
    large = "x" * (ARGS_LIMIT - 100)
    fit = module.CHARACTERS_PER_STATEMENT // ARGS_LIMIT

    async with recorded(database_url) as (connection, statements):
        await jobs.enqueue_many(connection, [keep.job(large)] * (fit + 1))

    assert inserts(statements) == 2
    assert await fetch(database_url, "SELECT count(*) FROM jobq.outbox") == [(fit + 1,)]


@pytest.mark.parametrize("opened", [session, asyncpg_connection], ids=["sqlalchemy", "asyncpg"])
@pytest.mark.parametrize("make", [list, tuple, set, iter], ids=["list", "tuple", "set", "iterator"])
async def test_nothing_to_enqueue_is_nothing_done(make, opened, database_url):
    async with opened(database_url) as tx:
        assert await jobs.enqueue_many(tx, make([])) == []

    assert await outbox(database_url) == []


async def test_no_statement_is_sent_for_no_jobs(database_url):
    async with recorded(database_url) as (connection, statements):
        await jobs.enqueue_many(connection, [])
        assert statements == []


async def test_tasks_queues_and_options_may_be_mixed(database_url):
    async with session(database_url) as tx:
        answers = await jobs.enqueue_many(
            tx,
            [
                keep.job("plain"),
                send_receipt.opts(priority=1).job(7),
                keep.opts(queue="slow", delay=timedelta(hours=1), max_attempts=3, headers={"a": "b"}).job("late"),
                send_receipt.opts(idempotency_key="8", timeout=9).job(8),
            ],
        )

    rows = await outbox(database_url)
    assert [row["id"] for row in rows] == [answer.id for answer in answers]
    columns = ("task", "queue", "args", "priority", "max_attempts", "timeout_s", "headers")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        ("keep", "default", '{"value":"plain"}', 2, None, None, None),
        ("send_receipt", "mail", '{"order_id":7}', 1, None, None, None),
        ("keep", "slow", '{"value":"late"}', 2, 3, None, '{"a":"b"}'),
        ("send_receipt", "mail", '{"order_id":8}', 2, None, 9.0, None),
    ]
    assert [row["run_at"] is not None for row in rows] == [False, False, True, False]


PLAIN: dict[str, Any] = {
    "task": "keep",
    "queue": "default",
    "args": '{"value":7}',
    "priority": 2,
    "days": None,
    "max_attempts": None,
    "timeout_s": None,
    "headers": None,
}
each_option = pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, {}),
        ({"queue": "slow"}, {"queue": "slow"}),
        ({"priority": 1}, {"priority": 1}),
        ({"delay": timedelta(days=2)}, {"days": 2}),
        ({"run_at": datetime.now(UTC) + timedelta(days=3)}, {"days": 3}),
        ({"run_at": datetime(2020, 1, 1, tzinfo=UTC)}, {}),
        ({"max_attempts": 3}, {"max_attempts": 3}),
        ({"timeout": 9}, {"timeout_s": 9.0}),
        ({"headers": {"a": "b"}}, {"headers": '{"a":"b"}'}),
    ],
    ids=lambda value: next(iter(value), "-"),
)


async def stored(url: str) -> list[dict[str, Any]]:
    """What the rows say of their jobs, in the order of their ids; `days` is about how long until they are due."""
    rows = await fetch(
        url,
        "SELECT task, queue, args, priority, CAST(extract(epoch FROM run_at - created_at) / 86400 AS int) AS days,"
        " max_attempts, timeout_s, headers FROM jobq.outbox ORDER BY id",
    )
    return [dict(row) for row in rows]


@each_option
@pytest.mark.parametrize("opened", [session, asyncpg_connection], ids=["sqlalchemy", "asyncpg"])
async def test_an_option_is_stored_whether_jobs_come_one_by_one_or_as_many_with_it(
    opened, options, changed, database_url
):
    async with opened(database_url) as tx:
        await keep.opts(**options).enqueue(tx, 7)
        await jobs.enqueue_many(tx, [keep.opts(**options).job(number) for number in (8, 9)])

    expected = PLAIN | changed
    assert await stored(database_url) == [expected | {"args": f'{{"value":{number}}}'} for number in (7, 8, 9)]


@each_option
@pytest.mark.parametrize("place", [0, 1, 2])
async def test_one_job_of_many_keeps_its_option_to_itself(place, options, changed, database_url):
    intents = [keep.opts(**options).job(7) if number == place else keep.job(7) for number in range(3)]

    async with asyncpg_connection(database_url) as tx:
        await jobs.enqueue_many(tx, intents)

    assert await stored(database_url) == [PLAIN | changed if number == place else PLAIN for number in range(3)]


async def test_one_job_of_another_task_keeps_it_to_itself(database_url):
    async with session(database_url) as tx:
        await jobs.enqueue_many(tx, [keep.job(7), send_receipt.opts(queue="default").job(7)])

    assert [row["task"] for row in await outbox(database_url)] == ["keep", "send_receipt"]


async def test_a_job_instead_of_many_is_a_type_error(database_url):
    async with session(database_url) as tx:
        with pytest.raises(TypeError, match="'Intent' object is not iterable"):
            await jobs.enqueue_many(tx, keep.job(7))  # type: ignore[arg-type]

    assert await outbox(database_url) == []


async def test_the_second_job_with_a_key_in_one_call_is_the_first_one(database_url):
    intents = [
        keep.opts(idempotency_key="a").job("first"),
        keep.job("no key"),
        keep.opts(idempotency_key="a").job("again"),
        send_receipt.opts(idempotency_key="a").job(7),
        keep.opts(idempotency_key="a").job("and again"),
    ]

    async with session(database_url) as tx:
        answers = await jobs.enqueue_many(tx, intents)

    first, plain, again, other_task, and_again = answers
    assert again == and_again == Enqueued(first.id, created=False)
    assert (first.created, plain.created, other_task.created) == (True, True, True)
    assert {row["id"] for row in await outbox(database_url)} == {first.id, plain.id, other_task.id}


async def test_a_key_that_an_earlier_call_has_taken_answers_with_its_job_wherever_it_stands(database_url):
    async with session(database_url) as tx:
        earlier = await keep.opts(idempotency_key="b").enqueue(tx, "earlier")
    keys = ["a", "b", None, "c", "b"]

    async with session(database_url) as tx:
        answers = await jobs.enqueue_many(tx, [keep.opts(idempotency_key=key).job(key) for key in keys])

    assert [answer.created for answer in answers] == [True, False, True, True, False]
    assert answers[1].id == answers[4].id == earlier.id
    assert await values(database_url) == ["earlier", "a", None, "c"]


async def test_keys_may_repeat_over_the_statements_of_one_call(database_url):
    number = module.ROWS_PER_STATEMENT + 500
    keys = [f"{n % (number - 100)}" for n in range(number)]

    async with recorded(database_url) as (connection, statements):
        answers = await jobs.enqueue_many(connection, [keep.opts(idempotency_key=key).job(key) for key in keys])

    assert inserts(statements) == 2
    assert [answer.created for answer in answers] == [True] * (number - 100) + [False] * 100
    assert [answer.id for answer in answers[-100:]] == [answer.id for answer in answers[:100]]
    assert await values(database_url) == keys[: number - 100]


async def test_a_wrong_job_anywhere_in_a_generator_leaves_nothing(database_url):
    def intents() -> Iterator[Intent]:
        yield from (send_receipt.job(n) for n in range(12_000))
        yield send_receipt.job("x")  # type: ignore[arg-type]

    async with session(database_url) as tx:
        with pytest.raises(InvalidArguments, match="order_id"):
            await jobs.enqueue_many(tx, intents())

    assert await outbox(database_url) == []


async def test_a_failure_in_a_later_statement_leaves_nothing(database_url):
    # What no client of ours sends: the database refuses it in the second statement, after ten thousand rows.
    refused = Intent(task="keep", queue="Not A Queue", args="{}")
    intents = [*[keep.job(n) for n in range(module.ROWS_PER_STATEMENT)], refused]

    async with rolled_back(session(database_url)) as tx:
        with pytest.raises(DBAPIError, match="outbox_queue_is_a_name"):
            await jobs.enqueue_many(tx, intents)
    async with connection_to(database_url) as connection:
        with pytest.raises(asyncpg.CheckViolationError):
            async with connection.transaction():
                await jobs.enqueue_many(connection, intents)

    assert await outbox(database_url) == []


async def test_ids_can_be_used_before_the_commit(database_url):
    async with session(database_url) as tx:
        [job] = await jobs.enqueue_many(tx, [keep.job(1)])
        assert isinstance(job.id, UUID)
        assert await jobs.cancel(tx, job.id)

    assert await outbox(database_url) == []
