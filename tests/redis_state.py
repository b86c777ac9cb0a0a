"""Redis as the tests of the scripts see it: seed some keys, read all of them.

Names are those of the keys of one queue without their prefix: `known`, `ready:2`, `working:w1`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from jobq.broker.client import connect
from jobq.broker.scripts import Broker

DATABASE_ID = UUID("11111111-2222-4333-8444-555555555555")
QUEUE = "q"
BASE = f"jobq:1:11111111:{{{QUEUE}}}:"
A, B, C, D = (f"{n:032x}" for n in (0xA, 0xB, 0xC, 0xD))
"""Ids, as they stand in entries; in this order."""

Value = str | list[str] | dict[str, str] | set[str]


def entry(id_: str, generation: int = 1, priority: int = 2) -> str:
    return f"{id_}:{generation}:{priority}"


def raw(*entries: str) -> list[bytes]:
    return [one.encode() for one in entries]


@asynccontextmanager
async def open_broker(url: str) -> AsyncIterator[Broker]:
    client = connect(url)
    try:
        yield Broker(client, DATABASE_ID)
    finally:
        await client.aclose()


async def seed(broker: Broker, keys: Mapping[str, Value], *, base: str = BASE) -> None:
    """Write keys as they are to be, whatever stood there."""
    for name, value in keys.items():
        await broker.client.delete(base + name)
        if isinstance(value, list):
            await broker.client.rpush(base + name, *value)
        elif isinstance(value, dict):
            await broker.client.hset(base + name, mapping=value)
        elif isinstance(value, set):
            await broker.client.sadd(base + name, *value)
        else:
            await broker.client.set(base + name, value)


async def everything(broker: Broker) -> dict[str, Value]:
    """Every key of the server, by its name without the prefix."""
    found: dict[str, Value] = {}
    async for key in broker.client.scan_iter(count=1000):
        found[key.decode("utf-8", "surrogateescape").removeprefix(BASE)] = await _read(broker, key)
    return found


async def _read(broker: Broker, key: bytes) -> Value:
    client = broker.client
    match await client.type(key):
        case b"string":
            return _text(await client.get(key))
        case b"list":
            return [_text(value) for value in await client.lrange(key, 0, -1)]
        case b"hash":
            return {_text(name): _text(value) for name, value in (await client.hgetall(key)).items()}
        case b"set":
            return {_text(value) for value in await client.smembers(key)}
        case other:
            raise AssertionError(f"{key!r} is a {other!r}")


def _text(value: Any) -> str:
    return str(value.decode("utf-8", "surrogateescape"))
