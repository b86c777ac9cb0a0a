"""What an aborted script leaves: an entry too many at worst, never a hole (MUST).

A script is aborted at one of its commands by a Redis user who may not use that command. Whatever had been done by
then, an id in `known` must be in a list at that generation, and the same call with full rights must succeed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import redis
from redis.exceptions import ResponseError

from jobq.broker.client import connect, connect_sync
from jobq.broker.scripts import Broker, beat
from tests.redis_state import DATABASE_ID, QUEUE, A, B, C, D, Value, entry, everything, open_broker, raw, seed

E, F, G, H = (f"{n:032x}" for n in (0xE, 0xF, 0x10, 0x11))
SEEDED: dict[str, Value] = {
    "relay": "r:1",
    "known": {A: "1", B: "1", C: "1", D: "2", F: "1", G: "1", H: "1"},
    "ready:2": [entry(D), entry(C), entry(F)],
    "ready:1": [entry(D, 2, 1)],
    "working:w": [entry(A), entry(B)],
    "parked:mail": [entry(G), entry(H)],
    "beats": {"w": "7"},
}
Call = Callable[[Broker, redis.Redis], Awaitable[object]]


async def _beat(broker: Broker, client: redis.Redis) -> object:
    return beat(client, broker.keys(QUEUE), "w", counter=8, info="{}", owned=raw(entry(E)), put_back=raw(entry(E)))


CALLS: dict[str, Call] = {
    "push": lambda broker, _: broker.push(QUEUE, [entry(E), entry(A, 2)], expected="r:1", token="r:2"),
    "fetch": lambda broker, _: broker.fetch(QUEUE, "w", 2),
    "ack": lambda broker, _: broker.ack(QUEUE, "w", raw(entry(A), entry(B))),
    "ack-out-of-order": lambda broker, _: broker.ack(QUEUE, "w", raw(entry(B), entry(A))),
    "release": lambda broker, _: broker.release(QUEUE, "w", raw(entry(A), entry(B))),
    "park": lambda broker, _: broker.park(QUEUE, "w", "sms", raw(entry(B))),
    "unpark": lambda broker, _: broker.unpark(QUEUE, "w", ["mail"], room=1),
    "sweep": lambda broker, _: broker.sweep(QUEUE, "w", b"7", {entry(A).encode(): 2, entry(B).encode(): 0}),
    "beat": _beat,
}
WRITES = {
    "push": ["rpush", "hset", "set", "lpush"],
    "fetch": ["rpush", "ltrim", "lpush"],
    "ack": ["hdel", "ltrim"],
    "ack-out-of-order": ["hdel", "lrem"],
    "release": ["lpush", "lrem"],
    "park": ["rpush", "lrem"],
    "unpark": ["rpush", "lpop", "lpush"],
    "sweep": ["lpush", "hset", "hdel", "del"],
    "beat": ["hset", "rpush"],
}


@pytest.mark.parametrize(("call", "denied"), [(call, write) for call, writes in WRITES.items() for write in writes])
async def test_a_script_that_is_aborted_leaves_no_hole_and_can_be_repeated(
    redis_url: str, call: str, denied: str
) -> None:
    partly_url = f"{redis_url}{'&' if '?' in redis_url else '?'}username=partly&password=x"
    async with open_broker(redis_url) as broker:
        await seed(broker, SEEDED)
        await broker.client.acl_setuser(
            "partly", enabled=True, reset=True, passwords=["+x"], keys=["*"], commands=["+@all", f"-{denied}"]
        )
        limited, limited_sync = connect(partly_url), connect_sync(partly_url)
        try:
            with pytest.raises(ResponseError, match=r"no permissions|NOPERM"):
                await CALLS[call](Broker(limited, DATABASE_ID), limited_sync)
        finally:
            await limited.aclose()
            limited_sync.close()
            await broker.client.acl_deluser("partly")
        assert holes(await everything(broker)) == set()

        with connect_sync(redis_url) as client:
            await CALLS[call](broker, client)
        assert holes(await everything(broker)) == set()


async def test_the_check_of_these_tests_finds_a_hole(redis_url: str) -> None:
    async with open_broker(redis_url) as broker:
        await seed(broker, SEEDED | {"known": {A: "1", B: "2", C: "1", D: "2", E: "1"}})
        assert holes(await everything(broker)) == {(B, "2"), (E, "1")}


def holes(state: dict[str, Value]) -> set[tuple[str, str]]:
    """What `known` holds and no list does."""
    lists = [value for name, value in state.items() if name.split(":")[0] in ("ready", "working", "parked")]
    reachable = {tuple(one.split(":")[:2]) for value in lists for one in value}
    known = state.get("known", {})
    assert isinstance(known, dict)
    return {pair for pair in known.items() if pair not in reachable}
