"""`task.enqueue`: a job with the caller's transaction or not at all, and refusals that leave it usable."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, registry, scoped_session, sessionmaker

from jobq import ConfigurationError, Context, Enqueued, InvalidArguments, JobQ, NotInTransaction, migrate
from jobq.settings import ARGS_LIMIT
from jobq.testing.servers import database as create_database
from tests.enqueuing import (
    OPENERS,
    asyncpg_connection,
    connection_to,
    emptied,
    engine_for,
    execute,
    fetch,
    outbox,
    rolled_back,
    savepoint,
    session,
)

jobs = JobQ(redis="redis://127.0.0.1:1")  # nothing listens there, and nothing may ask
SECRET = "hunter2"


@pytest.fixture(scope="module")
async def module_database(servers: Any, template_database: str, anyio_backend: str) -> AsyncIterator[str]:
    with create_database(servers.database_url, f"jobq_test_{uuid4().hex}", template_database) as url:
        yield url


@pytest.fixture
async def database_url(module_database: str) -> AsyncIterator[str]:
    async with emptied(module_database) as url:
        yield url


@jobs.task(queue="mail")
async def send_receipt(ctx: Context[Any], order_id: int, *, locale: str = "en") -> None: ...


@jobs.task
def keep(value: Any) -> None: ...


@dataclass
class Line:
    price: float
    note: Any = None


@jobs.task
def book(line: Line) -> None: ...


opened = pytest.mark.parametrize("opened", OPENERS, ids=lambda opener: opener.__name__)


@pytest.fixture
async def orders(database_url: str) -> None:
    """A table of the application's own."""
    await fetch(database_url, "CREATE TABLE orders (id int PRIMARY KEY)")


async def order_ids(url: str) -> list[int]:
    return [row["id"] for row in await fetch(url, "SELECT id FROM orders ORDER BY id")]


# With the transaction, or not at all


@opened
@pytest.mark.usefixtures("orders")
async def test_a_job_is_there_after_the_commit_and_not_before(opened, database_url):
    async with opened(database_url) as tx:
        await execute(tx, "INSERT INTO orders VALUES (7)")
        job = await send_receipt.enqueue(tx, 7, locale="sv")
        assert await outbox(database_url) == []

    [row] = await outbox(database_url)
    assert job == Enqueued(row["id"], created=True)
    assert await order_ids(database_url) == [7]


@opened
async def test_enqueue_may_be_the_first_statement_of_a_transaction(opened, database_url):
    async with opened(database_url) as tx:
        job = await send_receipt.enqueue(tx, 7)

    assert [row["id"] for row in await outbox(database_url)] == [job.id]


@opened
@pytest.mark.usefixtures("orders")
async def test_a_job_is_never_there_after_a_rollback(opened, database_url):
    async with rolled_back(opened(database_url)) as tx:
        await send_receipt.enqueue(tx, 7)
        await execute(tx, "INSERT INTO orders VALUES (7)")
        await jobs.enqueue_many(tx, [send_receipt.job(8), send_receipt.opts(idempotency_key="9").job(9)])

    assert await outbox(database_url) == []
    assert await fetch(database_url, "SELECT FROM jobq.idempotency_key") == []
    assert await order_ids(database_url) == []


@opened
async def test_a_savepoint_takes_its_jobs_with_it_and_leaves_the_others(opened, database_url):
    async with opened(database_url) as tx:
        before = await send_receipt.enqueue(tx, 1)
        async with rolled_back(savepoint(tx)):
            await send_receipt.enqueue(tx, 2)
        async with savepoint(tx):
            inside = await send_receipt.enqueue(tx, 3)
        after = await send_receipt.enqueue(tx, 4)

    assert [row["id"] for row in await outbox(database_url)] == [before.id, inside.id, after.id]


@pytest.mark.usefixtures("orders")
async def test_what_the_session_holds_is_written_before_the_job(database_url):
    class Order:
        def __init__(self, id: int):  # noqa: A002
            self.id = id

    orders = Table("orders", MetaData(), Column("id", Integer, primary_key=True))
    registry().map_imperatively(Order, orders)
    sent: list[str] = []
    async with engine_for(database_url) as engine, AsyncSession(engine) as session, session.begin():
        event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
        session.add(Order(7))
        await send_receipt.enqueue(session, 7)

    assert [statement.split("(")[0].strip() for statement in sent] == [
        "INSERT INTO orders",
        'INSERT INTO "jobq".outbox',
    ]


async def test_a_session_that_is_closed_without_a_commit_leaves_nothing(database_url):
    async with engine_for(database_url) as engine, AsyncSession(engine) as session:
        await send_receipt.enqueue(session, 7)

    assert await outbox(database_url) == []


async def test_a_connection_that_is_closed_without_a_commit_leaves_nothing(database_url):
    async with engine_for(database_url) as engine, engine.connect() as connection:
        await send_receipt.enqueue(connection, 7)

    assert await outbox(database_url) == []


async def test_a_session_can_be_used_for_one_transaction_after_another(database_url):
    async with engine_for(database_url) as engine, AsyncSession(engine) as session:
        first = await send_receipt.enqueue(session, 1)
        await session.commit()
        await send_receipt.enqueue(session, 2)
        await session.rollback()
        third = await send_receipt.enqueue(session, 3)
        await session.commit()

    assert [row["id"] for row in await outbox(database_url)] == [first.id, third.id]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_any_isolation_level_with_transactions_will_do(level, database_url):
    async with engine_for(database_url, isolation_level=level) as engine, engine.begin() as connection:
        plain = await send_receipt.enqueue(connection, 1)
        keyed = await send_receipt.opts(idempotency_key="2").enqueue(connection, 2)

    assert [row["id"] for row in await outbox(database_url)] == [plain.id, keyed.id]


async def test_enqueue_opens_no_connection_of_its_own(database_url):
    small_pool = engine_for(database_url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    async with small_pool as engine, async_sessionmaker(engine).begin() as session:
        await send_receipt.enqueue(session, 1)
        await send_receipt.opts(idempotency_key="2").enqueue(session, 2)
        await jobs.enqueue_many(session, [send_receipt.job(3)])

    assert len(await outbox(database_url)) == 3


async def test_a_job_goes_to_the_schema_of_its_app(database_url):
    other = JobQ(schema="other_jobs")
    async with engine_for(database_url) as engine:
        await migrate.upgrade(engine, schema="other_jobs")
        async with AsyncSession(engine) as session, session.begin():
            job = await other.task(send_receipt.function).enqueue(session, 7)

    assert await outbox(database_url) == []
    assert [row["id"] for row in await fetch(database_url, "SELECT id FROM other_jobs.outbox")] == [job.id]


async def test_an_application_may_have_its_own_codec_for_json_and_search_path(database_url):
    async with connection_to(database_url) as connection:
        await connection.set_type_codec("json", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        await connection.execute("SET search_path = pg_temp")
        async with connection.transaction():
            await send_receipt.opts(headers={"a": "b"}).enqueue(connection, 7)
            await jobs.enqueue_many(connection, [send_receipt.opts(headers={"a": "b"}).job(7)])

    assert {(row["args"], row["headers"]) for row in await outbox(database_url)} == {('{"order_id":7}', '{"a":"b"}')}


@pytest.mark.usefixtures("orders")
async def test_an_error_of_postgresql_passes_through_as_it_is(database_url):
    async with rolled_back(asyncpg_connection(database_url)) as connection:
        with pytest.raises(asyncpg.UniqueViolationError):
            await execute(connection, "INSERT INTO orders VALUES (7), (7)")
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await send_receipt.enqueue(connection, 7)
    async with rolled_back(session(database_url)) as tx:
        with pytest.raises(IntegrityError):
            await execute(tx, "INSERT INTO orders VALUES (7), (7)")
        with pytest.raises(DBAPIError, match="transaction is aborted"):
            await send_receipt.enqueue(tx, 7)

    assert await outbox(database_url) == []


# Where nothing would be committed with the job


@asynccontextmanager
async def session_of_autocommit_engine(url: str) -> AsyncIterator[Any]:
    async with (
        engine_for(url, isolation_level="AUTOCOMMIT") as engine,
        AsyncSession(engine) as session,
        session.begin(),
    ):
        yield session


@asynccontextmanager
async def session_of_autocommit_options(url: str) -> AsyncIterator[Any]:
    async with engine_for(url) as engine:
        autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        async with AsyncSession(autocommit) as session:
            yield session


@asynccontextmanager
async def session_made_autocommit(url: str) -> AsyncIterator[Any]:
    async with engine_for(url) as engine, AsyncSession(engine) as session:
        await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        yield session


@asynccontextmanager
async def session_of_autocommit_maker(url: str) -> AsyncIterator[Any]:
    async with engine_for(url, isolation_level="AUTOCOMMIT") as engine, async_sessionmaker(engine)() as session:
        await session.execute(text("SELECT 1"))
        yield session


@asynccontextmanager
async def connection_of_autocommit_engine(url: str) -> AsyncIterator[Any]:
    async with engine_for(url, isolation_level="AUTOCOMMIT") as engine, engine.begin() as connection:
        yield connection


@asynccontextmanager
async def connection_made_autocommit(url: str) -> AsyncIterator[Any]:
    async with engine_for(url) as engine, engine.connect() as connection:
        yield await connection.execution_options(isolation_level="AUTOCOMMIT")


@asynccontextmanager
async def asyncpg_pool_proxy_without_transaction(url: str) -> AsyncIterator[Any]:
    async with asyncpg.create_pool(url, min_size=1) as pool, pool.acquire() as proxy:
        yield proxy


@asynccontextmanager
async def asyncpg_connection_after_its_transaction(url: str) -> AsyncIterator[Any]:
    async with connection_to(url) as connection:
        async with connection.transaction():
            await connection.execute("SELECT 1")
        yield connection


@pytest.mark.parametrize(
    "opened",
    [
        session_of_autocommit_engine,
        session_of_autocommit_options,
        session_made_autocommit,
        session_of_autocommit_maker,
        connection_of_autocommit_engine,
        connection_made_autocommit,
        connection_to,
        asyncpg_pool_proxy_without_transaction,
        asyncpg_connection_after_its_transaction,
    ],
    ids=lambda opener: opener.__name__,
)
async def test_without_a_transaction_nothing_is_written(opened, database_url):
    async with opened(database_url) as tx:
        with pytest.raises(NotInTransaction, match=r"Nothing was written.*begin|transaction\(\)"):
            await send_receipt.enqueue(tx, 7)
        with pytest.raises(NotInTransaction, match="Nothing was written"):
            await send_receipt.opts(idempotency_key="7").enqueue(tx, 7)
        with pytest.raises(NotInTransaction, match="Nothing was written"):
            await jobs.enqueue_many(tx, (send_receipt.job(n) for n in range(3)))
        with pytest.raises(NotInTransaction, match="Nothing was written"):
            await jobs.enqueue_many(tx, [])

    assert await outbox(database_url) == []
    assert await fetch(database_url, "SELECT FROM jobq.idempotency_key") == []


async def test_a_connection_works_again_once_autocommit_is_off(database_url):
    async with engine_for(database_url, pool_size=1, max_overflow=0) as engine:
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            with pytest.raises(NotInTransaction):
                await send_receipt.enqueue(connection, 1)
        async with engine.begin() as connection:  # the same one, from the pool
            job = await send_receipt.enqueue(connection, 2)

    assert [row["id"] for row in await outbox(database_url)] == [job.id]


@pytest.mark.parametrize("options", [{}, {"idempotency_key": "7"}], ids=["plain", "keyed"])
@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK"])
async def test_a_commit_past_the_driver_is_noticed_by_the_guard(statement, options, database_url):
    async with engine_for(database_url) as engine, AsyncSession(engine) as session:
        await session.execute(text("SELECT 1"))
        await session.execute(text(statement))

        with pytest.raises(NotInTransaction, match="committed on its own"):
            await send_receipt.opts(**options).enqueue(session, 7)


@pytest.mark.parametrize(
    "wrong",
    [None, 7, "session", object(), JobQ(), AsyncSession, async_sessionmaker(), Session(create_engine("sqlite://"))],
    ids=lambda wrong: type(wrong).__name__,
)
async def test_what_is_no_transaction_is_refused_by_its_type(wrong):
    kind = f"{type(wrong).__module__}.{type(wrong).__qualname__}"

    with pytest.raises(ConfigurationError, match="AsyncSession, an AsyncConnection or an asyncpg connection") as caught:
        await send_receipt.enqueue(wrong, 7)
    with pytest.raises(ConfigurationError):
        await jobs.enqueue_many(wrong, [])

    assert f", not {kind}" in str(caught.value)


async def test_a_forgotten_transaction_is_what_the_error_is_about():
    with pytest.raises(ConfigurationError, match=r"as its first argument, not builtins\.int"):
        await send_receipt.enqueue(7)


async def test_an_engine_a_pool_and_a_synchronous_connection_are_refused(database_url):
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(engine_for(database_url))
        pool = await stack.enter_async_context(asyncpg.create_pool(database_url, min_size=1))
        connection = await stack.enter_async_context(engine.begin())

        for wrong in (engine, pool, connection.sync_connection):
            with pytest.raises(ConfigurationError, match="as its first argument"):
                await send_receipt.enqueue(wrong, 7)


async def test_a_synchronous_transaction_is_refused_with_the_way_in_for_it(database_url):
    engine = create_engine("sqlite://")
    with psycopg.connect(database_url) as connection, engine.connect() as alchemy:
        for wrong in (Session(engine), scoped_session(sessionmaker(engine)), alchemy):
            with pytest.raises(ConfigurationError, match=r"not sqlalchemy\S+; with that one, execute task\.insert"):
                await send_receipt.enqueue(wrong, 7)
        for other in (connection, connection.cursor()):
            with pytest.raises(
                ConfigurationError, match=r"not psycopg\S+; with that one, use cursor\.execute\(\*task\.sql"
            ):
                await send_receipt.enqueue(other, 7)


# Bad input leaves the transaction usable


def circular() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


BAD_CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "wrong type": (lambda: send_receipt.job(SECRET), "order_id"),  # type: ignore[arg-type]
    "unknown argument": (lambda: send_receipt.job(7, region=SECRET), "region"),  # type: ignore[call-arg]
    "missing argument": (lambda: send_receipt.job(), "order_id"),  # type: ignore[call-arg]
    "too many arguments": (lambda: send_receipt.job(7, SECRET), "positional"),  # type: ignore[call-arg]
    "NaN": (lambda: keep.job(math.nan), "value"),
    "NaN in a list": (lambda: keep.job([SECRET, math.nan]), "value.1"),
    "infinity in a dataclass": (lambda: book.job(Line(math.inf)), "line.price"),
    "NaN under Any in a dataclass": (lambda: book.job(Line(1.0, math.nan)), "line.note"),
    "lone surrogate": (lambda: keep.job(f"{SECRET} \ud800"), "value"),
    "lone surrogate in a key": (lambda: keep.job({f"{SECRET} \udfff": 1}), "value"),
    "lone surrogate in a header": (lambda: keep.opts(headers={"id": f"{SECRET}\ud800"}).job(1), "headers"),
    "NUL": (lambda: keep.job(f"{SECRET}\0"), "value"),
    "NUL in a key": (lambda: keep.job({"a": {f"{SECRET}\0": 1}}), "value"),
    "NUL in a header": (lambda: keep.opts(headers={"id": f"{SECRET}\0"}).job(1), "headers"),
    "65 bits": (lambda: keep.job(2**64), "value"),
    "64 bits without a sign": (lambda: send_receipt.job(2**63), "order_id"),
    "65 levels": (lambda: keep.job(nested(64)), "value"),
    "20,000 levels": (lambda: keep.job(nested(20_000)), "value"),
    "more than 1 MiB": (lambda: keep.job(SECRET * (ARGS_LIMIT // 7 + 1)), "1,048,576"),
    "no JSON": (lambda: keep.job([object()]), "value"),
    "bytes that are no text": (lambda: keep.job(b"\xff"), "value"),
    "circular": (lambda: keep.job(circular()), "value"),
    "bad priority": (lambda: keep.opts(priority=9).job(1), "priority"),
    "bad queue": (lambda: keep.opts(queue="Mail Room").job(1), "queue"),
    "naive run_at": (lambda: keep.opts(run_at=datetime(2026, 1, 1)).job(1), "run_at"),  # noqa: DTZ001
}


@pytest.mark.parametrize("opened", [session, asyncpg_connection], ids=["sqlalchemy", "asyncpg"])
@pytest.mark.usefixtures("orders")
async def test_bad_input_is_refused_by_name_and_the_transaction_goes_on(opened, database_url):
    said = {}

    async with opened(database_url) as tx:
        await execute(tx, "INSERT INTO orders VALUES (1)")
        for name, (make, _) in BAD_CALLS.items():
            with pytest.raises(InvalidArguments) as caught:
                await jobs.enqueue_many(tx, (intent() for intent in (lambda: send_receipt.job(0), make)))
            said[name] = str(caught.value)
        await execute(tx, "INSERT INTO orders VALUES (2)")
        good = await send_receipt.enqueue(tx, 7)

    assert {name for name, (_, field) in BAD_CALLS.items() if field not in said[name] or SECRET in said[name]} == set()
    assert [row["id"] for row in await outbox(database_url)] == [good.id]
    assert await order_ids(database_url) == [1, 2]


async def test_enqueue_itself_checks_the_call(database_url):
    async with session(database_url) as tx:
        with pytest.raises(InvalidArguments, match="order_id"):
            await send_receipt.enqueue(tx, SECRET)  # type: ignore[arg-type]
        with pytest.raises(InvalidArguments, match="positional"):
            await send_receipt.enqueue(tx, None, 7)  # type: ignore[call-arg,arg-type]

    assert await outbox(database_url) == []


async def test_arguments_of_exactly_one_mib_are_stored(database_url):
    largest = "x" * (ARGS_LIMIT - len('{"value":""}'))

    async with session(database_url) as tx:
        await keep.enqueue(tx, largest)

    [row] = await outbox(database_url)
    assert len(row["args"]) == ARGS_LIMIT
    assert keep.codec.decode(row["args"]) == {"value": largest}


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), inner)
    ),
    max_leaves=30,
)


@given(value=JSON_VALUES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_json_value_survives_the_database(value, database_url):
    async with asyncpg_connection(database_url) as connection:
        one = await keep.enqueue(connection, value)
        [other] = await jobs.enqueue_many(connection, [keep.job(value)])
        stored = await connection.fetch(
            # jsonb reads every character and number; json keeps the text.
            "SELECT args, CAST(args AS jsonb) FROM jobq.outbox WHERE id = ANY($1)",
            [one.id, other.id],
        )

    assert [keep.codec.decode(args) for args, _ in stored] == [{"value": value}] * 2


# What is written


async def test_a_row_carries_what_the_task_says(database_url):
    async with session(database_url) as tx:
        job = await send_receipt.enqueue(tx, 7)
        [xid] = (await tx.execute(text("SELECT CAST(CAST(pg_current_xact_id() AS text) AS bigint)"))).scalars()

    [row] = await outbox(database_url)
    assert row["created_at"] is not None
    assert dict(row) == {
        "id": job.id,
        "generation": 1,
        "queue": "mail",
        "task": "send_receipt",
        "args": '{"order_id":7}',
        "priority": 2,
        "run_at": None,
        "attempts": 0,
        "crashes": 0,
        "max_attempts": None,
        "timeout_s": None,
        "created_at": row["created_at"],
        "headers": None,
        "error_type": None,
        "last_error": None,
        "xid": xid,
    }


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("opened", [session, asyncpg_connection], ids=["sqlalchemy", "asyncpg"])
async def test_a_row_carries_what_the_options_say(many, opened, database_url):
    task = send_receipt.opts(
        priority=4,
        queue="a.b-c_9",
        max_attempts=32_767,
        timeout=timedelta(milliseconds=1500),
        headers={"traceparent": "00-ab", "ż": '"'},
    )

    async with opened(database_url) as tx:
        await (jobs.enqueue_many(tx, [task.job(7)]) if many else task.enqueue(tx, 7))

    [row] = await outbox(database_url)
    assert (row["priority"], row["queue"], row["max_attempts"], row["timeout_s"]) == (4, "a.b-c_9", 32_767, 1.5)
    assert json.loads(row["headers"]) == {"traceparent": "00-ab", "ż": '"'}


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("delay", [0.25, timedelta(days=3650)], ids=str)
async def test_a_delay_counts_from_the_statement_by_the_databases_clock(delay, many, database_url):
    seconds = delay if isinstance(delay, timedelta) else timedelta(seconds=delay)
    task = keep.opts(delay=delay)

    async with asyncpg_connection(database_url) as connection:
        await connection.execute("SELECT pg_sleep(0.05)")  # the transaction is older than the call
        before = await connection.fetchval("SELECT clock_timestamp()")
        await (jobs.enqueue_many(connection, [task.job(1)]) if many else task.enqueue(connection, 1))
        after = await connection.fetchval("SELECT clock_timestamp()")

    [row] = await outbox(database_url)
    assert before + seconds <= row["run_at"] <= after + seconds


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
async def test_what_is_due_already_has_no_run_at(many, database_url):
    past = datetime.now(UTC) - timedelta(days=1)
    tasks = [keep.opts(delay=0), keep.opts(run_at=past), keep.opts(run_at=datetime.min.replace(tzinfo=UTC))]

    async with session(database_url) as tx:
        for task in tasks:
            await (jobs.enqueue_many(tx, [task.job(1)]) if many else task.enqueue(tx, 1))

    assert [row["run_at"] for row in await outbox(database_url)] == [None] * 3


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("opened", [session, asyncpg_connection], ids=["sqlalchemy", "asyncpg"])
async def test_a_future_run_at_is_stored_as_that_moment(many, opened, database_url):
    moment = datetime(2999, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
    task = keep.opts(run_at=moment)

    async with opened(database_url) as tx:
        await (jobs.enqueue_many(tx, [task.job(1)]) if many else task.enqueue(tx, 1))

    assert [row["run_at"] for row in await outbox(database_url)] == [moment]


async def test_ids_are_made_by_the_client_and_rise_with_time(database_url):
    async with session(database_url) as tx:
        answers = [await keep.enqueue(tx, n) for n in range(5)]

    ids = [answer.id for answer in answers]
    assert all(isinstance(id_, UUID) and id_.version == 7 for id_ in ids)
    assert [row["id"] for row in await outbox(database_url)] == ids


# Cancel


@opened
async def test_cancel_deletes_a_waiting_job_with_the_transaction(opened, database_url):
    async with opened(database_url) as tx:
        job = await keep.enqueue(tx, 1)
    async with rolled_back(opened(database_url)) as tx:
        assert await jobs.cancel(tx, job.id)
    assert len(await outbox(database_url)) == 1

    async with opened(database_url) as tx:
        assert await jobs.cancel(tx, job.id)
        assert not await jobs.cancel(tx, job.id)

    assert await outbox(database_url) == []
