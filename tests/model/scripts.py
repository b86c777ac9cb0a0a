"""What the Lua scripts do: one function for each file of jobq/broker/lua, over a Redis of dicts and lists.

An entry is (id, generation, priority). Ids, workers and tasks may be anything that can be a key: small numbers in
the search, the real names in the test that drives the real scripts. A function changes the Redis it is given and
returns the script's reply, with None for a refusal. Counters for people (`stats`) are left out.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Id = Hashable
Worker = Hashable
Task = Hashable
Counter = Hashable

PRIORITIES = (1, 2, 3, 4)
ADOPT = "*"
BELL_LIMIT = 64


class Entry(NamedTuple):
    id: Id
    generation: int
    priority: int = 1


class Beat(NamedTuple):
    """The reply of beat.lua."""

    registered: bool
    unknown: tuple[Entry, ...] = ()
    lost: tuple[Entry, ...] = ()
    missing: tuple[Entry, ...] = ()


@dataclass
class Redis:
    """The keys of one queue. An empty list is a key that does not exist."""

    token: str | None = None
    known: dict[Id, int] = field(default_factory=dict)
    ready: dict[int, list[Entry]] = field(default_factory=lambda: {priority: [] for priority in PRIORITIES})
    working: dict[Worker, list[Entry]] = field(default_factory=dict)
    parked: dict[Task, list[Entry]] = field(default_factory=dict)
    beats: dict[Worker, Counter] = field(default_factory=dict)
    bell: int = 0

    def newest(self, id_: Id) -> int:
        return self.known.get(id_, 0)

    def ring(self) -> None:
        self.bell = min(self.bell + 1, BELL_LIMIT)


def push(redis: Redis, expected: str, token: str, entries: Sequence[Entry]) -> tuple[int, tuple[int, ...]] | None:
    """push.lua: (pushed, lengths of the ready lists), or None where another token is."""
    if expected != ADOPT and redis.token not in (expected, token):
        return None
    pushed = 0
    for entry in entries:
        if redis.newest(entry.id) < entry.generation:
            redis.ready[entry.priority].append(entry)
            redis.known[entry.id] = entry.generation
            pushed += 1
    redis.token = token
    lengths = tuple(len(redis.ready[priority]) for priority in PRIORITIES)
    if any(lengths):
        redis.ring()
    return pushed, lengths


def fetch(redis: Redis, worker: Worker, count: int) -> tuple[int, tuple[Entry, ...]] | None:
    """fetch.lua: (entries left in ready, the entries moved), or None for a worker without a heartbeat."""
    if worker not in redis.beats:
        return None
    working = redis.working.setdefault(worker, [])
    moved: list[Entry] = []
    for priority in PRIORITIES:
        while len(moved) < count and redis.ready[priority]:
            entry = redis.ready[priority].pop(0)
            if redis.newest(entry.id) == entry.generation:
                working.append(entry)
                moved.append(entry)
    left = sum(map(len, redis.ready.values()))
    if left:
        redis.ring()
    else:
        redis.bell = 0
    return left, tuple(moved)


def beat(redis: Redis, worker: Worker, counter: Counter, owned: Sequence[Entry], put_back: Sequence[Entry]) -> Beat:
    """beat.lua. A worker that Redis did not know has all it owns put back, not only what two beats missed."""
    registered = worker in redis.beats
    redis.beats[worker] = counter
    before = redis.working.setdefault(worker, [])
    unknown = tuple(entry for entry in before if entry not in owned)
    for entry in put_back if registered else owned:
        if redis.newest(entry.id) < entry.generation:
            if entry not in before:
                before.append(entry)
            redis.known[entry.id] = entry.generation
    lost = tuple(entry for entry in owned if redis.newest(entry.id) > entry.generation)
    missing = tuple(entry for entry in owned if redis.newest(entry.id) < entry.generation)
    return Beat(registered, unknown, lost, missing)


def ack(redis: Redis, worker: Worker, entries: Sequence[Entry]) -> int:
    """ack.lua: how many were still in the working list. What is known at a newer generation stays known."""
    for entry in entries:
        if redis.newest(entry.id) <= entry.generation:
            redis.known.pop(entry.id, None)
    return sum(_taken_from(redis.working, worker, entry) for entry in entries)


def release(redis: Redis, worker: Worker, entries: Sequence[Entry]) -> int:
    """release.lua: how many went back, to the front of ready, their order kept."""
    back = 0
    for entry in reversed(entries):
        if _taken_from(redis.working, worker, entry):
            redis.ready[entry.priority].insert(0, entry)
            back += 1
    if back:
        redis.ring()
    return back


def park(redis: Redis, worker: Worker, task: Task, entries: Sequence[Entry]) -> int:
    """park.lua: how many were set aside."""
    parked = [entry for entry in entries if _taken_from(redis.working, worker, entry)]
    redis.parked.setdefault(task, []).extend(parked)
    return len(parked)


def unpark(redis: Redis, worker: Worker, tasks: Sequence[Task], count: int, room: int) -> tuple[int, tuple[Entry, ...]]:
    """unpark.lua: (entries put back into ready, entries that are in the working list now)."""
    room = room if worker in redis.beats else 0
    back, taken = 0, []
    for task in tasks:
        parked = redis.parked.get(task, [])
        while back + len(taken) < count and parked:
            entry = parked.pop(0)
            if len(taken) < room and redis.newest(entry.id) == entry.generation:
                redis.working.setdefault(worker, []).append(entry)
                taken.append(entry)
            else:
                redis.ready[entry.priority].append(entry)
                back += 1
    if back:
        redis.ring()
    return back, tuple(taken)


def sweep(redis: Redis, worker: Worker, seen: Counter, standings: Mapping[Entry, int]) -> tuple[int, int] | None:
    """sweep.lua: (taken back, dropped), or None for a worker whose counter has moved."""
    if redis.beats.get(worker, b"") != seen:
        return None
    swept = dropped = 0
    for entry in reversed(redis.working.get(worker, [])):
        now = redis.newest(entry.id)
        current = standings.get(entry, entry.generation)
        if current == entry.generation:
            if now == entry.generation:
                redis.ready[entry.priority].insert(0, entry)
                swept += 1
        elif current == 0:
            if now <= entry.generation:
                redis.known.pop(entry.id, None)
            dropped += 1
        elif now < current or now == entry.generation:
            redis.ready[entry.priority].insert(0, entry._replace(generation=current))
            redis.known[entry.id] = current
            swept += 1
    redis.working.pop(worker, None)
    redis.beats.pop(worker, None)
    if swept:
        redis.ring()
    return swept, dropped


def _taken_from(lists: dict[Worker, list[Entry]], worker: Worker, entry: Entry) -> bool:
    """LREM 1: remove the first of its kind, and say whether there was one."""
    if entry not in lists.get(worker, []):
        return False
    lists[worker].remove(entry)
    return True
