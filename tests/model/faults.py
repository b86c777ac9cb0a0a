"""What may go wrong, each a bounded number of times; and what the application does with its transactions."""

from __future__ import annotations

from collections.abc import Iterator

from . import relay, sweeper
from . import state as at
from .state import EMPTY, Keys, State, Step, World


def application(state: State) -> Iterator[Step]:
    """Transactions with an enqueue() in them end, one way or the other."""
    for id_, job in enumerate(state.jobs):
        if job.phase == "open":
            yield Step(f"job {id_} is committed", state.committed(id_, job._replace(phase="live")))
            rolled_back = state._replace(jobs=(*state.jobs[:id_], job._replace(phase="never"), *state.jobs[id_ + 1 :]))
            yield Step(f"job {id_} is rolled back", rolled_back, "choice")


def steps(world: World, state: State) -> Iterator[Step]:
    yield from _of_processes(world, state)
    yield from _of_redis(world, state)
    if state.may(world, "failover") and state.old_jobs is not None and state.old_jobs != state.jobs:
        yield Step("PostgreSQL fails over, and has lost the last commit", _failed_over(world, state), "fault")


def _of_processes(world: World, state: State) -> Iterator[Step]:
    if state.may(world, "death") and not state.workers[0].is_dead:
        # Only the first: the others are the same to begin with. Its transaction stays until somebody ends it.
        worker = state.workers[0]
        in_body = tuple(held for held in worker.held if held[1] == "in body")
        dead = at.Worker(in_body, is_dead=True)
        yield Step("w0 dies", state.with_worker(0, dead).after("death"), "fault")
    if state.workers[0].is_dead and state.workers[0].held:
        yield Step("PostgreSQL ends the session of w0", sweeper.end_session(state, 0))
    for number in world.frail:
        worker = state.workers[number]
        if state.may(world, "late") and not worker.is_dead and not worker.is_late:
            late = state.with_worker(number, worker._replace(is_late=True))
            yield Step(f"w{number} is late with its heartbeat", late.after("late"), "fault")
    if state.may(world, "relay death"):
        yield Step("the relay dies, and another one leads", relay.reset(state).after("relay death"), "fault")


def _of_redis(world: World, state: State) -> Iterator[Step]:
    if state.may(world, "flush"):
        yield Step("Redis loses everything", _replaced(state, EMPTY).after("flush"), "fault")
    if state.may(world, "time travel"):
        behind = state._replace(old_redis=state.redis).after("time travel")
        yield Step("a replica of Redis falls behind", behind, "fault")
    if state.old_redis is not None:
        back = _replaced(state, state.old_redis)._replace(old_redis=None)
        yield Step("Redis fails over to the replica that was behind", back, "fault")
    if state.late_call is not None:
        name, *args = state.late_call
        # A beat or an ack of the worker that is being swept: as if it had come back.
        needs_scrub = state.needs_scrub or state.sweep is not None
        redis, _ = at.run(state.redis, name, *args)
        after = state._replace(redis=redis, late_call=None, needs_scrub=needs_scrub)
        if after.sweep is None:
            redis = at.same_counters(after.redis)
            assert redis is not None
            after = after._replace(redis=redis)
        yield Step(f"an old {name} arrives once more", after, "fault")


def _replaced(state: State, redis: Keys) -> State:
    """Redis goes back in time. The relay notices, by its token, if it has pushed since (at least once a second).

    A sweeper has counted a crash in the row, whose xid stays, and cannot tell a Redis that has forgotten the worker.
    """
    is_unnoticed = redis[0] is not None and redis[0] == state.redis[0]
    return state._replace(redis=redis, needs_scrub=state.needs_scrub or is_unnoticed or state.sweep is not None)


def _failed_over(world: World, state: State) -> State:
    """Every session has ended; a relay begins from a new snapshot (MUST), and what was lost does not exist."""
    assert state.old_jobs is not None
    pairs = list(zip(state.old_jobs, state.jobs, strict=True))
    jobs = tuple(old._replace(phase="never") if old.phase == "open" != now.phase else old for old, now in pairs)
    # Redis may have heard of what is undone: an ack that is on its way, or a generation that is no more.
    was_undone = any(old.phase == "live" and old != now for old, now in pairs)
    after = state._replace(jobs=jobs, old_jobs=None, needs_scrub=was_undone).after("failover")
    for number in range(len(state.workers)):
        after = sweeper.end_session(after, number)
    if world.broken == "snapshot kept over a failover":
        return after._replace(relay=after.relay._replace(is_blind=True), fresh=frozenset())
    return relay.reset(after)
