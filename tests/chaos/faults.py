"""The faults: a table of what can be broken, how, and how many duplicate runs that may cost.

A fault strikes, ends what it began, and has another process started for one that it ended; it waits for no repair.
What it returns says what was in harm's way. The bounds follow from the protocol: a run is repeated only if its worker
lost its lease, or Redis lost its entry, while its row was still there; each fault names who can be in that position,
and each of these jobs runs once more at most.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio

from tests.chaos.observer import Key
from tests.chaos.processes import Process
from tests.chaos.stage import Stage
from tests.waiting import until


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """What a fault did."""

    bound: int
    """Duplicate runs that it may cause."""
    orphans: list[Key] = field(default_factory=list)
    """Jobs that a killed worker held, at their generation."""
    worker: str = ""
    """What the killed worker went by in Redis."""
    killed_at: float | None = None
    """When it was killed."""
    crashes: int = 0
    """Crashes that may be counted because of it."""
    rewound: tuple[float, float] | None = None
    """From when to when PostgreSQL answered with commits that it may then have lost."""
    since: float = field(default_factory=time.time)
    """From when on a repair is possible: the end of an outage, the moment of a kill."""
    note: str = ""


Strikes = Callable[[Stage, random.Random], Awaitable[Strike]]


@dataclass(frozen=True, slots=True)
class Fault:
    strike: Strikes
    about: str
    bound: str
    """Why it may cost as many duplicate runs as it may."""


FAULTS: dict[str, Fault] = {}


def fault(about: str, *, bound: str) -> Callable[[Strikes], Strikes]:
    """Enter a fault into the table, under the name of its function."""

    def enter(strike: Strikes) -> Strikes:
        FAULTS[strike.__name__] = Fault(strike, about, bound)
        return strike

    return enter


IN_HAND = "what the worker held"
NONE = "none"


@fault("SIGKILL of a worker", bound=IN_HAND)
async def kill_worker(stage: Stage, choose: random.Random) -> Strike:
    return await _kill(stage, choose.choice(stage.workers))


@fault("SIGKILL of a worker inside `ctx.complete()`", bound=IN_HAND)
async def kill_in_complete(stage: Stage, choose: random.Random) -> Strike:
    """Whoever is inside, from a place in the line on; after a while anybody."""
    first = choose.randrange(len(stage.workers))
    ends_at = time.monotonic() + 3.0
    while time.monotonic() < ends_at:
        inside = await stage.observer.inside_complete()
        for worker in stage.workers[first:] + stage.workers[:first]:
            if stage.name_of(worker) in inside:
                return await _kill(stage, worker)
    return await _kill(stage, stage.workers[first])


async def _kill(stage: Stage, victim: Process) -> Strike:
    name = stage.name_of(victim)
    victim.kill()
    killed_at = time.time()
    in_hand = await stage.observer.in_hand(name)
    # It is dead, and what it had committed is done: only a sweeper moves these on, a lease from now.
    orphans = await stage.observer.at_generation(in_hand)
    stage.replace(victim)
    return Strike(
        bound=len(in_hand),
        crashes=len(in_hand),
        orphans=orphans,
        worker=name,
        killed_at=killed_at,
        since=killed_at,
        note=_jobs(orphans),
    )


@fault("SIGSTOP of a worker for 0.5 to 3 leases, then SIGCONT", bound=IN_HAND)
async def stop_worker(stage: Stage, choose: random.Random) -> Strike:
    victim = choose.choice(stage.workers)
    leases = choose.uniform(0.5, 3.0)
    victim.signal(signal.SIGSTOP)
    in_hand = await stage.observer.in_hand(stage.name_of(victim))
    await anyio.sleep(leases * stage.shape.lease_s)
    victim.signal(signal.SIGCONT)
    held = len(in_hand)
    return Strike(bound=held, crashes=held, note=f"{_jobs(in_hand)}, {leases:.1f} leases")


@fault("SIGTERM of a worker in the middle of jobs", bound=NONE)
async def terminate_worker(stage: Stage, choose: random.Random) -> Strike:
    victim = choose.choice(stage.workers)
    since = time.time()
    victim.signal(signal.SIGTERM)
    stage.replace(victim)
    code = await victim.ends()
    assert code == 0, f"{victim.name} ended with {code} on SIGTERM:\n{victim.last_words()}"
    return Strike(bound=0, since=since)


@fault("SIGKILL of the relay that leads, with its locks", bound=NONE)
async def kill_leader(stage: Stage, choose: random.Random) -> Strike:
    leader = await _leader(stage)
    leader.kill()
    since = time.time()
    stage.replace(leader)
    return Strike(bound=0, since=since)


@fault("SIGSTOP of the relay that leads for 0.5 to 3 leases, then SIGCONT", bound=NONE)
async def stop_leader(stage: Stage, choose: random.Random) -> Strike:
    leader = await _leader(stage)
    leases = choose.uniform(0.5, 3.0)
    leader.signal(signal.SIGSTOP)
    await anyio.sleep(leases * stage.shape.lease_s)
    leader.signal(signal.SIGCONT)
    return Strike(bound=0, note=f"{leases:.1f} leases")


async def _leader(stage: Stage) -> Process:
    await until(lambda: stage.leader() is not None, "a relay leads", 60)
    leader = stage.leader()
    assert leader is not None
    return leader


def _jobs(keys: list[Key]) -> str:
    return f"{len(keys)} jobs in hand"
