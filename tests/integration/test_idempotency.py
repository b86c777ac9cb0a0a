"""Idempotency keys: one job for a key, whoever comes first, however it ends, and two at the same moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError

from jobq import Enqueued, JobQ
from jobq.outbox import enqueue as module
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
from tests.waiting import until

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
def reserve(order_id: int) -> None: ...


@jobs.task
def release(order_id: int) -> None: ...


once = reserve.opts(idempotency_key="order:7")


async def enqueue_once(url: str, task: Any = once, order_id: int = 7) -> Enqueued:
    """Enqueue in a transaction of its own, and commit."""
    async with asyncpg_connection(url) as connection:
        return await task.enqueue(connection, order_id)


async def ids(url: str) -> list[UUID]:
    return [row["id"] for row in await outbox(url)]


async def expire(url: str) -> None:
    await fetch(url, "UPDATE jobq.idempotency_key SET expires_at = now() - interval '1 s'")


async def complete(url: str) -> None:
    await fetch(url, "DELETE FROM jobq.outbox")


async def bury(url: str) -> None:
    await fetch(
        url,
        "WITH gone AS (DELETE FROM jobq.outbox RETURNING *) INSERT INTO jobq.dead "
        "SELECT id, generation, queue, task, args, priority, run_at, attempts, crashes, max_attempts, timeout_s, "
        "created_at, headers, error_type, last_error, 'rejected' FROM gone",
    )


# One after the other


@pytest.mark.parametrize("opened", OPENERS, ids=lambda opener: opener.__name__)
async def test_twice_with_one_key_is_one_job_in_and_after_a_transaction(opened, database_url):
    async with opened(database_url) as tx:
        first = await once.enqueue(tx, 7)
        same_transaction = await once.enqueue(tx, 7)
    async with opened(database_url) as tx:
        later = await once.enqueue(tx, 8)

    assert first.created
    assert same_transaction == later == Enqueued(first.id, created=False)
    assert [(row["id"], row["args"]) for row in await outbox(database_url)] == [(first.id, '{"order_id":7}')]


async def test_the_key_holds_after_the_job_is_done(database_url):
    first = await enqueue_once(database_url)
    await complete(database_url)

    assert await enqueue_once(database_url) == Enqueued(first.id, created=False)
    assert await outbox(database_url) == []


async def test_the_key_goes_with_a_transaction_that_rolls_back(database_url):
    async with rolled_back(session(database_url)) as tx:
        lost = await once.enqueue(tx, 7)

    second = await enqueue_once(database_url)

    assert second.created
    assert second.id != lost.id
    assert await ids(database_url) == [second.id]


async def test_the_key_goes_with_a_savepoint_that_rolls_back(database_url):
    async with session(database_url) as tx:
        async with rolled_back(savepoint(tx)):
            await once.enqueue(tx, 7)
        second = await once.enqueue(tx, 7)

    assert second.created
    assert await ids(database_url) == [second.id]


async def test_different_tasks_with_one_key_are_different_jobs(database_url):
    one = await enqueue_once(database_url)
    other = await enqueue_once(database_url, release.opts(idempotency_key="order:7"))

    assert (one.created, other.created) == (True, True)
    assert await ids(database_url) == [one.id, other.id]


async def test_the_longest_name_and_key_fit_the_index(database_url):
    characters = "".join(chr(0x20000 + n) for n in range(500))  # four bytes each, and nothing to compress
    task = JobQ().task(name=characters[:128])(reserve.function).opts(idempotency_key=characters)

    first = await enqueue_once(database_url, task)

    assert await enqueue_once(database_url, task) == Enqueued(first.id, created=False)


# When a key ends


@pytest.mark.parametrize(
    ("ttl", "expected"),
    [(None, timedelta(days=1)), (90, timedelta(seconds=90)), (timedelta(days=400), timedelta(days=400))],
    ids=str,
)
async def test_a_key_lasts_from_the_statement_by_the_databases_clock(ttl, expected, database_url):
    task = once if ttl is None else once.opts(idempotency_ttl=ttl)

    async with asyncpg_connection(database_url) as connection:
        await connection.execute("SELECT pg_sleep(0.05)")  # the transaction is older than the call
        before = await connection.fetchval("SELECT clock_timestamp()")
        await task.enqueue(connection, 7)
        after = await connection.fetchval("SELECT clock_timestamp()")

    [key] = await fetch(database_url, "SELECT * FROM jobq.idempotency_key")
    assert (key["scope"], key["key"]) == ("reserve", "order:7")
    assert before + expected <= key["expires_at"] <= after + expected


async def test_asking_again_does_not_prolong_a_key(database_url):
    await enqueue_once(database_url)
    [before] = await fetch(database_url, "SELECT * FROM jobq.idempotency_key")

    await enqueue_once(database_url, once.opts(idempotency_ttl=timedelta(days=365)))

    assert await fetch(database_url, "SELECT * FROM jobq.idempotency_key") == [before]


async def test_an_expired_key_makes_a_new_job_with_a_new_life_once_the_old_one_is_gone(database_url):
    first = await enqueue_once(database_url)
    await complete(database_url)
    await expire(database_url)

    second = await enqueue_once(database_url, order_id=8)
    third = await enqueue_once(database_url)

    assert second.created
    assert second.id != first.id
    assert third == Enqueued(second.id, created=False)
    assert await ids(database_url) == [second.id]
    assert await fetch(database_url, "SELECT job_id, expires_at > now() FROM jobq.idempotency_key") == [
        (second.id, True)
    ]


async def test_an_expired_key_holds_while_its_row_is_there(database_url):
    first = await enqueue_once(database_url)
    await expire(database_url)

    assert await enqueue_once(database_url) == Enqueued(first.id, created=False)
    assert await ids(database_url) == [first.id]


async def test_an_expired_key_holds_while_its_job_is_dead(database_url):
    first = await enqueue_once(database_url)
    await bury(database_url)
    await expire(database_url)

    assert await enqueue_once(database_url) == Enqueued(first.id, created=False)
    assert await outbox(database_url) == []


# Two at the same moment


async def is_waiting(url: str, pid: int) -> bool:
    rows = await fetch(url, "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $1", pid)
    return rows == [(True,)]


class Rivals:
    """Two transactions with one key: the first has enqueued, the second waits for it inside its own enqueue."""

    def __init__(self, url: str, stack: AsyncExitStack):
        self._url = url
        self._stack = stack

    async def meet(self, task: Any, second_task: Any) -> None:
        self.one = await self._stack.enter_async_context(connection_to(self._url))
        self.two = await self._stack.enter_async_context(connection_to(self._url))
        self.first_transaction, self.second_transaction = self.one.transaction(), self.two.transaction()
        await self.first_transaction.start()
        await self.second_transaction.start()
        self.first: Enqueued = await task.enqueue(self.one, 1)
        self._waiting = asyncio.create_task(second_task.enqueue(self.two, 2))
        pid = self.two.get_server_pid()
        await until(lambda: is_waiting(self._url, pid), "the second transaction waits for the first")

    async def second(self) -> Enqueued:
        """Let the second one have its answer, and commit."""
        answer = await self._waiting
        await self.second_transaction.commit()
        return answer


@asynccontextmanager
async def rivals(url: str, task: Any = once, second_task: Any = None) -> AsyncIterator[Rivals]:
    async with AsyncExitStack() as stack:
        pair = Rivals(url, stack)
        await pair.meet(task, second_task or task)
        yield pair


async def test_the_second_of_two_transactions_gets_the_firsts_job_if_that_commits(database_url):
    async with rivals(database_url) as pair:
        await pair.first_transaction.commit()
        second = await pair.second()

    assert second == Enqueued(pair.first.id, created=False)
    assert await ids(database_url) == [pair.first.id]


async def test_the_second_of_two_transactions_writes_its_own_job_if_the_first_rolls_back(database_url):
    async with rivals(database_url) as pair:
        await pair.first_transaction.rollback()
        second = await pair.second()

    assert second.created
    assert second.id != pair.first.id
    assert [(row["id"], row["args"]) for row in await outbox(database_url)] == [(second.id, '{"order_id":2}')]


async def test_the_second_of_two_transactions_writes_its_own_job_if_the_first_loses_its_connection(database_url):
    async with rivals(database_url) as pair:
        pair.one.terminate()
        second = await pair.second()

    assert second.created
    assert await ids(database_url) == [second.id]


@pytest.mark.parametrize("ttl", [0, 0.01])
async def test_a_key_that_expired_while_the_second_waited_is_still_the_firsts(ttl, database_url):
    async with rivals(database_url, once.opts(idempotency_ttl=ttl)) as pair:
        await pair.first_transaction.commit()
        second = await pair.second()

    assert second == Enqueued(pair.first.id, created=False)
    assert await ids(database_url) == [pair.first.id]


async def test_only_one_of_two_transactions_takes_over_an_expired_key(database_url):
    await enqueue_once(database_url)
    await complete(database_url)
    await expire(database_url)

    async with rivals(database_url) as pair:
        await pair.first_transaction.commit()
        second = await pair.second()

    assert pair.first.created
    assert second == Enqueued(pair.first.id, created=False)
    assert await ids(database_url) == [pair.first.id]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_at_stricter_levels_the_second_transaction_fails_and_never_doubles(level, database_url):
    async with engine_for(database_url, isolation_level=level) as engine, rolled_back(engine.begin()) as second:
        await execute(second, "SELECT 1")  # its snapshot is older than the first one's commit
        first = await enqueue_once(database_url)

        with pytest.raises(DBAPIError, match="could not serialize access"):
            await once.enqueue(second, 7)

    assert await ids(database_url) == [first.id]


async def test_twenty_transactions_at_once_make_one_job(database_url):
    async with asyncpg.create_pool(database_url, min_size=20, max_size=20) as pool:

        async def request() -> Enqueued:
            async with pool.acquire() as connection, connection.transaction():
                return await once.enqueue(connection, 7)

        answers = await asyncio.gather(*[request() for _ in range(20)])

    assert len({answer.id for answer in answers}) == 1
    assert sum(answer.created for answer in answers) == 1
    assert await ids(database_url) == [answers[0].id]


async def crossed(url: str, keys: list[str], reversed_keys: list[str], *, rounds: int) -> None:
    """Enqueue the same keys in opposite order from two transactions at once, again and again."""
    async with connection_to(url) as one, connection_to(url) as two:

        async def enqueue(connection: asyncpg.Connection, keys: list[str], turn: int) -> list[Enqueued]:
            async with connection.transaction():
                return await jobs.enqueue_many(
                    connection, [reserve.opts(idempotency_key=f"{key}{turn}").job(1) for key in keys]
                )

        for turn in range(rounds):
            forth, back = await asyncio.gather(enqueue(one, keys, turn), enqueue(two, reversed_keys, turn))
            assert {answer.id for answer in forth} == {answer.id for answer in back}
            assert sum(answer.created for answer in forth + back) == len(keys)


async def test_the_same_keys_in_opposite_order_do_not_deadlock(database_url):
    keys = [f"{n:04}" for n in range(1_500)]

    await crossed(database_url, keys, keys[::-1], rounds=4)


async def test_the_same_keys_in_opposite_order_do_not_deadlock_over_several_statements(
    database_url, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "ROWS_PER_STATEMENT", 7)
    # Capitals, digits and hyphens: a database's own order of text is another than that of the bytes.
    keys = [f"{letter}{n}{mark}" for letter in "aBcDé" for n in range(10) for mark in ("-", "_", "")]

    await crossed(database_url, keys, keys[::-1], rounds=4)


# Across a rename


def release_of(name: str, *aliases: str) -> Any:
    """The task as one release of an application knows it."""

    @JobQ().task(name=name, aliases=aliases)
    def task(order_id: int) -> None: ...

    return task.opts(idempotency_key="order:7")


# In both orders of their bytes.
RENAMES = pytest.mark.parametrize(("old", "new"), [("reserve", "book"), ("book", "reserve")])


@RENAMES
async def test_a_key_holds_across_a_rename_and_when_the_alias_is_taken_away(old, new, database_url):
    before, renamed, after = release_of(old), release_of(new, old), release_of(new)
    first = await enqueue_once(database_url, before)

    answers = [await enqueue_once(database_url, task) for task in (renamed, before, renamed, after, renamed)]

    assert answers == [Enqueued(first.id, created=False)] * 5
    assert await ids(database_url) == [first.id]
    # The new claim ends with the first one.
    rows = await fetch(database_url, "SELECT count(DISTINCT expires_at), count(*) FROM jobq.idempotency_key")
    assert rows == [(1, 2)]


@RENAMES
async def test_a_key_of_the_new_name_holds_for_releases_that_know_the_old_one(old, new, database_url):
    first = await enqueue_once(database_url, release_of(new, old))
    await complete(database_url)

    assert await enqueue_once(database_url, release_of(old)) == Enqueued(first.id, created=False)
    assert await ids(database_url) == []


async def test_a_key_holds_across_two_renames(database_url):
    first = await enqueue_once(database_url, release_of("a"))

    for task in (release_of("c", "b", "a"), release_of("b", "a"), release_of("c", "b"), release_of("c")):
        assert await enqueue_once(database_url, task) == Enqueued(first.id, created=False)


async def test_two_jobs_under_both_names_stay_two_and_the_present_name_counts(database_url):
    old = await enqueue_once(database_url, release_of("old"))
    new = await enqueue_once(database_url, release_of("new"))

    assert await enqueue_once(database_url, release_of("new", "old")) == Enqueued(new.id, created=False)
    assert await enqueue_once(database_url, release_of("old")) == Enqueued(old.id, created=False)


async def test_a_key_that_expired_under_the_old_name_is_taken_over_under_both(database_url):
    await enqueue_once(database_url, release_of("old"))
    await complete(database_url)
    await expire(database_url)

    again = await enqueue_once(database_url, release_of("new", "old"))

    assert again.created
    assert await enqueue_once(database_url, release_of("old")) == Enqueued(again.id, created=False)
    assert await enqueue_once(database_url, release_of("new")) == Enqueued(again.id, created=False)


@RENAMES
@pytest.mark.parametrize("ends", ["commit", "rollback"])
@pytest.mark.parametrize("older_first", [True, False], ids=["older release first", "newer release first"])
async def test_two_releases_at_the_same_moment_make_one_job(old, new, ends, older_first, database_url):
    older, newer = release_of(old), release_of(new, old)
    first, second = (older, newer) if older_first else (newer, older)

    async with rivals(database_url, first, second) as pair:
        await getattr(pair.first_transaction, ends)()
        answer = await pair.second()

    if ends == "commit":
        assert answer == Enqueued(pair.first.id, created=False)
    else:
        assert answer.created
    assert await ids(database_url) == [answer.id]
    assert await enqueue_once(database_url, older) == Enqueued(answer.id, created=False)
    assert await enqueue_once(database_url, newer) == Enqueued(answer.id, created=False)


async def test_a_key_never_leads_to_a_job_that_was_not_written(database_url):
    """A release without the alias comes first under the new name, while one with it has claimed the old name."""
    async with rivals(database_url, release_of("new"), release_of("new", "old")) as pair:
        await pair.first_transaction.commit()
        second = await pair.second()

    assert second.created
    assert sorted(await ids(database_url)) == sorted([pair.first.id, second.id])
    assert await enqueue_once(database_url, release_of("old")) == Enqueued(second.id, created=False)
    assert await enqueue_once(database_url, release_of("new", "old")) == Enqueued(pair.first.id, created=False)


async def test_many_with_and_without_aliases_are_answered_in_order(database_url):
    first = await enqueue_once(database_url, release_of("old"))
    new, old = release_of("new", "old"), release_of("old")
    other = new.opts(idempotency_key="order:8")
    async with asyncpg_connection(database_url) as connection:
        answers = await jobs.enqueue_many(
            connection, [other.job(1), reserve.job(1), new.job(1), old.job(1), other.job(2), once.job(1)]
        )

    assert [answer.created for answer in answers] == [True, True, False, False, False, True]
    assert answers[2].id == answers[3].id == first.id
    assert answers[4].id == answers[0].id
    assert len(await ids(database_url)) == 4


@RENAMES
async def test_batches_of_two_releases_with_the_same_keys_do_not_deadlock(old, new, database_url):
    """The older release has claimed its first key, and waits for a third transaction before it claims its last."""
    first, second = release_of("a"), release_of("b")
    async with (
        connection_to(database_url) as one,
        connection_to(database_url) as two,
        connection_to(database_url) as third,
    ):

        async def enqueue(connection: asyncpg.Connection, *tasks: Any) -> list[Enqueued]:
            async with connection.transaction():
                return await jobs.enqueue_many(connection, [task.job(1) for task in tasks])

        async def waits(connection: asyncpg.Connection) -> None:
            pid = connection.get_server_pid()
            await until(lambda: is_waiting(database_url, pid), "it waits for a key")

        async with third.transaction():
            await second.enqueue(third, 1)
            older = asyncio.create_task(enqueue(one, first, second, release_of(old)))
            await waits(one)
            newer = asyncio.create_task(enqueue(two, first, release_of(new, old)))
            await waits(two)
        answers = await asyncio.gather(older, newer, return_exceptions=True)

    assert [[answer.created for answer in batch] for batch in answers] == [[True, False, True], [False, False]]
    assert answers[1] == [Enqueued(answers[0][0].id, created=False), Enqueued(answers[0][2].id, created=False)]
    assert len(await ids(database_url)) == 3
