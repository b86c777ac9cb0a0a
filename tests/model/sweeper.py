"""A sweeper's steps: jobq/worker/sweeper.py. It may take a worker for dead that is only late, and that comes back.

PostgreSQL first (MUST): the new generations are in their rows before Redis gets them, so a crash is counted once,
and a sweeper that dies half way leaves the rest to the next.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import state as at
from .state import LOST, State, Step, Sweep, World


def steps(world: World, state: State) -> Iterator[Step]:
    sweep = state.sweep
    if sweep is None:
        yield from _read(state)
    elif sweep.stage == "read" and world.broken != "sweep before the UPDATE":
        yield Step(f"a sweeper counts the crashes of w{sweep.victim}", _count(world, state, sweep))
    elif sweep.stage == "swept":
        yield Step(f"a sweeper counts the crashes of w{sweep.victim}", _count(world, state, sweep)._replace(sweep=None))
    else:
        yield from _sweep(world, state, sweep)
    if sweep is not None and state.may(world, "sweeper death"):
        # If it had counted, and the worker comes back before the next sweeper does, Redis never hears of it.
        left = _over(state)._replace(needs_scrub=state.needs_scrub or not state.workers[sweep.victim].is_dead)
        yield Step("the sweeper dies", left.after("sweeper death"), "fault")


def _read(state: State) -> Iterator[Step]:
    """Sweeper._look: a counter that stood still for a lease; then its working list."""
    for number, worker in enumerate(state.workers):
        seen = at.counter(state.redis, number)
        if seen is not None and (worker.is_dead or worker.is_late):
            sweep = Sweep(number, seen, "read", at.working(state.redis, number))
            yield Step(f"a sweeper takes w{number} for dead, and reads its list", state._replace(sweep=sweep))


def _count(world: World, state: State, sweep: Sweep) -> State:
    """end_backends.sql, crash.sql, generations.sql: no row that another's ctx.complete() has locked."""
    state = end_session(state, sweep.victim)
    jobs, standings = list(state.jobs), {}
    for entry in sweep.entries:
        job = state.jobs[entry.id]  # type: ignore[call-overload]
        is_its = job.generation == entry.generation or world.broken == "crash counted whatever the generation"
        if job.phase == "live" and is_its and not state.is_locked(entry.id):  # type: ignore[arg-type]
            job = job._replace(generation=job.generation + 1, crashes=job.crashes + 1)
            jobs[entry.id] = job  # type: ignore[call-overload]
    for entry in sweep.entries:
        job = jobs[entry.id]  # type: ignore[call-overload]
        if job.phase != "live" or job.generation != entry.generation:
            standings[entry] = job.generation if job.phase == "live" else 0
    old_jobs = state.jobs if state.old_jobs is not None and tuple(jobs) != state.jobs else state.old_jobs
    counted = sweep._replace(stage="counted", standings=tuple(sorted(standings.items())))
    return state._replace(jobs=tuple(jobs), old_jobs=old_jobs, sweep=counted)


def end_session(state: State, number: int) -> State:
    """A transaction that is open in ctx.complete() rolls back, and its lock is gone. A living run begins again."""
    worker = state.workers[number]
    for entry, stage in worker.held:
        if stage == "in body":
            state = state.holding(number, entry, None if worker.is_dead else "running")
    return state


def _sweep(world: World, state: State, sweep: Sweep) -> Iterator[Step]:
    """sweep.lua: takes the entries back, unless the worker has beaten since."""
    says = f"a sweeper sweeps w{sweep.victim}"
    call = ("sweep", sweep.victim, sweep.seen, at.mapping(sweep.standings))
    for more, kind, after, reply in at.send(world, state, *call):
        if reply is None:
            yield Step(f"{says}, which has come back", _over(after), kind)
        elif sweep.stage == "read" and reply is not LOST:
            yield Step(says + more, _over(after)._replace(sweep=sweep._replace(stage="swept")), kind)
        else:
            yield Step(says + more, _over(after), kind)


def _over(state: State) -> State:
    """Nobody remembers a counter any more; a sweep that comes late finds another one."""
    call = state.late_call
    if call is not None and call[0] == "sweep":
        call = ("sweep", call[1], -1, call[3])
    redis = at.same_counters(state.redis)
    assert redis is not None
    return state._replace(sweep=None, redis=redis, old_redis=at.same_counters(state.old_redis), late_call=call)
