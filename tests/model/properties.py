"""What must hold. Each has a sentence for its name, which a trace that breaks it ends with."""

from __future__ import annotations

from .state import State, World

ONE_EFFECT = "an effect happens at most once"
EFFECT_IS_COMPLETION = "effects and completion are one, and only a committed job has any"
START_OF_LIVE = "only a committed job starts, and never one that is completed"
ONE_START = "a generation starts once, as long as Redis keeps its data"
ONE_BODY = "no body of complete() runs beside another, or for a completed job"
ONE_CRASH = "a crash is counted once"
NO_GHOST = "without a fault, no entry outlives its row"
KNOWN_IS_LISTED = "what is known is in a list"
DRAINS = "once nothing more fails, every job gets done and Redis empty"
DRAINS_SOON = "... and that without the scrub"


def broken_by(world: World, state: State) -> str:
    """The first property that a state breaks, by itself; those of a step are found where it is made."""
    for job, kind in zip(state.jobs, world.jobs, strict=True):
        if job.effects > 1:
            return ONE_EFFECT
        is_split = world.broken == "completion split from its effects"
        if job.effects != (job.phase == "done" and kind == "effects") and not is_split:
            return EFFECT_IS_COMPLETION
        if job.crashes > sum(fault in ("death", "late") for fault in state.faults):
            return ONE_CRASH
    _, known, ready, working, parked, _ = state.redis
    for id_, generation in known:
        lists = (ready, parked, *(entries for _, entries in working))
        if not any(entry.id == id_ and entry.generation == generation for entries in lists for entry in entries):
            return KNOWN_IS_LISTED
    return ""


def is_over(state: State) -> bool:
    """All jobs are done, and nothing is left of them in Redis or in a worker that lives."""
    _, known, ready, working, parked, _ = state.redis
    is_redis_empty = not (known or ready or working or parked)
    return (
        is_redis_empty
        and all(job.phase in ("done", "never") for job in state.jobs)
        and not any(worker.held for worker in state.workers)
    )
