"""The walk: what Redis lacks is pushed, once; what it must not have again is not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest

from jobq.broker.client import connect_sync
from jobq.broker.scripts import Broker, beat
from jobq.outbox import follow
from jobq.outbox.settle import Reschedule, reschedule
from jobq.relay.walk import Walk
from tests.faults.proxy import redis_proxy
from tests.relay_rows import SCHEMA, RelayUnderTest, add, delete, entries, open_relay, own_connection
from tests.waiting import until


@pytest.fixture
def database_url(shared_database_url: str) -> str:
    """These tests leave jobq's tables as they are, and share a database."""
    return shared_database_url


@asynccontextmanager
async def walk_by_hand(
    database_url: str, redis_url: str, **settings: Any
) -> AsyncIterator[tuple[RelayUnderTest, Walk]]:
    """A leader that has caught up, and its walk, with everything to look through again."""
    async with open_relay(database_url, redis_url, **settings) as relay:
        await relay.settle()
        relay.leader._backlog.mark_all()
        yield relay, relay.leader._walk


async def register(relay: RelayUnderTest, redis_url: str, *owned: str) -> None:
    with connect_sync(redis_url) as client:
        raws = [entry.encode() for entry in owned]
        beat(client, relay.broker.keys("default"), "w", counter=1, info="{}", owned=raws, put_back=[])


# --- start


async def test_the_start_brings_every_row_that_is_due_in_order_of_its_id(database_url: str, redis_url: str) -> None:
    async with own_connection(database_url) as connection:
        ids = await add(connection, 25)
        mails = await add(connection, 3, queue="mail", priority=1)
        await add(connection, delay_s=60)
        (due,) = await add(connection, delay_s=-60)
        async with open_relay(database_url, redis_url, page=4) as relay:
            await relay.settle()
            assert await relay.ready() == entries([*ids, due])
            assert await relay.ready("mail", 1) == entries(mails, priority=1)
            assert await relay.stats() == {"pushed": 26}


async def test_rows_that_polls_and_the_walk_both_see_are_pushed_once(database_url: str, redis_url: str) -> None:
    async with own_connection(database_url) as connection:
        ids = await add(connection, 20)
        async with open_relay(database_url, redis_url, page=3) as relay:
            for _ in range(10):
                ids += await add(connection, 4)
                await relay.turn()
            await relay.settle()
            assert sorted(await relay.ready()) == entries(ids)


async def test_a_restart_pushes_nothing_that_redis_knows(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url) as relay:
        ids = await add(relay.database, 10)
        await relay.settle()
    async with open_relay(database_url, redis_url, page=3) as relay:
        await relay.settle()
        assert await relay.ready() == entries(ids)
        assert await relay.stats() == {"pushed": 10}


async def test_xids_from_another_cluster_are_brought_by_the_walk_once(database_url: str, redis_url: str) -> None:
    async with own_connection(database_url) as connection:
        ids = await add(connection, 5)
        await connection.execute("UPDATE jobq.outbox SET xid = '4000000000000'")
        async with open_relay(database_url, redis_url) as relay:
            await relay.settle()
            await relay.turn(10)
            assert await relay.ready() == entries(ids)
            assert await relay.stats() == {"pushed": 5}


# --- PostgreSQL, Redis, PostgreSQL


async def test_a_job_completed_and_acked_after_its_page_was_read_is_not_pushed_again(
    database_url: str, redis_url: str
) -> None:
    async with walk_by_hand(database_url, redis_url) as (relay, walk):
        done, waiting = await add(relay.database, 2)
        await relay.turn()
        await register(relay, redis_url)
        await relay.broker.fetch("default", "w", 1)
        relay.leader._backlog.mark_all()
        await walk.step()
        assert walk._page, "the page is read and not compared"
        await delete(relay.database, [done])
        await relay.broker.ack("default", "w", [entry.encode() for entry in entries([done])])

        await walk.step()

        assert await relay.ready() == entries([waiting])
        assert await relay.broker.known("default", [done, waiting]) == [0, 1]


async def test_a_job_that_ends_while_the_walk_compares_is_not_pushed_again(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with walk_by_hand(database_url, redis_url) as (relay, walk):
        (done,) = await add(relay.database)
        await relay.turn()
        await register(relay, redis_url)
        await relay.broker.fetch("default", "w", 1)
        relay.leader._backlog.mark_all()
        await walk.step()
        ended: list[UUID] = []

        def ending(question: Any) -> Any:
            """Ask, and let the job end before the next question, whichever store that is for."""

            async def asked(*args: Any) -> Any:
                answer = await question(*args)
                if not ended:
                    ended.append(done)
                    await delete(relay.database, [done])
                    await relay.broker.ack("default", "w", [entry.encode() for entry in entries([done])])
                return answer

            return asked

        monkeypatch.setattr(relay.broker, "known", ending(relay.broker.known))
        monkeypatch.setattr(follow, "reread", ending(follow.reread))
        await walk.step()

        assert ended == [done]
        assert await relay.ready() == []


async def test_a_job_rescheduled_after_its_page_was_read_is_pushed_at_its_new_generation_only(
    database_url: str, redis_url: str
) -> None:
    async with walk_by_hand(database_url, redis_url) as (relay, walk):
        (id_,) = await add(relay.database)
        await walk.step()
        await reschedule(relay.database, SCHEMA, [Reschedule(id_, 1)])

        await walk.step()

        assert await relay.ready() == entries([id_], 2)


async def test_a_job_put_off_after_its_page_was_read_is_not_pushed_before_its_time(
    database_url: str, redis_url: str
) -> None:
    async with walk_by_hand(database_url, redis_url) as (relay, walk):
        (id_,) = await add(relay.database)
        await walk.step()
        await reschedule(relay.database, SCHEMA, [Reschedule(id_, 1, 60)])

        await walk.step()

        assert await relay.ready() == []


# --- limits


async def test_ready_lists_stay_within_their_limit_and_drain_by_priority_and_id(
    database_url: str, redis_url: str
) -> None:
    async with own_connection(database_url) as connection:
        ids = {priority: await add(connection, 500, priority=priority) for priority in (3, 1)}
        async with open_relay(database_url, redis_url, ready_limit=100, page=70, push_limit=30) as relay:
            await register(relay, redis_url)
            drained: list[str] = []

            async def can_fetch_in_order() -> bool:
                urgent_left = 500 - sum(entry.endswith(":1") for entry in drained)
                priority, left = (1, urgent_left) if urgent_left else (3, 1000 - len(drained))
                return len(await relay.ready(priority=priority)) >= min(40, left)

            while len(drained) < 1000:
                await relay.turn_until(can_fetch_in_order, "what is most urgent is there")
                for priority in (1, 3):
                    assert len(await relay.ready(priority=priority)) <= 100
                fetched = await relay.broker.fetch("default", "w", 20)
                assert fetched is not None
                drained += [raw.decode() for raw in fetched.entries]
                await complete(relay.broker, connection, fetched.entries)
                relay.leader._next_touch = 0.0
            await relay.settle()
            assert drained == entries(ids[1], priority=1) + entries(ids[3], priority=3)
            assert not relay.leader._backlog.has_full_lists


async def complete(broker: Broker, connection: Any, raws: list[bytes]) -> None:
    await delete(connection, [UUID(raw.split(b":")[0].decode()) for raw in raws])
    await broker.ack("default", "w", raws)


async def test_new_rows_wait_behind_a_full_list_and_come_in_order(database_url: str, redis_url: str) -> None:
    async with own_connection(database_url) as connection:
        ids = await add(connection, 30)
        async with open_relay(database_url, redis_url, ready_limit=20, page=10) as relay:
            await relay.turn(10)
            ids += await add(connection, 5)
            await relay.turn(3)
            assert await relay.ready() == entries(ids[:20])

            await register(relay, redis_url)
            fetched = await relay.broker.fetch("default", "w", 15)
            assert fetched is not None
            relay.leader._next_touch = 0.0
            await relay.settle()
            assert await relay.ready() == entries(ids[15:])


async def test_retries_and_timers_may_go_to_twice_the_limit(database_url: str, redis_url: str) -> None:
    async with own_connection(database_url) as connection:
        await add(connection, 30)
        async with open_relay(database_url, redis_url, ready_limit=10) as relay:
            await relay.turn(5)
            retried = await add(connection, 4, generation=2)
            timers = await add(connection, 4, delay_s=0.02)
            await add(connection, 10)
            await relay.turn_until(lambda: has_length(relay, 18), "retries and timers are there")
            assert (await relay.ready())[10:] == entries(retried, 2) + entries(timers)

            await add(connection, 10, generation=3)
            await relay.turn(5)
            assert len(await relay.ready()) == 20


async def has_length(relay: RelayUnderTest, length: int) -> bool:
    return len(await relay.ready()) >= length


async def test_a_walk_whose_lists_are_all_full_reads_no_further(database_url: str, redis_url: str) -> None:
    async with own_connection(database_url) as connection:
        await add(connection, 100)
        async with open_relay(database_url, redis_url, ready_limit=10, page=5) as relay:
            await relay.turn(40)
            await register(relay, redis_url)
            await relay.broker.fetch("default", "w", 10)
            relay.leader._next_touch = 0.0
            walk = relay.leader._walk
            await relay.turn_until(lambda: walk.is_repairing, "the walk goes on")
            await relay.turn_until(lambda: has_length(relay, 10), "the list is full again")
            await relay.turn()
            assert not walk.is_repairing


# --- repairs


async def forget(relay: RelayUnderTest, ids: list[UUID], *, priority: int) -> None:
    """Let Redis lose jobs of one list."""
    keys = relay.broker.keys("default")
    for id_, entry in zip(ids, entries(ids, priority=priority), strict=True):
        await relay.broker.client.hdel(keys.known, id_.hex)
        await relay.broker.client.lrem(keys.ready[priority - 1], 1, entry)


async def test_a_repair_that_begins_inside_a_page_brings_all_that_is_behind_its_start(
    database_url: str, redis_url: str
) -> None:
    async with open_relay(database_url, redis_url) as relay:
        ids = [id_ for priority in (1, 3) * 3 for id_ in await add(relay.database, priority=priority)]
        await relay.settle()
        of_one, of_three = ids[0::2], ids[1::2]
        for priority, lost in ((1, of_one), (3, of_three[1:])):
            await forget(relay, lost, priority=priority)
            relay.leader._backlog.mark("default", priority, before=lost[0])

        await relay.settle()

        assert await relay.ready(priority=1) == entries(of_one, priority=1)
        assert await relay.ready(priority=3) == entries(of_three, priority=3)


async def test_a_repair_that_meets_a_full_redis_is_done_later_in_full(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url) as relay:
        lost = await add(relay.database, 3, priority=3)
        await relay.settle()
        await forget(relay, lost, priority=3)
        relay.leader._backlog.mark_all()
        await relay.leader._walk.step()
        await relay.broker.client.config_set("maxmemory", 1)
        try:
            refused = await add(relay.database, priority=1)
            await relay.turn()
        finally:
            await relay.broker.client.config_set("maxmemory", 0)
        assert relay.leader._backlog.is_held("default")

        await until(lambda: not relay.leader._backlog.is_held("default"), "the refusal is over")
        await relay.settle()
        assert await relay.ready(priority=1) == entries(refused, priority=1)
        assert await relay.ready(priority=3) == entries(lost, priority=3)


# --- losses


async def test_after_a_loss_nothing_is_pushed_before_the_hold_is_over_and_then_everything(
    database_url: str, redis_url: str
) -> None:
    async with open_relay(database_url, redis_url, beat=0.1, detect_loss_every=0.001) as relay:
        ids = await add(relay.database, 20)
        await relay.settle()
        await relay.broker.client.flushall()
        backlog = relay.leader._backlog
        await relay.turn_until(lambda: backlog.is_held("default"), "the loss is found")
        while backlog.is_held("default"):
            found = await relay.ready()
            assert not backlog.is_held("default") or not found
            await relay.turn()
        await relay.settle()
        assert await relay.ready() == entries(ids)
        assert await relay.stats() == {"losses": 1, "repushed": 20}


async def test_what_workers_say_they_run_during_the_hold_is_not_pushed(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url, beat=0.05, detect_loss_every=0.001) as relay:
        running, waiting = await add(relay.database, 2)
        await relay.settle()
        await relay.broker.client.flushall()
        await relay.turn_until(lambda: relay.leader._backlog.is_held("default"), "the loss is found")
        await register(relay, redis_url, *entries([running]))
        await relay.settle()
        assert await relay.ready() == entries([waiting])


async def test_a_loss_that_the_walk_itself_runs_into_is_held_too(database_url: str, redis_url: str) -> None:
    async with walk_by_hand(database_url, redis_url, beat=60) as (relay, walk):
        await add(relay.database, 20)
        await relay.turn()
        await relay.broker.client.flushall()
        relay.leader._backlog.mark_all()
        for _ in range(5):
            await walk.step()
        assert await relay.ready() == []
        assert relay.leader._backlog.is_held("default")


async def test_a_walk_that_redis_breaks_off_begins_again(database_url: str, redis_url: str) -> None:
    async with redis_proxy(redis_url) as (proxy, url), own_connection(database_url) as connection:
        ids = await add(connection, 40)
        async with open_relay(database_url, url, page=5) as relay:
            for _ in range(6):
                await relay.turn()
                proxy.cut()
            await relay.settle()
            assert sorted(await relay.ready()) == entries(ids)


# --- the endless scrub


@pytest.mark.parametrize("missing", [0, 7, 19])
async def test_the_scrub_finds_what_every_other_path_missed(database_url: str, redis_url: str, missing: int) -> None:
    async with open_relay(database_url, redis_url, scrub_every=0.0, page=6) as relay:
        ids = await add(relay.database, 20)
        await relay.settle()
        keys = relay.broker.keys("default")
        (lost,) = entries([ids[missing]])
        await relay.broker.client.hdel(keys.known, ids[missing].hex)
        await relay.broker.client.lrem(keys.ready[1], 1, lost)
        await relay.turn_until(lambda: has_length(relay, 20), "it is found")
        assert (await relay.ready())[-1] == lost
        assert (await relay.stats())["repushed"] == 1


async def test_the_scrub_leaves_to_the_timers_what_has_only_just_come_due(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url, scrub_every=0.0) as relay:
        await relay.settle()
        _, long_ago = await add(relay.database, 2)
        await relay.database.execute("UPDATE jobq.outbox SET xid = '3', run_at = clock_timestamp()")
        await relay.database.execute(
            "UPDATE jobq.outbox SET run_at = clock_timestamp() - interval '1 minute' WHERE id = $1", long_ago
        )
        await relay.turn_until(lambda: has_length(relay, 1), "what is long due is found")
        assert await relay.ready() == entries([long_ago])


async def test_a_generation_from_before_a_restore_makes_way_once_its_entry_was_acked(
    database_url: str, redis_url: str
) -> None:
    """PostgreSQL went back in time: Redis knows a later generation, which no row has any more."""
    async with open_relay(database_url, redis_url, scrub_every=0.0) as relay:
        (id_,) = await add(relay.database)
        await relay.broker.push("default", entries([id_], 3), expected="*", token="another:1")
        await register(relay, redis_url)
        await relay.settle()
        fetched = await relay.broker.fetch("default", "w", 5)
        assert fetched is not None
        assert fetched.entries == [entry.encode() for entry in entries([id_], 3)]
        await relay.broker.ack("default", "w", fetched.entries, "rewound")
        await relay.turn_until(lambda: has_length(relay, 1), "the row is pushed as it is")
        assert await relay.ready() == entries([id_], 1)
