"""A worker's steps: jobq/worker/turns.py (fetch, read, start), executor.py, settler.py, heartbeat.py; context.py.

The loop, the settler and the heartbeat's thread are apart, so any of them may be next. Reading a row and starting
its run are one step here: what may happen between the two may happen as well after them, and harms no less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from . import state as at
from .properties import NO_GHOST, ONE_BODY, ONE_START, START_OF_LIVE
from .scripts import Beat, Entry
from .state import LOST, TASK, Job, Stage, State, Step, World

SLOTS = 2
LOST_DATA = frozenset({"flush", "time travel", "failover", "late call", "aborted push"})
"""Faults after which a generation may well start twice; complete() then sees to it that it counts once."""


def steps(world: World, state: State, number: int) -> Iterator[Step]:
    worker = state.workers[number]
    if worker.is_dead:
        return
    if len(worker.held) < SLOTS and _may_start(world, state, number):
        yield from _fetch(world, state, number)
    for entry, stage in worker.held:
        if stage == "fetched":
            yield from _read(world, state, number, entry)
        elif stage == "running":
            yield from _end_run(world, state, number, entry)
        elif stage == "in body":
            yield _commit(world, state, number, entry)
        elif stage == "buffered":
            yield from _flush(state, number, entry)
        elif stage == "settled":
            yield from _ack(world, state, number, entry)
        else:
            yield from _give(world, state, number, entry, stage)
    yield from _unpark(world, state, number)
    yield from _beat(world, state, number)


def _fetch(world: World, state: State, number: int) -> Iterator[Step]:
    """Turns._fetch_from. A worker that Redis does not know is fenced, and waits for its next beat."""
    if not state.redis[2]:
        return
    for more, kind, after, reply in at.send(world, state, "fetch", number, 1):
        if reply is not None:
            fetched = reply[1] if reply is not LOST else ()
            yield Step(f"w{number} fetches" + more, _own(world, after, number, fetched), kind)


def _own(world: World, state: State, number: int, entries: Iterable[Entry]) -> State:
    """Owned.take: what is owned already is ignored, however it came."""
    for entry in entries:
        stage = dict(state.workers[number].held).get(entry)
        if stage is None or not _is_listed(world, stage):
            state = state.holding(number, entry, "fetched")
    return state


def _read(world: World, state: State, number: int, entry: Entry) -> Iterator[Step]:
    """Turns._read and _start, read.sql: what has no row at its generation is acked, and does not run."""
    if world.can_release or not _may_start(world, state, number):
        yield from _give(world, state, number, entry, "release")
    job, says = _job(state, entry), f"w{number} reads {entry.id}:{entry.generation}"
    if not _is_current(job, entry) and world.broken != "no pre-read":
        ghost = NO_GHOST if not state.faults and world.generations == 1 else ""
        yield Step(f"{says}, a ghost", state.holding(number, entry, "settled"), "step", ghost)
    elif number in world.ignorant:
        yield from _give(world, state, number, entry, "park")
    elif _may_start(world, state, number):
        started = list(state.started)
        breaks = "" if job.phase == "live" else START_OF_LIVE
        if started[entry.id] >= entry.generation and not LOST_DATA & {*state.faults}:  # type: ignore[call-overload]
            breaks = breaks or ONE_START
        started[entry.id] = max(started[entry.id], entry.generation)  # type: ignore[call-overload]
        after = state.holding(number, entry, "running")._replace(started=tuple(started))
        yield Step(f"{says}, and starts it", after, "step", breaks)


def _end_run(world: World, state: State, number: int, entry: Entry) -> Iterator[Step]:
    """The body of a task: it completes, returns, or fails (Executor._settle)."""
    job, says = _job(state, entry), f"w{number} {{}} {entry.id}:{entry.generation}"
    if _is_current(job, entry) and not state.is_locked(entry.id) and entry.generation < world.generations:  # type: ignore[arg-type]
        # reschedule.sql, through the settler: a new generation, and a new xid that the next poll will see.
        after = state.committed(entry.id, job._replace(generation=job.generation + 1))  # type: ignore[arg-type]
        yield Step(says.format("fails"), after.holding(number, entry, "settled"), "choice")
    if world.jobs[entry.id] == "plain":  # type: ignore[call-overload]
        yield Step(says.format("returns from"), state.holding(number, entry, "buffered"))
    elif world.broken == "completion split from its effects":
        after = state.committed(entry.id, job._replace(effects=job.effects + 1), is_seen=True)  # type: ignore[arg-type]
        yield Step(says.format("commits the effects of"), after.holding(number, entry, "buffered"))
    else:
        yield from _begin_complete(world, state, number, entry)


def _begin_complete(world: World, state: State, number: int, entry: Entry) -> Iterator[Step]:
    """ctx.complete(), complete_one.sql: the DELETE, before the body (MUST). Another's lock: wait, or hand it back."""
    job, says = _job(state, entry), f"w{number} {{}} {entry.id}:{entry.generation}"
    if world.broken == "DELETE not first":
        breaks = ONE_BODY if state.is_locked(entry.id) or job.phase == "done" else ""  # type: ignore[arg-type]
        yield Step(says.format("enters the body of"), state.holding(number, entry, "in body"), "step", breaks)
    elif state.is_locked(entry.id):  # type: ignore[arg-type]
        yield from _give(world, state, number, entry, "release")
    elif not _is_current(job, entry):
        yield Step(says.format("finds already done"), state.holding(number, entry, "settled"))
    else:
        after = state.holding(number, entry, "in body")
        if world.broken == "ack before commit":
            after = after._replace(redis=at.run(state.redis, "ack", number, (entry,))[0])
        yield Step(says.format("deletes, in its transaction,"), after)


def _commit(world: World, state: State, number: int, entry: Entry) -> Step:
    """COMMIT: the effects and the DELETE, in one."""
    job, says = _job(state, entry), f"w{number} commits {entry.id}:{entry.generation}"
    if not _is_current(job, entry):
        return Step(f"{says}: already done, it rolls back", state.holding(number, entry, "settled"))
    after = state.committed(entry.id, job._replace(phase="done", effects=job.effects + 1), is_seen=True)  # type: ignore[arg-type]
    return Step(says, after.holding(number, entry, None if world.broken == "ack before commit" else "settled"))


def _flush(state: State, number: int, entry: Entry) -> Iterator[Step]:
    """Settler._flush_rows, complete.sql: passes over what is locked, acks what has moved on."""
    job, says = _job(state, entry), f"w{number} flushes {entry.id}:{entry.generation}"
    if not _is_current(job, entry):
        yield Step(f"{says}: it has moved on", state.holding(number, entry, "settled"))
    elif not state.is_locked(entry.id):  # type: ignore[arg-type]
        after = state.committed(entry.id, job._replace(phase="done"), is_seen=True)  # type: ignore[arg-type]
        yield Step(says, after.holding(number, entry, "settled"))


def _ack(world: World, state: State, number: int, entry: Entry) -> Iterator[Step]:
    """Settler._flush_entries: after the commit (MUST); what had no answer is sent again."""
    if world.broken == "ack without generation":
        redis = at.thawed(state.redis)
        redis.known.pop(entry.id, None)
        state = state._replace(redis=at.frozen(redis))
    yield from _give(world, state, number, entry, "settled")


def _give(world: World, state: State, number: int, entry: Entry, stage: Stage) -> Iterator[Step]:
    """Settler._move: ack, release or park; owned until Redis has confirmed it, and never started from then on."""
    call = {
        "settled": ("ack", number, (entry,)),
        "release": ("release", number, (entry,)),
        "park": ("park", number, TASK, (entry,)),
    }[stage]
    if state.sweep is not None and state.sweep.victim == number:
        # The sweeper gives its row a generation for an entry that it will not find in the list any more.
        state = state._replace(needs_scrub=True)
    for more, kind, after, reply in at.send(world, state, *call):
        done = after.holding(number, entry, stage if reply is LOST else None)
        yield Step(f"w{number} {call[0]}s {entry.id}:{entry.generation}" + more, done, kind)


def _unpark(world: World, state: State, number: int) -> Iterator[Step]:
    """Turns.unpark: at registration and with every fifth beat."""
    if not state.redis[4] or number in world.ignorant:
        return
    room = SLOTS - len(state.workers[number].held) if _may_start(world, state, number) else 0
    for more, kind, after, reply in at.send(world, state, "unpark", number, (TASK,), 1, room):
        taken = () if reply is LOST else reply[1]
        yield Step(f"w{number} unparks" + more, _own(world, after, number, taken), kind)


def _beat(world: World, state: State, number: int) -> Iterator[Step]:
    """Heartbeat._beat, beat.lua: the list of all that is owned is made first, and arrives some time later."""
    worker = state.workers[number]
    listed = worker.listed
    if listed is None:
        listed = frozenset(entry for entry, stage in worker.held if _is_listed(world, stage))
        if world.has_slow_beats:
            yield Step(
                f"w{number} lists what it owns for a beat", state.with_worker(number, worker._replace(listed=listed))
            )
            return
    back = listed if world.broken == "adoption on one beat" else listed & worker.missing
    call = ("beat", number, 1, tuple(sorted(listed)), tuple(sorted(back)))
    for more, kind, after, reply in at.send(world, state, *call):
        yield Step(f"w{number} beats" + more, _note_beat(world, after, number, reply), kind)


def _note_beat(world: World, state: State, number: int, reply: Beat | object) -> State:
    """Adopt what two beats found; stop runs that have moved on without me. No answer: two must agree anew."""
    if state.sweep is None:
        redis = at.same_counters(state.redis)
        assert redis is not None
        state = state._replace(redis=redis)
    elif state.sweep.victim == number:
        # It came back. The sweeper gives its rows generations all the same, and Redis refuses the sweep.
        state = state._replace(needs_scrub=True)
    worker = state.workers[number]._replace(listed=None, is_late=False)
    if not isinstance(reply, Beat):
        return state.with_worker(number, worker._replace(unknown=frozenset(), missing=frozenset()))
    agreed = [entry for entry in reply.unknown if entry in worker.unknown or world.broken == "adoption on one beat"]
    worker = worker._replace(unknown=frozenset(reply.unknown), missing=frozenset(reply.missing))
    state = _own(world, state.with_worker(number, worker), number, agreed)
    for entry in reply.lost:
        if (entry, "running") in state.workers[number].held:
            state = state.holding(number, entry, "settled")
    return state


def _may_start(world: World, state: State, number: int) -> bool:
    """Heartbeat.may_start: neither fetch nor start when the last beat is nearly a lease ago."""
    return not state.workers[number].is_late or world.broken == "start without a lease"


def _is_listed(world: World, stage: Stage) -> bool:
    if world.broken == "beat lists only what runs":
        return stage in ("running", "in body")
    return not (world.broken == "ack before commit" and stage == "in body")


def _job(state: State, entry: Entry) -> Job:
    return state.jobs[entry.id]  # type: ignore[call-overload, no-any-return]


def _is_current(job: Job, entry: Entry) -> bool:
    return job.phase == "live" and job.generation == entry.generation
