"""The leader, turn by turn: poll and push, losses, full memory, strangers' keys, pauses."""

from __future__ import annotations

import pytest

from jobq.outbox.settle import Reschedule, reschedule
from tests.faults.proxy import redis_proxy
from tests.redis_state import Value
from tests.relay_rows import SCHEMA, RelayUnderTest, add, entries, open_relay, own_connection
from tests.waiting import until


@pytest.fixture
def database_url(shared_database_url: str) -> str:
    """These tests leave jobq's tables as they are, and share a database."""
    return shared_database_url


async def is_there(relay: RelayUnderTest, wanted: list[str]) -> bool:
    return sorted(await relay.ready()) == sorted(wanted)


async def test_a_turn_pushes_what_was_committed_since_the_last_in_order(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url) as relay:
        await relay.settle()
        async with relay.database.transaction():
            ids = await add(relay.database, 7)
            await relay.turn()
            assert await relay.ready() == []
        await relay.turn()
        assert await relay.ready() == entries(ids)


async def test_a_job_that_is_rescheduled_is_pushed_at_its_new_generation(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url) as relay:
        (id_,) = await add(relay.database)
        await relay.turn()
        await reschedule(relay.database, SCHEMA, [Reschedule(id_, 1)])
        await relay.turn()
        assert await relay.ready() == entries([id_]) + entries([id_], 2)
        assert await relay.broker.known("default", [id_]) == [2]


async def test_what_a_relay_has_read_and_not_pushed_is_brought_by_the_next_one(
    database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(Exception):
        pass

    async def die(*_: object) -> None:
        raise Died

    async with open_relay(database_url, redis_url) as relay:
        await relay.settle()
        monkeypatch.setattr(relay.leader, "_push_new", die)
        ids = await add(relay.database, 3)
        with pytest.raises(Died):
            await relay.leader.step()

    async with open_relay(database_url, redis_url) as relay:
        await relay.settle()
        assert await relay.ready() == entries(ids)


async def test_queues_are_announced_to_sweepers(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url) as relay:
        await add(relay.database, queue="mail")
        await relay.turn()
        assert await relay.broker.queues() == {"default", "mail"}


async def test_more_rows_than_a_poll_hands_over_all_arrive_in_the_end(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url, poll_limit=10) as relay:
        await relay.settle()
        ids = await add(relay.database, 35)
        await relay.turn()
        await relay.settle()
        assert sorted(await relay.ready()) == entries(ids)


# --- the snapshot always advances


async def test_rows_committed_while_redis_is_away_arrive_when_it_is_back(database_url: str, redis_url: str) -> None:
    async with redis_proxy(redis_url) as (proxy, url), open_relay(database_url, url) as relay:
        await relay.settle()
        proxy.is_refusing = True
        proxy.cut()
        ids = []
        for _ in range(5):
            ids += await add(relay.database, 3)
            before = relay.leader._since
            await relay.turn()
            assert relay.leader._since.xmax > before.xmax
        proxy.is_refusing = False

        await relay.turn_until(lambda: is_there(relay, entries(ids)), "everything is pushed")
        assert "losses" not in await relay.stats()


async def test_rows_that_a_full_redis_refuses_arrive_when_it_has_room_and_no_loss_is_reported(
    database_url: str, redis_url: str
) -> None:
    async with open_relay(database_url, redis_url, detect_loss_every=0.001) as relay:
        await relay.settle()
        first = await add(relay.database, 3)
        await relay.turn()
        await relay.broker.client.config_set("maxmemory", 1)
        try:
            refused = await add(relay.database, 3)
            relay.leader._next_announce = 0.0
            await relay.turn(5)
            assert await relay.ready() == entries(first)
        finally:
            await relay.broker.client.config_set("maxmemory", 0)

        await until(lambda: not relay.leader._backlog.is_held("default"), "the refusal is over")
        await relay.settle()
        assert await relay.ready() == entries(first + refused)
        assert "losses" not in await relay.stats()


async def test_a_relay_starts_on_a_full_redis(database_url: str, redis_url: str) -> None:
    async with own_connection(database_url) as connection:
        ids = await add(connection, 3)
        async with open_relay(database_url, redis_url) as relay:
            await relay.broker.client.config_set("maxmemory", 1)
            try:
                await relay.turn(3)
            finally:
                await relay.broker.client.config_set("maxmemory", 0)
            await until(lambda: not relay.leader._backlog.is_held("default"), "the refusal is over")
            await relay.settle()
            assert await relay.ready() == entries(ids)


# --- losses


async def test_flushall_is_found_by_a_touch_and_everything_pushed_again(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url, detect_loss_every=0.01) as relay:
        ids = await add(relay.database, 10)
        mails = await add(relay.database, 5, queue="mail")
        await relay.settle()
        await relay.broker.client.flushall()

        await relay.turn_until(lambda: not relay.leader._backlog.is_clean, "the loss is found")
        await relay.settle()

        assert await relay.ready() == entries(ids)
        assert await relay.ready("mail") == entries(mails)
        for queue, count in (("default", 10), ("mail", 5)):
            assert await relay.stats(queue) == {"losses": 1, "repushed": count}
        assert await relay.broker.queues() == {"default", "mail"}


async def test_a_redis_that_went_back_in_time_is_found_by_its_token(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url, detect_loss_every=0.01) as relay:
        await relay.settle()
        keys = relay.broker.keys("default")
        (old,) = await add(relay.database)
        await relay.turn()
        earlier = {key: await relay.broker.client.dump(key) for key in (keys.relay, keys.known, keys.ready[1])}
        (new,) = await add(relay.database)
        await relay.turn()
        for key, value in earlier.items():
            await relay.broker.client.restore(key, 0, value, replace=True)

        await relay.turn_until(lambda: not relay.leader._backlog.is_clean, "the loss is found")
        await relay.settle()
        assert await relay.ready() == entries([old, new])


async def test_new_rows_of_a_lost_queue_arrive_during_the_hold(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url, beat=60, detect_loss_every=0.001) as relay:
        await add(relay.database, 5)
        await relay.settle()
        await relay.broker.client.flushall()
        await relay.turn_until(lambda: relay.leader._backlog.is_held("default"), "the loss is found")
        new = await add(relay.database, 2)
        await relay.turn(2)
        assert await relay.ready() == entries(new)


async def test_a_loss_between_the_start_and_the_first_touch_is_found(database_url: str, redis_url: str) -> None:
    """The walk must know the token of a queue before it believes what Redis knows."""
    async with open_relay(database_url, redis_url) as relay:
        ids = await add(relay.database, 10)
        await relay.settle()
    async with open_relay(database_url, redis_url, page=4) as relay:
        leader = relay.leader
        await leader._walk.step()
        await leader._walk.step()
        await relay.broker.client.flushall()
        await relay.turn_until(lambda: is_there(relay, entries(ids)), "everything is pushed again")


# --- strangers


WRONG: dict[str, Value] = {"relay": ["x"], "known": "x", "bell": {"x": "y"}, "stats": "x", "ready:2": "x", "beats": "x"}


@pytest.mark.parametrize("name", WRONG)
async def test_a_key_of_a_wrong_type_is_mended_and_the_queue_rebuilt(
    database_url: str, redis_url: str, name: str
) -> None:
    async with open_relay(database_url, redis_url, detect_loss_every=0.001) as relay:
        ids = await add(relay.database, 5)
        await relay.settle()
        key, client = relay.broker.keys("default").base + name, relay.broker.client
        await client.delete(key)
        match WRONG[name]:
            case list(value):
                await client.rpush(key, *value)
            case dict(value):
                await client.hset(key, mapping=value)
            case value:
                await client.set(key, value)
        relay.leader._next_announce = 0.0

        async def is_rebuilt() -> bool:
            found = await relay.stats() if await client.type(relay.broker.keys("default").stats) == b"hash" else {}
            return (
                "losses" in found and relay.leader._backlog.is_clean and set(await relay.ready()) == set(entries(ids))
            )

        await relay.turn_until(is_rebuilt, "the queue is rebuilt")
        assert (await relay.stats())["mended"] == 1


async def test_queue_names_of_a_wrong_type_do_not_stop_the_relay(database_url: str, redis_url: str) -> None:
    async with open_relay(database_url, redis_url) as relay:
        await relay.settle()
        name = relay.broker.keys("x").base.replace("{x}:", "queues")
        await relay.broker.client.delete(name)
        await relay.broker.client.set(name, "junk")
        relay.leader._next_announce = 0.0
        ids = await add(relay.database, 2)

        await relay.turn_until(lambda: is_there(relay, entries(ids)), "the relay goes on")
        relay.leader._next_announce = 0.0
        await relay.turn()
        assert await relay.broker.queues() == {"default"}
