"""A Redis at its memory limit refuses new entries, and still lets workers drain it (MUST)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from jobq.broker.client import OutOfMemoryError, connect_sync
from jobq.broker.scripts import Broker, Fetched, Unparked, beat
from tests.redis_state import QUEUE, A, B, C, D, entry, everything, open_broker, raw, seed


@pytest.fixture
async def full(redis_url: str) -> AsyncIterator[Broker]:
    """A server that holds some entries, and has no memory left."""
    async with open_broker(redis_url) as broker:
        await seed(
            broker,
            {
                "relay": "r:1",
                "known": {A: "1", B: "1", C: "1", D: "1"},
                "ready:2": [entry(A)],
                "parked:mail": [entry(B)],
                "working:w": [entry(C)],
                "working:dead": [entry(D)],
                "beats": {"w": "1", "dead": "1"},
            },
        )
        await broker.client.config_set("maxmemory", 1)
        try:
            yield broker
        finally:
            await broker.client.config_set("maxmemory", 0)


async def test_a_full_redis_refuses_a_push_and_keeps_its_token(full: Broker) -> None:
    before = await everything(full)

    with pytest.raises(OutOfMemoryError):
        await full.push(QUEUE, [entry("e" * 32)], expected="r:1", token="r:2")

    assert await everything(full) == before


async def test_a_full_redis_lets_workers_beat_fetch_ack_release_park_unpark_and_sweep(
    full: Broker, redis_url: str
) -> None:
    with connect_sync(redis_url) as client:
        found = beat(
            client,
            full.keys(QUEUE),
            "w",
            counter=2,
            info="{}",
            owned=raw(entry(C), entry("e" * 32)),
            put_back=raw(entry("e" * 32)),
        )
    assert (found.lost, found.missing) == ([], [])
    assert await full.fetch(QUEUE, "w", 1) == Fetched(raw(entry(A)), 0)
    assert await full.park(QUEUE, "w", "sms", raw(entry(A))) == 1
    assert await full.unpark(QUEUE, "w", ["mail", "sms"], room=1) == Unparked(raw(entry(B)), 1)
    assert await full.release(QUEUE, "w", raw(entry(C), entry(B))) == 2
    assert await full.sweep(QUEUE, "dead", b"1", {entry(D).encode(): 2}) == (1, 0)
    assert await full.ack(QUEUE, "w", raw(entry("e" * 32))) == 1
    await full.mend(QUEUE)

    state = await everything(full)
    assert state["known"] == {A: "1", B: "1", C: "1", D: "2"}
    assert state["ready:2"] == [entry(D, 2), entry(C), entry(B), entry(A)]
    assert not [name for name in state if name.startswith(("working", "parked"))]
