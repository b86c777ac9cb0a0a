"""Reliable push: entries reach Redis once, or the backlog says that they may not have."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest

from jobq.broker.scripts import Broker, script
from jobq.relay.backlog import Backlog, Repair
from jobq.relay.push import ReliablePush
from jobq.settings import RelaySettings
from tests.faults.proxy import Proxy, redis_proxy
from tests.redis_state import DATABASE_ID, QUEUE, A, B, C, D, entry, everything, open_broker, seed
from tests.waiting import until

PUSH = script("push").sha.encode()


class Pusher:
    """A relay's push, its backlog, and a look at Redis that no proxy stands before."""

    def __init__(self, through: Broker, broker: Broker, **settings: Any):
        chosen = RelaySettings(**({"beat": 0.001} | settings))
        self.backlog = Backlog(chosen.ready_limit)
        self.reliable = ReliablePush(through, self.backlog, chosen)
        self.broker = broker

    async def push(self, *entries: str, limit: int | None = None) -> int:
        return await self.reliable.push(QUEUE, 2, list(entries), limit=limit)

    async def push_when_redis_is_back(self, *entries: str) -> int:
        await until(lambda: not self.reliable.is_away, "it is time to try again")
        return await self.push(*entries)

    async def ready(self) -> object:
        return (await everything(self.broker)).get("ready:2", [])

    async def stats(self) -> object:
        return (await everything(self.broker)).get("stats", {})

    def repair(self) -> Repair:
        repair = self.backlog.take()
        assert repair is not None, "nothing was marked"
        return repair


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[Broker]:
    async with open_broker(redis_url) as opened:
        yield opened


@asynccontextmanager
async def behind_proxy(redis_url: str, broker: Broker) -> AsyncIterator[tuple[Proxy, Pusher]]:
    """A pusher that has met its queue through a proxy."""
    async with redis_proxy(redis_url) as (proxy, url), open_broker(url) as through:
        pusher = Pusher(through, broker)
        await pusher.reliable.meet(QUEUE)
        yield proxy, pusher


async def test_entries_arrive_in_order_in_calls_of_a_bounded_size(broker: Broker) -> None:
    pusher = Pusher(broker, broker, push_limit=2)
    entries = [entry(id_) for id_ in (A, B, C, D, "e" * 32)]

    assert await pusher.push(*entries) == 5
    assert await pusher.ready() == entries
    assert pusher.backlog.is_clean
    assert pusher.backlog.length(QUEUE, 2) == 5


@pytest.mark.parametrize("times", [1, 2])
async def test_a_push_whose_reply_is_lost_is_sent_again_and_adds_nothing(
    redis_url: str, broker: Broker, times: int
) -> None:
    async with behind_proxy(redis_url, broker) as (proxy, pusher):
        for _ in range(times):
            proxy.lose_reply(PUSH)

        assert await pusher.push(entry(A)) == 1
        assert await pusher.push(entry(B)) == 1

        assert proxy.losses == times
        assert await pusher.ready() == [entry(A), entry(B)]
        assert await pusher.stats() == {"pushed": "2"}, "no loss was taken for one"
        assert pusher.backlog.is_clean


async def test_a_push_that_is_lost_on_its_way_is_sent_again(redis_url: str, broker: Broker) -> None:
    async with behind_proxy(redis_url, broker) as (proxy, pusher):
        proxy.lose_request(PUSH)

        assert await pusher.push(entry(A)) == 1
        assert await pusher.ready() == [entry(A)]


async def test_a_push_that_gets_no_answer_at_all_is_left_to_the_walk_and_is_no_loss_of_redis(
    redis_url: str, broker: Broker
) -> None:
    async with behind_proxy(redis_url, broker) as (proxy, pusher):
        for _ in range(3):
            proxy.lose_reply(PUSH)

        assert await pusher.push(entry(A)) == 0
        assert pusher.reliable.is_away
        assert pusher.repair().covers((QUEUE, 2), UUID(A))

        assert await pusher.push_when_redis_is_back(entry(A), entry(B)) == 2
        assert await pusher.ready() == [entry(A), entry(B)]
        assert await pusher.stats() == {"pushed": "2"}


async def test_while_redis_is_away_nothing_is_tried_and_everything_marked(redis_url: str, broker: Broker) -> None:
    async with behind_proxy(redis_url, broker) as (proxy, pusher):
        proxy.is_refusing = True
        proxy.cut()

        assert await pusher.push(entry(B)) == 0
        accepted = proxy.accepted
        assert await pusher.push(entry(A)) == 0
        assert proxy.accepted == accepted
        assert pusher.repair().covers((QUEUE, 2), UUID(A))


async def test_a_redis_that_lost_its_data_is_left_alone_and_the_queue_marked_for_a_rebuild(broker: Broker) -> None:
    pusher = Pusher(broker, broker, beat=60)
    await pusher.push(entry(A))
    await broker.client.flushall()

    assert await pusher.push(entry(B)) == 0

    assert await pusher.ready() == []
    assert await pusher.stats() == {"losses": "1"}
    assert pusher.backlog.is_held(QUEUE)
    assert not pusher.backlog.is_clean
    assert await broker.queues() == {QUEUE, "default"}


async def test_a_queue_that_was_lost_takes_new_entries_again_once_leadership_is_confirmed(broker: Broker) -> None:
    pusher = Pusher(broker, broker)
    await pusher.push(entry(A))
    await broker.client.flushall()
    await pusher.push(entry(B))

    assert await pusher.push(entry(C)) == 0, "this may be an old leader"
    pusher.reliable.confirm_leadership()
    assert await pusher.push(entry(D)) == 1
    assert await pusher.ready() == [entry(D)]
    assert await pusher.stats() == {"losses": "1", "pushed": "1"}


async def test_of_two_relays_the_one_that_pushed_before_is_refused(broker: Broker) -> None:
    old, new = Pusher(broker, broker), Pusher(broker, broker)
    await old.push(entry(A))
    await new.push(entry(B))

    assert await old.push(entry(C)) == 0
    assert await old.push(entry(D)) == 0
    await old.reliable.touch(QUEUE)
    assert await new.push(entry(D)) == 1

    assert await new.ready() == [entry(A), entry(B), entry(D)]
    assert not old.backlog.is_clean
    assert new.backlog.is_clean


async def test_a_full_redis_is_back_pressure_and_no_loss(broker: Broker) -> None:
    pusher = Pusher(broker, broker)
    await pusher.push(entry(A))
    await broker.client.config_set("maxmemory", 1)
    try:
        assert await pusher.push(entry(B)) == 0
        await pusher.reliable.touch(QUEUE)
        await pusher.reliable.announce()
        assert not pusher.reliable.is_away, "Redis answers, and workers must drain it"
        assert pusher.backlog.is_held(QUEUE)
    finally:
        await broker.client.config_set("maxmemory", 0)

    assert await pusher.push(entry(B)) == 1
    assert await pusher.ready() == [entry(A), entry(B)]
    assert await pusher.stats() == {"pushed": "2"}


async def test_a_list_takes_no_more_than_its_limit_and_the_rest_is_marked(broker: Broker) -> None:
    pusher = Pusher(broker, broker, ready_limit=3)
    entries = [entry(id_) for id_ in (A, B, C, D)]

    assert await pusher.push(*entries) == 3
    assert pusher.backlog.is_full(QUEUE, 2)
    assert pusher.backlog.take() is None, "there is no room yet"
    assert await pusher.push(entry("e" * 32), limit=6) == 1, "retries may go to twice the limit"
    pusher.backlog.note_length(QUEUE, 2, 1)
    repair = pusher.repair()
    assert (repair.covers((QUEUE, 2), UUID(D)), repair.covers((QUEUE, 2), UUID(C))) == (True, False)


async def test_a_list_that_an_earlier_relay_filled_is_not_filled_beyond_its_limit(broker: Broker) -> None:
    await seed(broker, {"relay": "earlier:9", "ready:2": [entry(A), entry(B)], "known": {A: "1", B: "1"}})
    pusher = Pusher(broker, broker, ready_limit=3)

    assert await pusher.push(entry(C), entry(D)) == 1
    assert await pusher.ready() == [entry(A), entry(B), entry(C)]


async def test_entries_out_of_order_are_all_marked(broker: Broker) -> None:
    """As timers come, by the moment they are due."""
    pusher = Pusher(broker, broker, ready_limit=1)

    assert await pusher.push(entry(D), entry(C), entry(A), entry(B)) == 1

    pusher.backlog.note_length(QUEUE, 2, 0)
    assert pusher.repair().covers((QUEUE, 2), UUID(A))


async def test_announce_mends_what_somebody_else_wrote(broker: Broker) -> None:
    pusher = Pusher(broker, broker)
    await pusher.push(entry(A))
    await seed(broker, {"stats": ["junk"]})
    await broker.client.set(f"jobq:1:{DATABASE_ID.hex[:8]}:queues", "junk")

    await pusher.reliable.announce()
    await until(lambda: not pusher.reliable.is_away, "it is time to try again")
    await pusher.reliable.announce()

    assert await broker.queues() == {QUEUE, "default"}
    assert await pusher.stats() == {"mended": "1"}
