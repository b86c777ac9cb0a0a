"""Everything that is true at one moment: both stores, every process, and the faults that have happened so far.

A `World` is what is searched: how many jobs and workers, which faults, and which rule of the protocol is broken.
A `State` is a value: tuples all the way down, so that two ways to the same moment meet. A `Step` leads from one
state to the next. Numbers that only ever grow (heartbeat counters, the relay's tokens) are kept as what the protocol
uses of them, "is it still the one that I saw", or there would be no end of states.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

from . import scripts
from .scripts import Entry, Redis

Phase = Literal["open", "live", "done", "never"]
"""A job's transaction is open; its row is there; it is completed; it was rolled back, or never began."""
Kind = Literal["step", "choice", "scrub", "fault"]
"""What a step counts as where progress is asked for: the protocol's own work; something the application may do or
leave (a failure); the endless scrub; a fault."""
Stage = Literal["fetched", "running", "in body", "buffered", "settled", "release", "park"]
"""Owned and not yet read; running; between the DELETE and the COMMIT of ctx.complete(); a plain run that ended and
waits in the settler's buffer; committed, and not acked; to be given back, or set aside, once more."""
Keys = tuple[Any, ...]
"""A Redis as a value. Its token is "mine" (the relay's last), "next" (of its push without an answer), "old", None."""

TASK = "task"
EMPTY: Keys = (None, (), (), (), (), ())
LOST = object()
"""The reply that did not come."""


class World(NamedTuple):
    """The bounds of one search."""

    name: str
    jobs: tuple[Literal["effects", "plain"], ...] = ("effects",)
    """Whether a job completes with its effects, or is plain."""
    workers: int = 2
    faults: tuple[str, ...] = ()
    """What may go wrong; a name that stands there twice may happen twice."""
    at_most: int = 1
    """Faults in one history."""
    generations: int = 1
    """Up to which generation a run may fail and try again."""
    has_slow_beats: bool = False
    """Whether other things may happen between a heartbeat's look at what is owned and its arrival in Redis."""
    has_slow_scrub: bool = False
    """Whether other things may happen within a scrub. (Within a repair they always may.)"""
    can_release: bool = False
    frail: frozenset[int] = frozenset({0})
    """Workers whose heartbeat may be late. (Only the first may die: somebody must be left.)"""
    ignorant: frozenset[int] = frozenset()
    """Workers that do not know the jobs' task."""
    starts_committed: bool = False
    broken: str = ""
    """The rule that is broken."""


class Job(NamedTuple):
    """A row of the outbox, and what its job wrote beside it."""

    phase: Phase = "open"
    generation: int = 1
    effects: int = 0
    crashes: int = 0


class Walk(NamedTuple):
    stage: Literal["page", "polled", "missing", "found"]
    entries: tuple[Entry, ...]


class Relay(NamedTuple):
    """The leader. A new one knows nothing, and walks over everything."""

    token: str = scripts.ADOPT
    hand: tuple[Entry, ...] = ()
    """What it has polled and not yet pushed."""
    is_dirty: bool = True
    walk: Walk | None = None
    is_blind: bool = False
    """Its snapshot is of a later time than PostgreSQL's present one: it sees no new commit."""


class Worker(NamedTuple):
    held: tuple[tuple[Entry, Stage], ...] = ()
    is_dead: bool = False
    is_late: bool = False
    """Its heartbeats come later than its lease, and sweepers may take it for dead. All else goes on."""
    listed: frozenset[Entry] | None = None
    """What a heartbeat that is under way says that it owns."""
    unknown: frozenset[Entry] = frozenset()
    """What the last heartbeat found in Redis beyond that,"""
    missing: frozenset[Entry] = frozenset()
    """and what it missed there."""


class Sweep(NamedTuple):
    """A sweeper at work on one worker."""

    victim: int
    seen: int
    stage: Literal["read", "counted", "swept"]
    entries: tuple[Entry, ...]
    standings: tuple[tuple[Entry, int], ...] = ()


class State(NamedTuple):
    jobs: tuple[Job, ...]
    fresh: frozenset[int]
    """Jobs whose row was written after the snapshot of the relay's last poll."""
    redis: Keys
    relay: Relay
    workers: tuple[Worker, ...]
    started: tuple[int, ...]
    """The newest generation of each job that was started."""
    sweep: Sweep | None = None
    faults: tuple[str, ...] = ()
    late_call: tuple[Any, ...] | None = None
    """A call that will reach Redis once more."""
    old_redis: Keys | None = None
    """What a replica of Redis holds."""
    old_jobs: tuple[Job, ...] | None = None
    """What a replica of PostgreSQL holds: all but the last commit."""
    needs_scrub: bool = False
    """A store has forgotten something that nobody else can notice: it is left to the endless scrub."""

    def with_worker(self, number: int, worker: Worker) -> State:
        return self._replace(workers=_with(self.workers, number, worker))

    def holding(self, number: int, entry: Entry, stage: Stage | None) -> State:
        """A worker holds an entry at another stage, or no more."""
        worker = self.workers[number]
        held = {kept: at for kept, at in worker.held if kept != entry}
        if stage is not None:
            held[entry] = stage
        return self.with_worker(number, worker._replace(held=tuple(sorted(held.items()))))

    def committed(self, id_: int, job: Job, *, is_seen: bool = False) -> State:
        """A transaction that wrote one row is committed; the next poll will see it, unless its xid stayed."""
        fresh = self.fresh if is_seen or self.relay.is_blind else self.fresh | {id_}
        old_jobs = self.jobs if self.old_jobs is not None else None
        return self._replace(jobs=_with(self.jobs, id_, job), fresh=fresh, old_jobs=old_jobs)

    def is_locked(self, id_: int) -> bool:
        """Whether a run is between its DELETE and its COMMIT."""
        return any(stage == "in body" and entry.id == id_ for worker in self.workers for entry, stage in worker.held)

    def may(self, world: World, fault: str) -> bool:
        has_room = len(self.faults) < world.at_most
        return has_room and self.faults.count(fault) < world.faults.count(fault)

    def after(self, fault: str) -> State:
        return self._replace(faults=tuple(sorted((*self.faults, fault))))


class Step(NamedTuple):
    says: str
    state: State
    kind: Kind = "step"
    breaks: str = ""
    """The property that this very step breaks."""


def start(world: World) -> State:
    """Workers that have beaten once, a relay that has met the queue, and jobs whose transactions are open."""
    redis = Redis(token="mine", beats=dict.fromkeys(range(world.workers), 0))
    first = Job("live") if world.starts_committed else Job()
    return State(
        jobs=(first,) * len(world.jobs),
        fresh=frozenset(range(len(world.jobs))) if world.starts_committed else frozenset(),
        redis=frozen(redis),
        relay=Relay(token="mine", is_dirty=False),
        workers=(Worker(),) * world.workers,
        started=(0,) * len(world.jobs),
        old_jobs=(first,) * len(world.jobs) if "failover" in world.faults else None,
    )


# Redis as a value


def frozen(redis: Redis) -> Keys:
    """Without the bell: workers look up every second, whether it rings or not."""
    return (
        redis.token,
        _pairs(redis.known),
        tuple(redis.ready[1]),
        _pairs({worker: tuple(entries) for worker, entries in redis.working.items() if entries}),
        tuple(redis.parked.get(TASK, ())),
        _pairs(redis.beats),
    )


def thawed(keys: Keys) -> Redis:
    token, known, ready, working, parked, beats = keys
    redis = Redis(token, dict(known), working={worker: list(entries) for worker, entries in working})
    redis.ready[1].extend(ready)
    redis.parked[TASK] = list(parked)
    redis.beats.update(beats)
    return redis


@cache
def run(keys: Keys, name: str, *args: Any) -> tuple[Keys, Any]:
    """Run a script: the Redis it leaves, and its reply."""
    redis = thawed(keys)
    reply = getattr(scripts, name)(redis, *(dict(arg[1]) if _is_mapping(arg) else arg for arg in args))
    return frozen(redis), reply


def mapping(pairs: tuple[tuple[Entry, int], ...]) -> tuple[str, tuple[tuple[Entry, int], ...]]:
    """A dict that can be kept in a state."""
    return ("mapping", pairs)


def _is_mapping(arg: Any) -> bool:
    return isinstance(arg, tuple) and len(arg) == 2 and arg[0] == "mapping"


def send(world: World, state: State, name: str, *args: Any) -> Iterator[tuple[str, Kind, State, Any]]:
    """Call a script: as it should be; with its reply lost; and with the call arriving once more, some time later."""
    keys, reply = run(state.redis, name, *args)
    done = state._replace(redis=keys)
    yield "", "step", done, reply
    if state.may(world, "reply lost"):
        yield ", and the reply is lost", "fault", done.after("reply lost"), LOST
    if state.may(world, "late call") and state.late_call is None:
        yield (
            ", and the call will come again",
            "fault",
            done.after("late call")._replace(late_call=(name, *args)),
            reply,
        )


def known(keys: Keys, id_: int) -> int:
    return next((generation for known_id, generation in keys[1] if known_id == id_), 0)


def working(keys: Keys, worker: int) -> tuple[Entry, ...]:
    return next((entries for name, entries in keys[3] if name == worker), ())


def counter(keys: Keys, worker: int) -> int | None:
    return next((value for name, value in keys[5] if name == worker), None)


def renamed_token(keys: Keys | None, names: dict[str, str]) -> Keys | None:
    return (names.get(keys[0], keys[0]), *keys[1:]) if keys is not None else None


def same_counters(keys: Keys | None) -> Keys | None:
    """No sweeper remembers a counter any more: the numbers mean nothing."""
    return (*keys[:5], tuple((worker, 0) for worker, _ in keys[5])) if keys is not None else None


def _pairs(mapping_: dict[Any, Any]) -> tuple[tuple[Any, Any], ...]:
    return tuple(sorted(mapping_.items()))


def _with(items: tuple[Any, ...], at: int, item: Any) -> tuple[Any, ...]:
    return (*items[:at], item, *items[at + 1 :])
