"""The leader sleeps, no commit is missed, and writers notify only while it does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from jobq import migrate
from jobq.broker.client import connect
from jobq.outbox import follow, settle
from jobq.outbox.database import Database
from jobq.outbox.settle import Reschedule
from jobq.relay.wake_up import WakeUp
from jobq.settings import RelaySettings
from tests.enqueuing import engine_for
from tests.integration.test_leadership import running
from tests.relay_rows import SCHEMA, RelayUnderTest, add, entries, open_relay, own_connection
from tests.waiting import until


class Channel:
    """What writers notified, seen from a session of its own."""

    def __init__(self, connection: asyncpg.Connection):
        self._connection = connection
        self._heard: list[str] = []

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Channel]:
        async with own_connection(url) as connection:
            channel = cls(connection)
            await connection.add_listener("jobq", lambda *heard: channel._heard.append(heard[-1]))
            yield channel

    async def heard(self) -> list[str]:
        """Everything up to now: PostgreSQL delivers in the order of the commits."""
        await self._connection.execute("NOTIFY jobq, 'the end'")
        await until(lambda: self._heard[-1:] == ["the end"], "the end is heard")
        heard, self._heard = self._heard[:-1], []
        return heard


@pytest.fixture
async def channel(database_url: str) -> AsyncIterator[Channel]:
    async with Channel.open(database_url) as channel:
        yield channel


async def fall_asleep(relay: RelayUnderTest) -> None:
    await relay.settle()
    await relay.turn_until(lambda: relay.leader._wake_up.is_asleep, "the relay sleeps")
    assert await relay.leader.step() == 1.0


async def test_it_sleeps_after_a_few_quiet_polls_and_one_more_that_it_takes_with_the_lock(
    database_url: str, redis_url: str
) -> None:
    async with open_relay(database_url, redis_url, sleep_after=3) as relay:
        await relay.settle()
        relay.leader._idle_turns = 0
        pauses = [await relay.leader.step() for _ in range(6)]

    assert all(0.002 <= pause <= 0.003 for pause in pauses[:3])
    assert pauses[3:] == [0.0, 1.0, 1.0]


async def test_pauses_grow_where_it_cannot_sleep_and_end_with_the_first_row(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url, wake_up="poll") as relay:
        await relay.settle()
        pauses = [await relay.leader.step() for _ in range(60)]
        assert pauses == sorted(pauses)
        assert 0.002 <= pauses[0] <= 0.003
        assert pauses[-1] == 0.025
        await add(relay.database)
        assert await relay.leader.step() == 0
        listening = await relay.connection.fetch("SELECT pg_listening_channels()")
        assert listening == []


async def test_a_commit_wakes_it(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url) as relay:
        await fall_asleep(relay)
        assert not relay.leader.woken.is_set()

        ids = await add(relay.database)
        await until(relay.leader.woken.is_set, "the relay is woken")
        assert await relay.leader.step() == 0.0
        assert await relay.ready() == entries(ids)
        assert not relay.leader.woken.is_set()


async def test_what_is_committed_between_the_last_poll_and_the_lock_is_found_before_it_sleeps(
    database_url: str, redis_url: str
) -> None:
    async with open_relay(database_url, redis_url, sleep_after=0) as relay:
        await relay.settle()
        await relay.leader._wake_up.get_up()
        await relay.leader._poll()
        ids = await add(relay.database)

        assert await relay.leader._rest(False) == 0.0
        assert relay.leader._wake_up.is_asleep
        assert not relay.leader.woken.is_set()
        await relay.turn()
        assert await relay.ready() == entries(ids)


async def test_a_writer_that_has_not_committed_keeps_it_awake(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url, sleep_after=0) as relay:
        await relay.settle()
        await relay.leader._wake_up.get_up()
        async with relay.database.transaction():
            ids = await add(relay.database)
            pauses = [await relay.leader.step() for _ in range(50)]
            assert max(pauses) <= 0.025
            assert not relay.leader._wake_up.is_asleep
        await fall_asleep(relay)
        assert await relay.ready() == entries(ids)


async def test_writers_notify_while_it_sleeps_and_not_while_it_is_awake(
    database_url: str, redis_url: str, channel: Channel
) -> None:
    async with open_relay(database_url, redis_url) as relay:
        await fall_asleep(relay)
        await add(relay.database)
        assert await channel.heard() == [SCHEMA]

        await relay.turn()
        assert not relay.leader._wake_up.is_asleep
        await add(relay.database)
        assert await channel.heard() == []


async def test_a_repair_keeps_it_awake(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url, sleep_after=0) as relay:
        await fall_asleep(relay)
        relay.leader._backlog.mark_lost("default", hold_s=3600)
        pauses = [await relay.leader.step() for _ in range(3)]

        assert max(pauses) <= 0.025
        assert not relay.leader._wake_up.is_asleep


@pytest.mark.parametrize("is_asleep", [True, False], ids=["asleep", "awake"])
async def test_a_rolled_back_savepoint_leaves_no_gap(
    database_url: str, redis_url: str, channel: Channel, is_asleep: bool
) -> None:
    async with open_relay(database_url, redis_url) as relay:
        await relay.settle()
        if is_asleep:
            await fall_asleep(relay)
        else:
            await relay.leader._wake_up.get_up()
        async with relay.database.transaction():
            savepoint = relay.database.transaction()
            await savepoint.start()
            await add(relay.database)
            await savepoint.rollback()
            async with relay.database.transaction():
                ids = await add(relay.database)
        assert await channel.heard() == ([SCHEMA] if is_asleep else [])
        await relay.turn_until(lambda: _is_ready(relay, ids), "the row of the kept savepoint is pushed")


async def _is_ready(relay: RelayUnderTest, ids: list[Any]) -> bool:
    return await relay.ready() == entries(ids)


async def test_a_rollback_notifies_nobody(database_url: str, redis_url: str, channel: Channel) -> None:
    async with open_relay(database_url, redis_url) as relay:
        await fall_asleep(relay)
        transaction = relay.database.transaction()
        await transaction.start()
        await add(relay.database)
        await transaction.rollback()

        assert await channel.heard() == []


async def test_a_rescheduled_job_wakes_it(database_url: str, redis_url: str, channel: Channel) -> None:
    async with open_relay(database_url, redis_url) as relay:
        (id_,) = await add(relay.database)
        await fall_asleep(relay)
        await settle.reschedule(relay.database, SCHEMA, [Reschedule(id_, 1)])

        assert await channel.heard() == [SCHEMA]
        await relay.turn()
        assert await relay.broker.known("default", [id_]) == [2]


async def test_a_crash_that_a_sweeper_counts_does_not_wake_it(
    database_url: str, redis_url: str, channel: Channel
) -> None:
    async with open_relay(database_url, redis_url) as relay:
        (id_,) = await add(relay.database)
        await fall_asleep(relay)
        await relay.database.execute("UPDATE jobq.outbox SET generation = 2, crashes = 1 WHERE id = $1", id_)
        assert await channel.heard() == []


async def test_a_job_due_later_wakes_it_and_it_sleeps_no_longer_than_until_then(
    database_url: str, redis_url: str
) -> None:
    async with open_relay(database_url, redis_url) as relay:
        await fall_asleep(relay)
        (id_,) = await add(relay.database, delay_s=0.3)
        await until(relay.leader.woken.is_set, "the relay is woken")
        await relay.turn_until(lambda: relay.leader._wake_up.is_asleep, "the relay sleeps again")

        assert await relay.leader.step() <= 0.3
        await until(lambda: _is_pushed(relay, id_), "the job is pushed on time")


async def _is_pushed(relay: RelayUnderTest, id_: Any) -> bool:
    await relay.turn()
    return await relay.broker.known("default", [id_]) == [1]


async def test_another_schema_neither_wakes_it_nor_keeps_it_awake(database_url: str, redis_url: str) -> None:
    async with engine_for(database_url) as engine:
        await migrate.upgrade(engine, schema="other")
    other = Database.of(database_url)
    async with open_relay(database_url, redis_url) as relay:
        async with relay.database.transaction():
            await _add_to_other(relay.database)
            await fall_asleep(relay)
        connection = await other.connect(schema="other", name="jobq:relay")
        heard = await WakeUp.open(connection, "other", RelaySettings())
        assert await heard.fall_asleep()
        await _add_to_other(relay.database)
        await until(heard.woken.is_set, "the other relay is woken")
        assert not relay.leader.woken.is_set()
        connection.terminate()
        await other.close()


async def _add_to_other(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "INSERT INTO other.outbox (id, queue, task, args) VALUES (gen_random_uuid(), 'default', 'task', '{}')"
    )


async def test_the_lock_of_a_leader_goes_with_it(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url) as relay:
        await fall_asleep(relay)
        relay.connection.terminate()
    async with open_relay(database_url, redis_url) as relay:
        await fall_asleep(relay)


async def test_a_silenced_writer_may_prepare_its_transaction_and_its_row_is_found_all_the_same(
    database_url: str, redis_url: str, channel: Channel
) -> None:
    async with open_relay(database_url, redis_url) as relay:
        await fall_asleep(relay)
        await relay.database.execute("BEGIN")
        await relay.database.execute("SET LOCAL jobq.notify = 'off'")
        ids = await add(relay.database)
        await relay.database.execute("PREPARE TRANSACTION 'shop-1'")
        await relay.database.execute("COMMIT PREPARED 'shop-1'")

        assert await channel.heard() == []
        await relay.turn()
        assert await relay.ready() == entries(ids)


async def test_the_silence_ends_with_its_transaction(database_url: str, redis_url: str, channel: Channel) -> None:
    async with open_relay(database_url, redis_url) as relay:
        await fall_asleep(relay)
        async with relay.database.transaction():
            await relay.database.execute("SET LOCAL jobq.notify = 'off'")
        await add(relay.database)

        assert await channel.heard() == [SCHEMA]


async def test_a_rested_relay_still_touches_its_queues_in_time(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url, detect_loss_every=0.2) as relay:
        await relay.settle()
        await relay.turn_until(lambda: relay.leader._wake_up.is_asleep, "the relay sleeps")
        assert await relay.leader.step() <= 0.2


SLOW = {"sleep_longest": 600.0, "detect_loss_every": 600.0, "look_ahead": 1200.0, "scrub_every": 600.0}
"""A relay that is asleep takes no turn by itself."""


async def test_a_sleeping_relay_is_woken_in_its_serving_loop(database_url: str, redis_url: str) -> None:
    client = connect(redis_url)
    async with own_connection(database_url) as own, running(database_url, redis_url, **SLOW):
        await until(lambda: _is_somebody_asleep(own), "the relay sleeps")
        await add(own)
        await until(lambda: client.keys("*:ready:2"), "the job is pushed")
    await client.aclose()


async def test_a_sleeping_relay_that_is_to_stop_stops(database_url: str, redis_url: str) -> None:
    async with running(database_url, redis_url, **SLOW) as relay:

        def is_resting() -> bool:
            leader = relay.relay._leader
            return leader is not None and leader._wake_up.is_asleep and bool(leader.woken._waiters)

        await until(is_resting, "the relay sleeps and waits")
        await relay.stop()


async def _is_somebody_asleep(connection: asyncpg.Connection) -> bool:
    query = "SELECT count(*) FROM pg_locks WHERE classid = CAST($1 AS oid) AND mode = 'ExclusiveLock' AND granted"
    return bool(await connection.fetchval(query, follow.WAKE_LOCK))
