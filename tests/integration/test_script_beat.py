"""The heartbeat's script: seed keys, beat once, compare every key of the server and the answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import redis

from jobq.broker.client import connect_sync
from jobq.broker.scripts import Beat, Broker, beat
from tests.redis_state import QUEUE, A, B, C, D, entry, everything, open_broker, raw, seed

REGISTERED = {"beats": {"w": "8"}, "workers": {"w": "{}"}}


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[Broker]:
    async with open_broker(redis_url) as opened:
        yield opened


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    opened = connect_sync(redis_url)
    yield opened
    opened.close()


def beat_once(
    client: redis.Redis, broker: Broker, *owned: str, put_back: tuple[str, ...] = (), counter: int = 9
) -> Beat:
    return beat(client, broker.keys(QUEUE), "w", counter=counter, info="{}", owned=raw(*owned), put_back=raw(*put_back))


async def test_the_first_beat_registers_a_worker(client: redis.Redis, broker: Broker) -> None:
    found = beat_once(client, broker)

    assert found == Beat(False, [], [], [])
    assert await everything(broker) == {"beats": {"w": "9"}, "workers": {"w": "{}"}}


async def test_a_beat_renews_the_counter_and_finds_nothing_amiss(client: redis.Redis, broker: Broker) -> None:
    held = {"known": {A: "1"}, "working:w": [entry(A)]}
    await seed(broker, REGISTERED | held)

    found = beat_once(client, broker, entry(A))

    assert found == Beat(True, [], [], [])
    assert await everything(broker) == {"beats": {"w": "9"}, "workers": {"w": "{}"}} | held


async def test_a_beat_tells_what_is_unknown_lost_and_missing_and_changes_none_of_it(
    client: redis.Redis, broker: Broker
) -> None:
    held = {"known": {A: "1", B: "2"}, "working:w": [entry(A), entry(B)]}
    await seed(broker, REGISTERED | held)

    found = beat_once(client, broker, entry(B), entry(C))

    assert found == Beat(True, unknown=raw(entry(A)), lost=raw(entry(B)), missing=raw(entry(C)))
    assert await everything(broker) == {"beats": {"w": "9"}, "workers": {"w": "{}"}} | held


async def test_what_two_beats_miss_is_put_back_by_the_second(client: redis.Redis, broker: Broker) -> None:
    await seed(broker, REGISTERED)

    first = beat_once(client, broker, entry(A), counter=9)
    assert first.missing == raw(entry(A))
    assert "known" not in await everything(broker)

    second = beat_once(client, broker, entry(A), put_back=(entry(A),), counter=10)
    assert second == Beat(True, [], [], [])
    assert await everything(broker) == {
        "beats": {"w": "10"},
        "workers": {"w": "{}"},
        "known": {A: "1"},
        "working:w": [entry(A)],
        "stats": {"reasserted": "1"},
    }


async def test_a_job_that_one_beat_missed_because_its_ack_raced_is_not_brought_back(
    client: redis.Redis, broker: Broker
) -> None:
    await seed(broker, REGISTERED | {"known": {A: "1"}, "working:w": [entry(A)]})
    await broker.ack(QUEUE, "w", raw(entry(A)))

    # The list of this beat was made before the worker knew that its ack had arrived.
    found = beat_once(client, broker, entry(A))

    assert found.missing == raw(entry(A))
    state = await everything(broker)
    assert "known" not in state
    assert "working:w" not in state


async def test_put_back_leaves_alone_what_redis_knows_by_now(client: redis.Redis, broker: Broker) -> None:
    held = {"known": {A: "1", B: "2"}, "ready:2": [entry(A), entry(B, 2)]}
    await seed(broker, REGISTERED | held)

    found = beat_once(client, broker, entry(A), entry(B), put_back=(entry(A), entry(B)))

    assert found == Beat(True, [], raw(entry(B)), [])
    assert await everything(broker) == {"beats": {"w": "9"}, "workers": {"w": "{}"}} | held


async def test_put_back_adds_no_second_copy_to_the_working_list(client: redis.Redis, broker: Broker) -> None:
    await seed(broker, REGISTERED | {"working:w": [entry(A)]})

    beat_once(client, broker, entry(A), put_back=(entry(A),))

    state = await everything(broker)
    assert (state["working:w"], state["known"]) == ([entry(A)], {A: "1"})


async def test_a_worker_that_redis_lost_puts_back_all_it_owns_at_once(client: redis.Redis, broker: Broker) -> None:
    await seed(broker, {"known": {B: "2"}, "ready:2": [entry(B, 2)]})

    found = beat_once(client, broker, entry(A), entry(B), entry(C, 3, 1))

    assert found == Beat(False, [], raw(entry(B)), [])
    assert await everything(broker) == {
        "beats": {"w": "9"},
        "workers": {"w": "{}"},
        "known": {A: "1", B: "2", C: "3"},
        "ready:2": [entry(B, 2)],
        "working:w": [entry(A), entry(C, 3, 1)],
        "stats": {"reasserted": "2"},
    }


async def test_a_beat_sent_again_after_a_lost_reply_changes_nothing(client: redis.Redis, broker: Broker) -> None:
    beat_once(client, broker, entry(A))
    before = await everything(broker)

    assert beat_once(client, broker, entry(A)) == Beat(True, [], [], [])
    assert await everything(broker) == before


async def test_garbage_in_the_working_list_is_told_as_unknown(client: redis.Redis, broker: Broker) -> None:
    await seed(broker, REGISTERED | {"working:w": ["\udcff\udcfe", entry(D)], "known": {D: "1"}})

    found = beat_once(client, broker, entry(D))

    assert found == Beat(True, [b"\xff\xfe"], [], [])


async def test_a_name_that_was_removed_is_written_again(client: redis.Redis, broker: Broker) -> None:
    await seed(broker, {"beats": {"w": "8"}})

    beat_once(client, broker)

    assert (await everything(broker))["workers"] == {"w": "{}"}
