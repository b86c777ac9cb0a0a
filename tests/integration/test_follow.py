"""What the relay asks of PostgreSQL."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from uuid import UUID

import asyncpg
import pytest

from jobq.model import new_job_id
from jobq.outbox import follow
from jobq.outbox.database import Database
from jobq.outbox.follow import NewRows, Page, Snapshot
from jobq.outbox.settle import Reschedule, crash, reschedule
from tests.faults.proxy import postgres_proxy
from tests.relay_rows import SCHEMA, add, delete, entries, own_connection
from tests.waiting import until

WRITERS = 16
TRANSACTIONS = 40
START = UUID(int=0)


@pytest.fixture
def database_url(shared_database_url: str) -> str:
    """These tests leave jobq's tables as they are, and share a database."""
    return shared_database_url


@pytest.fixture
async def relay(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection as the relay opens it."""
    database = Database.of(database_url)
    connection = await database.connect(schema=SCHEMA, name="test")
    yield connection
    connection.terminate()
    await database.close()


@pytest.fixture
async def writer(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    async with own_connection(database_url) as connection:
        yield connection


class Poller:
    """Polls on and on from one snapshot to the next, and keeps what was answered."""

    def __init__(self, connection: asyncpg.Connection, since: Snapshot, now: datetime):
        self.connection = connection
        self.since = since
        self.horizon = now
        self.limit = 5_000
        self.is_cut = False

    @classmethod
    async def start(cls, connection: asyncpg.Connection) -> Poller:
        return cls(connection, *await follow.take_snapshot(connection, SCHEMA))

    async def lists(self) -> list[NewRows]:
        self.since, lists, self.is_cut = await follow.poll(
            self.connection, SCHEMA, self.since, horizon=self.horizon, limit=self.limit
        )
        return lists

    async def poll(self) -> list[str]:
        return [entry for new in await self.lists() for entry in new.entries]


# --- the snapshot poll


async def test_the_polls_answer_every_committed_row_once_and_no_other(
    database_url: str, relay: asyncpg.Connection
) -> None:
    """Sixteen writers, who commit in another order than they began; savepoints, rollbacks, retries."""
    poller = await Poller.start(relay)
    committed: list[str] = []
    writers = [asyncio.ensure_future(write_at_random(database_url, seed, committed)) for seed in range(WRITERS)]
    answered: Counter[str] = Counter()
    while not all(task.done() for task in writers):
        answered.update(await poller.poll())
    await asyncio.gather(*writers)
    answered.update(await poller.poll())

    assert len(committed) > WRITERS * TRANSACTIONS
    assert answered == Counter(committed)


async def write_at_random(url: str, seed: int, committed: list[str]) -> None:
    chance = random.Random(seed)
    async with own_connection(url) as connection:
        for _ in range(TRANSACTIONS):
            wrote: list[str] = []
            transaction = connection.transaction()
            await transaction.start()
            for _ in range(chance.randint(1, 3)):
                savepoint = connection.transaction()
                await savepoint.start()
                added = entries(await add(connection, chance.randint(1, 3)))
                await connection.execute(f"SELECT pg_sleep({chance.choice([0, 0, 0.001, 0.004])})")
                if chance.random() < 0.2:
                    await savepoint.rollback()
                else:
                    await savepoint.commit()
                    wrote += added
            if chance.random() < 0.1:
                await transaction.rollback()
            else:
                await transaction.commit()
                committed += wrote


async def test_a_row_that_is_committed_late_is_answered_after_rows_that_began_later(
    database_url: str, relay: asyncpg.Connection, writer: asyncpg.Connection
) -> None:
    poller = await Poller.start(relay)
    late = writer.transaction()
    await late.start()
    late_ids = await add(writer)
    async with own_connection(database_url) as other:
        early_ids = await add(other)

    assert await poller.poll() == entries(early_ids)
    assert await poller.poll() == []
    await late.commit()
    assert await poller.poll() == entries(late_ids)
    assert await poller.poll() == []


async def test_a_transaction_that_was_open_when_the_relay_began_is_answered(
    relay: asyncpg.Connection, writer: asyncpg.Connection
) -> None:
    async with writer.transaction():
        ids = await add(writer)
        poller = await Poller.start(relay)
    assert await poller.poll() == entries(ids)


async def test_rows_from_before_the_snapshot_are_left_to_the_walk(
    relay: asyncpg.Connection, writer: asyncpg.Connection
) -> None:
    await add(writer)
    poller = await Poller.start(relay)
    assert await poller.poll() == []


async def test_xids_that_another_cluster_wrote_are_never_answered_and_the_walk_sees_their_rows(
    relay: asyncpg.Connection, writer: asyncpg.Connection
) -> None:
    (restored,) = await add(writer)
    await writer.execute("UPDATE jobq.outbox SET xid = '4000000000000'")
    poller = await Poller.start(relay)
    (new,) = await add(writer)

    assert await poller.poll() == entries([new])
    assert await poller.poll() == []
    page = await follow.page(relay, SCHEMA, after=START, overdue_s=0, limit=10)
    assert page.lists == {("default", 2): [(restored, 1), (new, 1)]}


async def test_lists_come_apart_in_id_order_with_what_may_go_beyond_their_limit(
    relay: asyncpg.Connection, writer: asyncpg.Connection
) -> None:
    poller = await Poller.start(relay)
    poller.horizon += timedelta(hours=1)
    first, second, third = sorted(UUID(int=new_job_id().int) for _ in range(3))
    async with writer.transaction():
        await add(writer, ids=[third])
        await add(writer, ids=[first], generation=2)
        await add(writer, ids=[second], delay_s=60)
        (other,) = await add(writer, queue="mail", priority=1)

    lists = {(new.queue, new.priority): new for new in await poller.lists()}

    assert set(lists) == {("default", 2), ("mail", 1)}
    new = lists["default", 2]
    assert list(new.entries) == [*entries([first], 2), *entries([second]), *entries([third])]
    assert list(new.again) == [True, True, False]
    assert new.delays[0] is new.delays[2] is None
    assert new.delays[1] == pytest.approx(60, abs=1)
    assert list(lists["mail", 1].entries) == entries([other], priority=1)


async def test_a_row_that_is_due_beyond_the_horizon_is_not_answered(
    relay: asyncpg.Connection, writer: asyncpg.Connection
) -> None:
    poller = await Poller.start(relay)
    poller.horizon += timedelta(seconds=10)
    await add(writer, delay_s=30)
    due_soon = await add(writer, delay_s=5)
    assert await poller.poll() == entries(due_soon)


async def test_a_rescheduled_row_is_answered_again_and_a_crashed_one_is_not(
    relay: asyncpg.Connection, writer: asyncpg.Connection
) -> None:
    poller = await Poller.start(relay)
    retried, crashed = await add(writer, 2)
    await poller.poll()

    await reschedule(writer, SCHEMA, [Reschedule(retried, 1)])
    await crash(writer, SCHEMA, [(crashed, 1)])

    assert await poller.poll() == entries([retried], 2)


async def test_a_poll_says_that_its_limit_cut_it(relay: asyncpg.Connection, writer: asyncpg.Connection) -> None:
    poller = await Poller.start(relay)
    poller.limit = 3
    await add(writer, 2)
    assert len(await poller.poll()) == 2
    assert not poller.is_cut
    await add(writer, 4)
    assert len(await poller.poll()) == 3
    assert poller.is_cut


# --- timers, pages, rows read again


async def test_timers_answer_what_comes_due_between_two_moments_soonest_first(
    relay: asyncpg.Connection, writer: asyncpg.Connection
) -> None:
    (late,) = await add(writer, delay_s=50)
    (soon,) = await add(writer, delay_s=20, priority=3)
    await add(writer, delay_s=5)
    await add(writer, delay_s=500)
    await add(writer)
    after = await follow.clock(relay, SCHEMA, ahead_s=10)
    horizon = await follow.clock(relay, SCHEMA, ahead_s=100)

    found = await follow.timers(relay, SCHEMA, after=after, horizon=horizon, limit=10)

    assert [(timer.entry, timer.priority) for timer in found] == [(*entries([soon], 1, 3), 3), (*entries([late]), 2)]
    assert found[0].delay_s == pytest.approx(20, abs=2)
    assert await follow.timers(relay, SCHEMA, after=after, horizon=horizon, limit=1) != []
    assert await follow.timers(relay, SCHEMA, after=found[0].run_at, horizon=found[1].run_at, limit=9) == [
        found[1]._replace(delay_s=pytest.approx(50, abs=2))
    ]


async def test_pages_follow_each_other_by_id_and_tell_what_is_due(
    relay: asyncpg.Connection, writer: asyncpg.Connection
) -> None:
    ids = await add(writer, 3)
    await add(writer, delay_s=60)
    (just_due,) = await add(writer, delay_s=-1)

    (mail,) = await add(writer, queue="mail", priority=3)

    first = await follow.page(relay, SCHEMA, after=START, overdue_s=0, limit=3)
    second = await follow.page(relay, SCHEMA, after=first.last, overdue_s=0, limit=4)
    overdue = await follow.page(relay, SCHEMA, after=first.last, overdue_s=30, limit=4)
    beyond = await follow.page(relay, SCHEMA, after=second.last, overdue_s=0, limit=4)

    assert first == Page({("default", 2): [(id_, 1) for id_ in ids]}, last=ids[-1], is_empty=False, is_last=False)
    assert second == Page(
        {("default", 2): [(just_due, 1)], ("mail", 3): [(mail, 1)]}, last=mail, is_empty=False, is_last=True
    )
    assert overdue == Page({("mail", 3): [(mail, 1)]}, last=mail, is_empty=False, is_last=True)
    assert beyond == Page({}, last=mail, is_empty=True, is_last=True)


async def test_reread_leaves_out_what_is_gone_or_not_due_and_tells_the_generation_of_now(
    relay: asyncpg.Connection, writer: asyncpg.Connection
) -> None:
    gone, retried, same = await add(writer, 3)
    (later,) = await add(writer, delay_s=60)
    await delete(writer, [gone])
    await reschedule(writer, SCHEMA, [Reschedule(retried, 1)])

    found = await follow.reread(relay, SCHEMA, [same, later, retried, gone])

    assert found == entries([retried], 2) + entries([same])


# --- who leads, and how long an answer may take


async def test_one_session_leads_until_it_ends(relay: asyncpg.Connection, writer: asyncpg.Connection) -> None:
    assert await follow.try_lead(relay, SCHEMA)
    assert not await follow.try_lead(writer, SCHEMA)
    assert await follow.try_lead(writer, "another_schema")

    assert await follow.end_leader(writer, SCHEMA) == 1
    await until(relay.is_closed, "the leader's session has ended")
    assert await follow.try_lead(writer, SCHEMA)


async def test_end_leader_ends_nobody_who_does_not_lead(relay: asyncpg.Connection, writer: asyncpg.Connection) -> None:
    await follow.try_lead(relay, "another_schema")
    assert await follow.end_leader(writer, SCHEMA) == 0
    assert await relay.fetchval("SELECT 1") == 1


async def test_a_server_that_says_nothing_any_more_is_given_up(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with postgres_proxy(database_url) as (proxy, url), own_connection(url) as connection:
        poller = await Poller.start(connection)
        monkeypatch.setattr(follow, "ANSWER_TIMEOUT_S", 0.05)
        proxy.is_black_hole = True
        with pytest.raises(TimeoutError):
            await poller.poll()


async def test_the_server_notices_soon_that_a_relay_is_gone(database_url: str) -> None:
    async with postgres_proxy(database_url) as (_, url), own_connection(url) as connection:
        await follow.keep_alive(connection, SCHEMA)
        assert await connection.fetchval("SHOW tcp_user_timeout") in ("10s", "0")  # 0 where it is a unix socket
