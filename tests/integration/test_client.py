"""Connections to Redis: nothing is sent twice behind our back, and no reply is taken for another's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
import redis

from jobq.broker import client as client_module
from jobq.broker import scripts
from jobq.broker.client import UNAVAILABLE, check_server, connect, connect_sync
from jobq.errors import ConfigurationError
from tests.faults.proxy import Proxy, redis_proxy
from tests.redis_state import QUEUE, A, Value, entry, everything, open_broker
from tests.waiting import until


@pytest.fixture
async def proxied(redis_url: str) -> AsyncIterator[tuple[Proxy, str]]:
    async with redis_proxy(redis_url) as opened:
        yield opened


async def list_length(url: str) -> int:
    client = connect(url)
    length = await client.llen("list")
    await client.aclose()
    return int(length)


async def test_a_write_without_a_reply_is_sent_once(proxied: tuple[Proxy, str], redis_url: str) -> None:
    proxy, url = proxied
    client = connect(url)
    await client.ping()
    proxy.lose_reply(b"LPUSH")

    with pytest.raises(UNAVAILABLE):
        await client.lpush("list", "a")

    assert await list_length(redis_url) == 1
    await client.aclose()


async def test_a_write_of_the_heartbeat_without_a_reply_is_sent_once(
    proxied: tuple[Proxy, str], redis_url: str
) -> None:
    proxy, url = proxied
    with connect_sync(url) as client:
        await asyncio.to_thread(client.ping)
        proxy.lose_reply(b"LPUSH")

        with pytest.raises(UNAVAILABLE):
            await asyncio.to_thread(client.lpush, "list", "a")

    assert await list_length(redis_url) == 1


async def test_a_script_without_a_reply_is_run_once(proxied: tuple[Proxy, str], redis_url: str) -> None:
    proxy, url = proxied
    async with open_broker(url) as broker:
        await broker.push(QUEUE, [], expected="*", token="r:1")
        proxy.lose_reply(scripts.script("push").sha.encode())

        with pytest.raises(UNAVAILABLE):
            await broker.push(QUEUE, [entry(A)], expected="r:1", token="r:2")

    async with open_broker(redis_url) as broker:
        expected: dict[str, Value] = {"ready:2": [entry(A)], "bell": ["1"], "stats": {"pushed": "1"}}
        assert await everything(broker) == expected | {"relay": "r:2", "known": {A: "1"}}


async def test_a_call_that_was_cancelled_leaves_its_reply_to_nobody_else(proxied: tuple[Proxy, str]) -> None:
    proxy, url = proxied
    client = connect(url)
    await client.mset({"a": "A", "b": "B"})
    proxy.latency_s = 0.02
    for _ in range(5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.03):
                await client.get("a")
        assert await client.get("b") == b"B"
    await client.aclose()


@pytest.mark.parametrize("is_sync", [False, True])
async def test_a_reply_nobody_asked_for_is_not_taken_for_the_next_one(
    proxied: tuple[Proxy, str], is_sync: bool
) -> None:
    proxy, url = proxied
    client, sync_client = connect(url), connect_sync(url)

    async def get() -> object:
        return await (asyncio.to_thread(sync_client.get, "a") if is_sync else client.get("a"))

    await client.set("a", "A")
    assert await get() == b"A"
    proxy.say(b"$5\r\nstale\r\n")
    await list_length(url)  # another connection's way there and back, by which it has arrived

    assert await get() == b"A"
    await client.aclose()
    sync_client.close()


async def test_a_call_has_a_deadline(proxied: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, url = proxied
    monkeypatch.setattr(scripts, "CALL_TIMEOUT_S", 0.05)
    async with open_broker(url) as broker:
        assert await broker.token(QUEUE) is None
        for call in (
            lambda: broker.token(QUEUE),
            lambda: broker.push(QUEUE, [], expected="*", token="r:1"),
            lambda: broker.mend(QUEUE),
            broker.queues,
        ):
            proxy.is_black_hole = True
            with pytest.raises(TimeoutError):
                await call()
            proxy.is_black_hole = False
            proxy.cut()


async def test_a_beat_has_a_deadline(proxied: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, url = proxied
    monkeypatch.setattr(client_module, "SYNC_TIMEOUT_S", 0.05)
    with connect_sync(url) as client:
        await asyncio.to_thread(client.ping)
        proxy.is_black_hole = True
        with pytest.raises(redis.TimeoutError):
            await asyncio.to_thread(client.ping)


async def test_a_connection_that_was_reset_is_replaced_at_the_next_call(proxied: tuple[Proxy, str]) -> None:
    proxy, url = proxied
    client = connect(url)
    await client.set("a", "A")
    proxy.cut()
    await until(lambda: proxy.open_connections == 0, "the connection is gone")

    with pytest.raises(UNAVAILABLE):
        await client.get("a")
    assert await client.get("a") == b"A"
    await client.aclose()


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("http://localhost", "http://"),
        ("localhost:6379", "redis://"),
        ("redis://localhost?protocol=3", "protocol"),
        ("redis://localhost/0?protocol=", "protocol"),
        ("redis://localhost?decode_responses=true", "decode_responses"),
        ("unix:///tmp/socket?socket_timeout=5", "socket_timeout"),
    ],
)
def test_a_url_that_would_break_the_rules_is_refused(url: str, named: str) -> None:
    for make in (connect, connect_sync):
        with pytest.raises(ConfigurationError, match=named):
            make(url)


async def test_check_server_tells_what_it_found(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    client = connect(redis_url)
    found = await check_server(client)
    await client.aclose()

    assert found["maxmemory_policy"] == "noeviction"
    assert found["server"] in ("valkey", "redis")
    assert caplog.records == []


@pytest.mark.parametrize(("memory", "level"), [("0", logging.WARNING), ("1gb", logging.ERROR)])
async def test_check_server_says_loudly_that_a_server_evicts(
    redis_url: str, caplog: pytest.LogCaptureFixture, memory: str, level: int
) -> None:
    client = connect(redis_url)
    await client.config_set("maxmemory-policy", "allkeys-lru")
    await client.config_set("maxmemory", memory)
    try:
        await check_server(client)
    finally:
        await client.config_set("maxmemory-policy", "noeviction")
        await client.config_set("maxmemory", "0")
        await client.aclose()

    (record,) = caplog.records
    assert record.levelno == level
    assert "noeviction" in record.getMessage()


async def test_check_server_has_a_deadline(proxied: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, url = proxied
    monkeypatch.setattr(client_module, "CALL_TIMEOUT_S", 0.05)
    proxy.is_black_hole = True
    client = connect(url)

    with pytest.raises(TimeoutError):
        await check_server(client)
    await client.aclose()
