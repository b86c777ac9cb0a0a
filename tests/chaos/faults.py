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


@dataclass(frozen=True, slots=True)
class Death:
    """A worker that was killed, and the jobs that it held, at their generation."""

    worker: str
    at: float
    held: list[Key]
    orphans: list[Key]
    """Those of them whose rows were there a moment later: they are to run again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """What a fault did."""

    bound: int
    """Duplicate runs that it may cause, beside one for each generation that ran while `rewound`."""
    crashes: int = 0
    """Crashes that may be counted because of it."""
    deaths: list[Death] = field(default_factory=list)
    rewound: list[tuple[float, float]] = field(default_factory=list)
    """From when to when PostgreSQL answered with commits that it may then have lost."""
    since: float = field(default_factory=time.time)
    """From when on a repair is possible: the end of an outage, the moment of a kill."""
    repaired_s: float | None = None
    """How long the repair took, where the fault has waited for it."""
    note: str = ""

    def then(self, other: Strike) -> Strike:
        """Both, one upon the other. Redis may have lost what the dead held: nobody can say who was to sweep it."""
        return Strike(
            bound=self.bound + other.bound,
            crashes=self.crashes + other.crashes,
            rewound=self.rewound + other.rewound,
            since=max(self.since, other.since),
            note="; ".join(filter(None, (self.note, other.note))),
        )

    @classmethod
    def of_deaths(cls, *deaths: Death, bound: int = 0) -> Strike:
        held = sum(len(death.held) for death in deaths)
        return cls(
            bound=held + bound, crashes=held, deaths=list(deaths), since=deaths[-1].at, note=f"{held} jobs in hand"
        )


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


SETTLES_S = 0.05
"""After this Redis has done what a worker still asked for before it was killed or stopped."""
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
    victim.kill()
    death = await death_of(stage, victim)
    stage.replace(victim)
    return Strike.of_deaths(death)


async def death_of(stage: Stage, victim: Process) -> Death:
    """What a worker left that has just died."""
    at, name = time.time(), stage.name_of(victim)
    await anyio.sleep(SETTLES_S)
    held = await stage.observer.in_hand(name)
    # What it had committed is done by now: only a sweeper moves the others on, a lease from its death.
    return Death(name, at, held, await stage.observer.at_generation(held))


@fault("SIGSTOP of a worker for 0.5 to 3 leases, then SIGCONT", bound=IN_HAND)
async def stop_worker(stage: Stage, choose: random.Random) -> Strike:
    victim = choose.choice(stage.workers)
    leases = choose.choice([choose.uniform(0.5, 1.2), choose.uniform(1.2, 1.8), choose.uniform(1.8, 3.0)])
    victim.signal(signal.SIGSTOP)
    await anyio.sleep(SETTLES_S)
    in_hand = await stage.observer.in_hand(stage.name_of(victim))
    await anyio.sleep(leases * stage.shape.lease_s)
    victim.signal(signal.SIGCONT)
    held = len(in_hand)
    return Strike(bound=held, crashes=held, note=f"{held} jobs in hand, {leases:.1f} leases")


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


@fault("SIGSTOP of the relay that leads, until the other has taken over", bound=NONE)
async def usurp_leader(stage: Stage, choose: random.Random) -> Strike:
    leader = await _leader(stage)
    others = {relay: relay.said().count("relay leads") for relay in stage.relays if relay is not leader}
    leader.signal(signal.SIGSTOP)
    stopped_at = time.time()
    try:
        await until(
            lambda: any(relay.said().count("relay leads") > before for relay, before in others.items()),
            "the other relay leads", 60,
        )  # fmt: skip
        note = f"after {time.time() - stopped_at:.0f} s"
        await anyio.sleep(choose.uniform(0.0, 1.0))
    finally:
        leader.signal(signal.SIGCONT)
    return Strike(bound=0, note=note)


@fault("SIGTERM of the relay that leads", bound=NONE)
async def terminate_leader(stage: Stage, choose: random.Random) -> Strike:
    leader = await _leader(stage)
    since = time.time()
    leader.signal(signal.SIGTERM)
    stage.replace(leader)
    code = await leader.ends()
    assert code == 0, f"{leader.name} ended with {code} on SIGTERM:\n{leader.last_words()}"
    return Strike(bound=0, since=since)


async def _leader(stage: Stage) -> Process:
    await until(lambda: stage.leader() is not None, "a relay leads", 60)
    leader = stage.leader()
    assert leader is not None
    return leader
