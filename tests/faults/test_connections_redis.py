"""Every script and every command that jobq sends to Redis meets every fault a connection can have."""

from __future__ import annotations

import pytest

from jobq.broker.scripts import script
from tests.faults.connections import Call, assert_quiet, requests, survive
from tests.faults.world import LUA

ENTRY = b":1:2\r\n"


def sha(name: str, by: str = "book", *also: bytes) -> Call:
    return Call(f"{name}.lua", (script(name).sha.encode(), *also), by)


CALLS = {
    "relay": [
        sha("push", "book", ENTRY),  # most pushes are empty
        sha("mend"),
        Call("HMGET known", (b"HMGET",), "missed"),
        Call("GET token", (b"GET\r\n", b":relay"), "rival"),
        Call("SADD queues", (b"SADD",)),
    ],
    "turns": [
        sha("fetch", "held"),
        Call("BLPOP bell", (b"BLPOP",)),
        sha("ack"),
        sha("release", "hand_back"),
        sha("park", "stranger"),
        sha("unpark", "stranger"),
        Call("HINCRBY stats", (b"HINCRBY",), "unseen"),
    ],
    "lease": [
        sha("beat"),
        sha("sweep", "orphan", ENTRY),
        Call("HGETALL beats", (b"HGETALL", b":beats")),
        Call("HKEYS workers", (b"HKEYS", b":workers")),
        Call("LRANGE working", (b"LRANGE",), "orphan"),
        Call("SSCAN queues", (b"SSCAN", b":queues")),
    ],
    "start": [
        Call("INFO", (b"INFO",), "restart"),
        Call("HELLO", (b"HELLO",), "restart"),
        Call("EVAL", (b"EVAL\r\n",), "unscripted"),  # here, since the worlds of a part share a Redis
    ],
}


OTHERS = (b"$6\r\nCLIENT\r\n",)  # how a connection introduces itself, after HELLO


def test_every_script_is_there() -> None:
    struck = {call.name for calls in CALLS.values() for call in calls if call.name.endswith(".lua")}
    assert struck == {path.name for path in LUA.glob("*.lua")}


async def test_every_command_that_is_sent_is_there(database_urls, redis_url):
    matches = [call.match for calls in CALLS.values() for call in calls] + [(other,) for other in OTHERS]
    empty = [(script("push").sha.encode(),), (script("sweep").sha.encode(),)]
    heard = await requests("valkey", database_urls[0], redis_url)

    assert [said for said in heard if not any(all(word in said for word in match) for match in matches + empty)] == []
    assert [match for match in matches if not any(all(word in said for word in match) for said in heard)] == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", CALLS)
async def test_every_call_survives_every_fault(part, database_urls, redis_url, caplog):
    await survive(CALLS[part], "valkey", database_urls, redis_url)

    assert_quiet(caplog.records)
