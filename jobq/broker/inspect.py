"""What Redis holds of a queue, for people to look at.

Invariant: reads only, whatever it finds: a key of a wrong type counts as empty, and is left for the relay to mend.
Called by cli. Calls client and keys.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from ..model import Entry
from .client import CALL_TIMEOUT_S, AsyncClient, ResponseError
from .scripts import Broker

TRAFFIC = ("pushed", "fetched", "acked")
REPAIRS = (
    "repushed",
    "reasserted",
    "adopted",
    "ghost",
    "rewound",
    "stale",
    "garbage",
    "swept",
    "sweeps",
    "fenced",
    "losses",
    "mended",
    "parked",
    "unparked",
    "released",
)
"""What is counted when something went wrong on the way and was put right."""
COUNTERS = (*TRAFFIC, *REPAIRS)
_LOOK_S = 0.1
_CLOCK_READINGS = 5
_LONGEST_WORD = 255
"""Characters of what a worker says of itself."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A worker, as it registered with one queue. It may have been killed since: only its counter tells."""

    name: str
    counter: bytes
    host: str
    pid: int
    version: str
    slots: int
    tasks: tuple[str, ...]
    running: tuple[UUID, ...]
    """The jobs in its working list."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """One queue in Redis."""

    queue: str
    ready: int
    counters: dict[str, int]
    workers: tuple[Registered, ...]


@dataclass(frozen=True, slots=True)
class ServerState:
    """The server itself, as its INFO tells."""

    server: Literal["redis", "valkey"]
    version: str
    is_replica: bool
    policy: str
    maxmemory: int
    used_memory: int
    has_aof: bool
    has_failed_to_write: bool
    """Whether its last snapshot or append-only write failed, after which it refuses writes."""


async def servers(client: AsyncClient) -> dict[str, ServerState]:
    """Ask the server about itself, in a cluster every master; by a name for people."""
    async with asyncio.timeout(CALL_TIMEOUT_S):
        masters = await client.masters()
    return {name: await server(master) for name, master in masters.items()}


async def server(client: AsyncClient) -> ServerState:
    """Ask one server about itself."""
    async with asyncio.timeout(CALL_TIMEOUT_S):
        info = await client.info()
    statuses = (info.get("rdb_last_bgsave_status", "ok"), info.get("aof_last_write_status", "ok"))
    return ServerState(
        server="valkey" if "valkey_version" in info else "redis",
        version=info.get("valkey_version") or info.get("redis_version", "unknown"),
        is_replica=info.get("role") in ("slave", "replica"),
        policy=info.get("maxmemory_policy", "unknown"),
        maxmemory=_number(info.get("maxmemory")),
        used_memory=_number(info.get("used_memory")),
        has_aof=bool(info.get("aof_enabled")),
        has_failed_to_write=any(status != "ok" for status in statuses),
    )


async def clock(client: AsyncClient) -> tuple[float, float, float]:
    """This host's clock before, the server's, and this host's after: of several readings the quickest."""
    readings: list[tuple[float, float, float]] = []
    for _ in range(_CLOCK_READINGS):
        asked_at = time.time()
        async with asyncio.timeout(CALL_TIMEOUT_S):
            seconds, microseconds = await client.time()
        readings.append((asked_at, seconds + microseconds / 1e6, time.time()))
    return min(readings, key=lambda reading: reading[2] - reading[0])


async def look(broker: Broker, queue: str) -> QueueState:
    """Read one queue."""
    keys = broker.keys(queue)
    beats, infos, stats, *lengths = await _ask(
        broker,
        [("HGETALL", keys.beats), ("HGETALL", keys.workers), ("HGETALL", keys.stats)]
        + [("LLEN", name) for name in keys.ready],
    )
    counters, known = _hash(beats), _hash(infos)
    names = sorted(counters | known)
    lists = await _ask(broker, [("LRANGE", keys.working(name), 0, -1) for name in names])
    workers = [
        _registered(name, counters.get(name, b""), known.get(name, b""), entries or [])
        for name, entries in zip(names, lists, strict=True)
    ]
    found = {name: _number(value) for name, value in _hash(stats).items()}
    return QueueState(
        queue=queue,
        ready=sum(length or 0 for length in lengths),
        counters={name: found.get(name, 0) for name in COUNTERS},
        workers=tuple(workers),
    )


async def parked(broker: Broker, places: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """How many entries wait for a worker that knows their task, by (queue, task)."""
    asked = list(places)
    lengths = await _ask(broker, [("LLEN", broker.keys(queue).parked(task)) for queue, task in asked])
    return {place: length for place, length in zip(asked, lengths, strict=True) if length}


async def counters(broker: Broker, queues: Iterable[str]) -> dict[tuple[str, str], bytes]:
    """Each worker's counter, by (queue, worker): one that lives has another one after a beat."""
    asked = list(queues)
    replies = await _ask(broker, [("HGETALL", broker.keys(queue).beats) for queue in asked])
    return {
        (queue, name): counter
        for queue, reply in zip(asked, replies, strict=True)
        for name, counter in _hash(reply).items()
    }


async def living(
    broker: Broker,
    places: Iterable[tuple[str, str]],
    *,
    within_s: float,
    enough: Callable[[set[tuple[str, str]]], bool],
) -> set[tuple[str, str]]:
    """Watch the counters of some (queue, worker); returns those that moved, as soon as they are `enough`."""
    queues = sorted({queue for queue, _ in places})
    first = await counters(broker, queues)
    moved: set[tuple[str, str]] = set()
    ends_at = time.monotonic() + within_s
    while not enough(moved) and time.monotonic() < ends_at:
        await asyncio.sleep(_LOOK_S)
        now = await counters(broker, queues)
        moved |= {place for place in places if now.get(place, b"") != first.get(place, b"") and place in now}
    return moved


async def _ask(broker: Broker, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Send commands together; None stands for what a key of a wrong type answered."""
    if not commands:
        return []
    async with asyncio.timeout(CALL_TIMEOUT_S):
        pipeline = broker.client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        replies = await pipeline.execute(raise_on_error=False)
    for reply in replies:
        if isinstance(reply, Exception) and not _is_wrong_type(reply):
            raise reply
    return [None if isinstance(reply, Exception) else reply for reply in replies]


def _is_wrong_type(error: Exception) -> bool:
    return isinstance(error, ResponseError) and "WRONGTYPE" in str(error)


def _hash(reply: dict[bytes, bytes] | None) -> dict[str, bytes]:
    return {name.decode("utf-8", "surrogateescape"): value for name, value in (reply or {}).items()}


def _registered(name: str, counter: bytes, info: bytes, entries: list[bytes]) -> Registered:
    try:
        told = json.loads(info)
    except (ValueError, RecursionError):
        told = None
    told = told if isinstance(told, dict) else {}
    tasks = told.get("tasks")
    return Registered(
        name=name,
        counter=counter,
        host=str(told.get("host", "?"))[:_LONGEST_WORD],
        pid=_number(told.get("pid")),
        version=str(told.get("version", "?"))[:_LONGEST_WORD],
        slots=_number(told.get("slots")),
        tasks=tuple(map(str, tasks)) if isinstance(tasks, list) else (),
        running=tuple(entry.id for entry in map(Entry.parse, entries) if entry is not None),
    )


def _number(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return 0
