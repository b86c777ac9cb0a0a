"""task.insert and task.sql: jobs in the transactions of synchronous drivers, through each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID

import django
import django.conf
import django.db
import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from jobq import InvalidArguments, JobQ, Task
from jobq.outbox.statement import pyformat
from tests.enqueuing import Away, session

Run: TypeAlias = Callable[..., tuple[UUID, bool]]
Way: TypeAlias = Callable[[str], AbstractContextManager[Run]]

jobs = JobQ()


@jobs.task(queue="mail")
async def send_receipt(order_id: int, *, note: str = "") -> None: ...


# Each way in opens a transaction that the end of its block commits, and yields how a job gets into it.


@contextmanager
def sync_engine(url: str) -> Iterator[Engine]:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def sqlalchemy_session(url: str) -> Iterator[Run]:
    with sync_engine(url) as engine, Session(engine) as session, session.begin():
        yield lambda task, *args, **kwargs: session.execute(task.insert(*args, **kwargs)).one()


@contextmanager
def sqlalchemy_connection(url: str) -> Iterator[Run]:
    with sync_engine(url) as engine, engine.begin() as connection:
        yield lambda task, *args, **kwargs: connection.execute(task.insert(*args, **kwargs)).one()


def by_cursor(cursor: Any) -> Run:
    def run(task: Task[..., Any, Any], *args: Any, **kwargs: Any) -> tuple[UUID, bool]:
        cursor.execute(*task.sql(*args, **kwargs))
        answer: tuple[UUID, bool] = cursor.fetchone()
        return answer

    return run


@contextmanager
def psycopg_cursor(url: str) -> Iterator[Run]:
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        yield by_cursor(cursor)


@contextmanager
def psycopg_client_cursor(url: str) -> Iterator[Run]:
    """Which puts the values into the text itself, as psycopg2 does."""
    with psycopg.connect(url, cursor_factory=psycopg.ClientCursor) as connection, connection.cursor() as cursor:
        yield by_cursor(cursor)


@contextmanager
def django_cursor(url: str) -> Iterator[Run]:
    if not django.conf.settings.configured:
        django.conf.settings.configure(USE_TZ=True, LOGGING_CONFIG=None)
        django.setup()
    parts = make_url(url)
    place = {"NAME": parts.database, "USER": parts.username, "PASSWORD": parts.password, "PORT": parts.port}
    host = parts.host or parts.query["host"]
    given = {"default": {}, "jobs": {"ENGINE": "django.db.backends.postgresql", "HOST": host, **place}}
    connections = django.db.connections
    connections.settings.update(connections.configure_settings(given))
    try:
        with django.db.transaction.atomic(using="jobs"), connections["jobs"].cursor() as cursor:
            yield by_cursor(cursor)
    finally:
        connections["jobs"].close()
        del connections["jobs"]


WAYS: list[Way] = [sqlalchemy_session, sqlalchemy_connection, psycopg_cursor, psycopg_client_cursor, django_cursor]
any_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def outbox(url: str) -> list[dict[str, Any]]:
    """The committed rows, in the order of their ids."""
    with psycopg.connect(url, row_factory=dict_row) as connection:
        return connection.execute("SELECT *, run_at - created_at AS delay FROM jobq.outbox ORDER BY id").fetchall()


@any_way
def test_a_job_is_there_after_the_commit_and_not_before(way, shared_database_url):
    with way(shared_database_url) as run:
        job_id, created = run(send_receipt, 7, note="x")
        assert outbox(shared_database_url) == []

    [row] = outbox(shared_database_url)
    assert (job_id, created) == (row["id"], True)
    assert (row["task"], row["queue"], row["args"]) == ("send_receipt", "mail", {"order_id": 7, "note": "x"})
    assert (row["priority"], row["run_at"], row["generation"]) == (2, None, 1)


@any_way
def test_a_job_is_never_there_after_a_rollback(way, shared_database_url):
    with suppress(Away), way(shared_database_url) as run:
        assert run(send_receipt, 7)[1]
        assert run(send_receipt.opts(idempotency_key="7"), 7)[1]
        raise Away

    assert outbox(shared_database_url) == []


@any_way
def test_twice_with_one_key_is_one_job(way, shared_database_url):
    once = send_receipt.opts(idempotency_key="order:7")
    with way(shared_database_url) as run:
        first = run(once, 7)
        assert run(once, 7) == (first[0], False)
    with way(shared_database_url) as run:
        again = run(once, 8)

    [row] = outbox(shared_database_url)
    assert first == (row["id"], True)
    assert again == (row["id"], False)
    assert row["args"] == {"order_id": 7}


@any_way
def test_a_key_holds_across_a_rename(way, shared_database_url):
    before = JobQ().task(name="send", queue="mail")(send_receipt.function)
    renamed = JobQ().task(name="mail_receipt", queue="mail", aliases=["send"])(send_receipt.function)
    with way(shared_database_url) as run:
        first = run(renamed.opts(idempotency_key="order:7"), 7)
    with way(shared_database_url) as run:
        again = run(before.opts(idempotency_key="order:7"), 7)

    [row] = outbox(shared_database_url)
    assert (first, again) == ((row["id"], True), (row["id"], False))


@pytest.mark.parametrize("key", [None, "k"], ids=["without a key", "with a key"])
@any_way
def test_a_row_carries_what_the_options_say(way, key, shared_database_url):
    given = {"queue": "slow", "priority": 1, "max_attempts": 3, "timeout": 1.5, "headers": {"a": "b"}}
    with way(shared_database_url) as run:
        run(send_receipt.opts(delay=60, idempotency_key=key, **given), 7)

    [row] = outbox(shared_database_url)
    assert (row["queue"], row["priority"], row["max_attempts"], row["timeout_s"]) == ("slow", 1, 3, 1.5)
    assert row["headers"] == {"a": "b"}
    assert timedelta(seconds=60) <= row["delay"] < timedelta(seconds=90)


@pytest.mark.parametrize("key", [None, "k"], ids=["without a key", "with a key"])
@any_way
def test_run_at_is_that_moment_whatever_the_time_zone_of_the_session(way, key, shared_database_url):
    moment = datetime.now(UTC) + timedelta(days=2)
    separator = "&" if "?" in shared_database_url else "?"
    far_away = f"{shared_database_url}{separator}options=-c%20timezone%3DAsia/Tokyo"
    with way(far_away) as run:
        run(send_receipt.opts(run_at=moment, idempotency_key=key), 7)

    [row] = outbox(shared_database_url)
    assert row["run_at"] == moment


@pytest.mark.parametrize("key", [None, "100 % :key %(key)s"], ids=["without a key", "with a key"])
@any_way
def test_what_looks_like_a_parameter_in_a_value_is_a_value(way, key, shared_database_url):
    note = "100 % of %(id)s, %s, :id, {schema}, $1, 'single' \"double\" \\ back {,} ☃"
    with way(shared_database_url) as run:
        run(send_receipt.opts(idempotency_key=key), 7, note=note)

    [row] = outbox(shared_database_url)
    assert row["args"] == {"order_id": 7, "note": note}


@pytest.mark.parametrize("make", [send_receipt.insert, send_receipt.sql, send_receipt.opts(priority=1).sql])
def test_arguments_are_checked_before_there_is_a_statement(make):
    with pytest.raises(InvalidArguments, match=r"send_receipt\(\): order_id"):
        make("seven")
    with pytest.raises(InvalidArguments, match="unexpected keyword argument 'region'"):
        make(7, region="eu")


def test_sqlalchemy_sees_named_and_typed_columns(shared_database_url):
    with sync_engine(shared_database_url) as engine, engine.begin() as connection:
        row = connection.execute(send_receipt.insert(7)).one()
        assert isinstance(row.id, UUID)
        assert row.created is True


async def test_an_async_session_takes_the_statement_too(shared_database_url):
    async with session(shared_database_url) as opened:
        first = (await opened.execute(send_receipt.insert(7))).one()
        second = (await opened.execute(send_receipt.opts(idempotency_key="k", delay=1).insert(8))).one()

    assert [row["id"] for row in outbox(shared_database_url)] == [first.id, second.id]


async def test_psycopgs_async_connection_takes_the_query_too(shared_database_url):
    async with (
        await psycopg.AsyncConnection.connect(shared_database_url) as connection,
        connection.cursor() as cursor,
    ):
        await cursor.execute(*send_receipt.sql(7))
        answer = await cursor.fetchone()

    [row] = outbox(shared_database_url)
    assert answer == (row["id"], True)


@pytest.mark.parametrize("key", [None, "k"], ids=["without a key", "with a key"])
def test_executemany_writes_many(key, shared_database_url):
    queries = [send_receipt.opts(idempotency_key=key and f"{key}{number}").sql(number) for number in range(20)]
    with psycopg.connect(shared_database_url) as connection, connection.cursor() as cursor:
        cursor.executemany(queries[0][0], [values for _, values in queries])

    assert [row["args"]["order_id"] for row in outbox(shared_database_url)] == list(range(20))


def test_in_autocommit_the_job_is_committed_at_once(shared_database_url):
    with psycopg.connect(shared_database_url, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute(*send_receipt.sql(7))
        assert len(outbox(shared_database_url)) == 1


def test_a_job_goes_to_the_schema_of_its_app():
    other = JobQ(schema="other_jobs").task(send_receipt.function)

    for task in (other, other.opts(idempotency_key="k")):
        for statement in (task.sql(7)[0], str(task.insert(7))):
            assert '"other_jobs".outbox' in statement
            assert '"jobq"' not in statement


def test_percent_signs_of_a_statement_are_doubled_for_drivers_that_read_them():
    assert pyformat("SELECT 1 % 2, CAST(:id AS uuid) /* 5% */") == "SELECT 1 %% 2, CAST(%(id)s AS uuid) /* 5%% */"
