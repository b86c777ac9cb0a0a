"""The real scripts and the model of them, side by side: every call is made to both.

A call compares the two replies, and `compare` all that the two hold. What is different says whether a script does
something that the model does not know, or the model promises something that no script keeps. Called by the machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, TypeVar

import pytest
import redis

from jobq.broker.client import OutOfMemoryError, connect
from jobq.broker.scripts import Broker, Fetched, Pushed, Unparked, beat
from tests.model import scripts as model
from tests.model.scripts import Beat, Entry, Redis
from tests.redis_state import BASE, DATABASE_ID, QUEUE

T = TypeVar("T")
TASK = "task"
PATIENCE_S = 60
"""For a call: a reply that is late is not to be taken for one that is lost, however busy the machine is."""


class Saved(NamedTuple):
    """All that both held at one moment."""

    dumps: dict[bytes, bytes]
    model: Redis


def raw(entry: Entry) -> bytes:
    return b"%s:%d:%d" % (str(entry.id).encode(), entry.generation, entry.priority)


def parsed(raw_: bytes) -> Entry:
    id_, generation, priority = raw_.decode().split(":")
    return Entry(id_, int(generation), int(priority))


def raws(entries: Sequence[Entry]) -> list[bytes]:
    return [raw(entry) for entry in entries]


class Pair:
    """One queue, in a real Redis and in the model."""

    def __init__(self, url: str):
        self._runner = asyncio.Runner()
        self._client = connect(url)
        self._sync_client = redis.Redis.from_url(url, socket_timeout=PATIENCE_S)
        self._broker = Broker(self._client, DATABASE_ID)
        self._is_full = False
        self.model = Redis()
        self.flush()

    def close(self) -> None:
        self.make_room()
        self._sync_client.close()
        self._do(self._client.aclose())
        self._runner.close()

    def _do(self, call: Awaitable[T]) -> T:
        async def wait() -> T:
            return await call

        return self._runner.run(wait())

    # --- the scripts

    def push(self, entries: Sequence[Entry], *, expected: str, token: str) -> Pushed | None:
        """A full Redis refuses it whole, and nothing has changed."""
        call = self._broker.push(QUEUE, raws(entries), expected=expected, token=token)
        if self._is_full:
            with pytest.raises(OutOfMemoryError):
                self._do(call)
            return None
        reply = self._do(call)
        told = model.push(self.model, expected, token, entries)
        assert reply == (Pushed(told[0], told[1]) if told is not None else None)  # type: ignore[arg-type]
        return reply

    def fetch(self, worker: str, count: int) -> tuple[Entry, ...] | None:
        reply = self._do(self._broker.fetch(QUEUE, worker, count))
        told = model.fetch(self.model, worker, count)
        assert reply == (Fetched(raws(told[1]), told[0]) if told is not None else None)
        return told[1] if told is not None else None

    def beat(self, worker: str, counter: int, owned: Sequence[Entry], put_back: Sequence[Entry]) -> Beat:
        keys, back = self._broker.keys(QUEUE), raws(put_back)
        reply = beat(self._sync_client, keys, worker, counter=counter, info="{}", owned=raws(owned), put_back=back)
        told = model.beat(self.model, worker, b"%d" % counter, owned, put_back)
        lists = [[parsed(one) for one in found] for found in (reply.unknown, reply.lost, reply.missing)]
        assert (reply.registered, *map(tuple, lists)) == told
        return told

    def ack(self, worker: str, entries: Sequence[Entry]) -> None:
        removed = self._do(self._broker.ack(QUEUE, worker, raws(entries)))
        assert removed == model.ack(self.model, worker, entries)

    def release(self, worker: str, entries: Sequence[Entry]) -> None:
        back = self._do(self._broker.release(QUEUE, worker, raws(entries)))
        assert back == model.release(self.model, worker, entries)

    def park(self, worker: str, entries: Sequence[Entry]) -> None:
        parked = self._do(self._broker.park(QUEUE, worker, TASK, raws(entries)))
        assert parked == model.park(self.model, worker, TASK, entries)

    def unpark(self, worker: str, *, room: int, limit: int) -> tuple[Entry, ...]:
        reply = self._do(self._broker.unpark(QUEUE, worker, [TASK], room=room, limit=limit))
        back, taken = model.unpark(self.model, worker, [TASK], limit, room)
        assert reply == Unparked(raws(taken), back)
        return taken

    def sweep(self, worker: str, seen: bytes, standings: Mapping[Entry, int]) -> None:
        verdicts = {raw(entry): generation for entry, generation in standings.items()}
        swept = self._do(self._broker.sweep(QUEUE, worker, seen, verdicts))
        assert swept == model.sweep(self.model, worker, seen, standings)

    # --- faults

    def flush(self) -> None:
        self._sync_client.flushall()
        self.model = Redis()

    def save(self) -> Saved:
        keys = self._sync_client.keys()
        dumps = [self._sync_client.dump(key) for key in keys]
        return Saved(dict(zip(keys, dumps, strict=True)), deepcopy(self.model))

    def go_back(self, saved: Saved) -> None:
        """Redis holds what it held then: pushes are forgotten, acks undone, dead workers back."""
        self.make_room()
        with self._sync_client.pipeline() as pipeline:
            pipeline.flushall()
            for key, dump in saved.dumps.items():
                pipeline.restore(key, 0, dump)
            pipeline.execute()
        self.model = deepcopy(saved.model)

    def fill(self) -> None:
        """Redis reaches its memory limit."""
        self._is_full = True
        self._sync_client.config_set("maxmemory", 1)

    def make_room(self) -> None:
        if self._is_full:
            self._is_full = False
            self._sync_client.config_set("maxmemory", 0)

    # --- what both hold

    def compare(self) -> None:
        assert self._held() == _held(self.model)

    def _held(self) -> dict[str, Any]:
        keys = sorted(self._sync_client.keys())
        with self._sync_client.pipeline(transaction=False) as pipeline:
            for key in keys:
                name = key.decode().removeprefix(BASE)
                if name in ("known", "beats", "workers", "stats"):
                    pipeline.hgetall(key)
                elif name == "relay":
                    pipeline.get(key)
                else:
                    pipeline.lrange(key, 0, -1)
            values = pipeline.execute()
        names = [key.decode().removeprefix(BASE) for key in keys]
        return {name: _told(name, value) for name, value in zip(names, values, strict=True) if name != "stats"}


def _told(name: str, value: Any) -> Any:
    match name:
        case "known":
            return {id_.decode(): int(generation) for id_, generation in value.items()}
        case "beats":
            return {worker.decode(): counter for worker, counter in value.items()}
        case "workers":
            return {worker.decode() for worker in value}
        case "relay":
            return value.decode()
        case "bell":
            return len(value)
        case _:
            return [parsed(one) for one in value]


def _held(model_: Redis) -> dict[str, Any]:
    """The model's Redis, key by key; an empty one does not exist."""
    held: dict[str, Any] = {"relay": model_.token, "known": model_.known, "beats": model_.beats, "bell": model_.bell}
    held["workers"] = set(model_.beats)
    held |= {f"ready:{priority}": entries for priority, entries in model_.ready.items()}
    held |= {f"working:{worker}": entries for worker, entries in model_.working.items()}
    held |= {f"parked:{task}": entries for task, entries in model_.parked.items()}
    return {name: value for name, value in held.items() if value}
