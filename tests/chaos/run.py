"""One run from beginning to end: start, load, faults one after the other, the drain, the verdict.

A fault strikes when the one before is repaired, so that what it costs is its own: a window of time belongs to it, up
to the next.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import asyncpg

from jobq import embedded, migrate
from jobq.outbox.database import Database
from tests.chaos import app, job_faults, leftovers, postgres_faults, store_faults
from tests.chaos.checker import Findings, Window, check, load
from tests.chaos.faults import FAULTS, Strike
from tests.chaos.observer import Observer
from tests.chaos.samples import Growth, Sampler
from tests.chaos.schedule import Schedule
from tests.chaos.stage import Shape, Stage
from tests.chaos.tables import TABLES
from tests.waiting import until

__all__ = ["Outcome", "Plan", "run"]
_ = (job_faults, postgres_faults, store_faults)  # they enter their faults into the table

HELD = "hold_transaction"
QUIET_S = 3.0
"""Load without a fault, at both ends of a run."""
REPAIR_S = 120.0
"""How long a repair may take at all; the machine may be slow."""
DRAIN_S = 10.0
"""I3: from the last order on, beside a lease and the time that the jobs take which wait by then."""
DRAINED_A_SECOND = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run."""

    seconds: float
    seed: int
    faults: Sequence[str]
    folder: Path
    """For logs and journals; whoever makes it removes it."""
    shape: Shape = field(default_factory=Shape)
    rounds: int | None = None
    """End after so many rounds of all faults, however long they take."""


@dataclass
class Outcome:
    """What came of a run."""

    plan: Plan
    windows: list[Window]
    findings: Findings
    growth: list[Growth]
    drained_s: float = 0.0
    lasted_s: float = 0.0


async def run(plan: Plan, say: Callable[[str], None]) -> Outcome:
    """Run the plan. Raises AssertionError where the run itself breaks off: a process ended, say."""
    began_at = time.monotonic()
    sampler = Sampler(plan.folder)
    async with _opened(plan) as stage:
        await stage.start()
        await until(
            lambda: stage.observer.rows("SELECT FROM chaos.effect LIMIT 1"), "the first order is done", REPAIR_S
        )
        windows = [Window((), time.time(), Strike(bound=0))]
        with sampler.running(lambda: (*stage.relays, *stage.workers)) if plan.shape.is_sampled else nullcontext():
            await anyio.sleep(QUIET_S)
            await _break(stage, plan, windows, say)
            await anyio.sleep(QUIET_S)
        stage.check()
        codes = await stage.stop_producers()
        stage.observer.let_go()
        drained_s, findings = await _drain(stage)
        findings_of_stores = await leftovers.look(stage, codes)
        connection = await asyncpg.connect(stage.servers.database_url)
        await load(connection, stage.folder, windows)
        found = await check(connection, windows)
        await connection.close()
        directory = stage.servers.directory
    for more in (findings, findings_of_stores):
        for name, lines in more.broken.items():
            found.add(name, *lines)
    if directory.exists():
        found.add("I7 nothing is left behind", f"the directory {directory}")
    growth = sampler.growth()
    found.add("I7 nothing grows", *[str(one) for one in growth if not one.is_flat])
    if plan.shape.is_sampled and not growth:
        found.add("I7 nothing grows", "no process was looked at for long enough to tell")
    return Outcome(plan, windows, found, growth, drained_s, time.monotonic() - began_at)


@asynccontextmanager
async def _opened(plan: Plan) -> AsyncIterator[Stage]:
    servers = await asyncio.to_thread(embedded.start)
    try:
        await _prepare(servers.database_url)
        async with Observer.open(servers.database_url, servers.redis_url, app.QUEUES) as observer:
            stage = Stage(plan.shape, servers, plan.folder, plan.seed, observer)
            try:
                yield stage
            finally:
                stage.kill()
    finally:
        await asyncio.to_thread(servers.stop)


async def _prepare(url: str) -> None:
    database = Database.of(url)
    await migrate.upgrade(database.engine, schema=migrate.SCHEMA)
    await database.close()
    connection = await asyncpg.connect(url)
    await connection.execute(TABLES)
    await connection.close()


async def _break(stage: Stage, plan: Plan, windows: list[Window], say: Callable[[str], None]) -> None:
    """Strike after strike until the time is up, each once the one before is repaired."""
    began_at = time.monotonic()
    ends_at = began_at + plan.seconds - 2 * QUIET_S
    for names, pause_s, choose in Schedule(plan.seed, plan.faults, rounds=plan.rounds):
        if HELD in plan.faults:
            await stage.observer.hold()
        await anyio.sleep(pause_s)
        if plan.rounds is None and time.monotonic() >= ends_at:
            return
        window = await _strike(stage, names, choose, windows)
        say(_line(window, time.monotonic() - began_at))
    if plan.rounds is None:
        await anyio.sleep(max(0.0, ends_at - time.monotonic()))


async def _strike(stage: Stage, names: tuple[str, ...], choose: random.Random, windows: list[Window]) -> Window:
    # Before it strikes: what it causes at once is its own.
    window = Window(names, time.time(), Strike(bound=sys.maxsize))
    windows.append(window)
    window.strike = await FAULTS[names[0]].strike(stage, choose)
    for name in names[1:]:
        await stage.ready()
        window.strike = window.strike.then(await FAULTS[name].strike(stage, choose))
    waiting = await stage.observer.due()
    ends_at = time.monotonic() + REPAIR_S
    while waiting:
        stage.check()
        await anyio.sleep(0.05)
        waiting = await stage.observer.left_of(waiting)
        if time.monotonic() > ends_at:
            where = await stage.observer.whereabouts(waiting)
            what = f"{' + '.join(names)} is not repaired after {REPAIR_S:.0f} s"
            raise AssertionError(f"I3 is broken: {what}, {len(waiting)} jobs are left:\n{where}")
    repaired_s = window.strike.repaired_s
    window.recovery_s = time.time() - window.strike.since if repaired_s is None else repaired_s
    await stage.ready()
    return window


def _line(window: Window, at_s: float) -> str:
    strike = window.strike
    note = f" ({strike.note})" if strike.note else ""
    return f"{at_s:7.1f} s  {' + '.join(window.faults)}{note}: repaired after {window.recovery_s:.1f} s"


async def _drain(stage: Stage) -> tuple[float, Findings]:
    """Wait until nothing is left of the orders. Producers have stopped."""
    found, since = Findings(), time.monotonic()
    waiting = await stage.observer.value("SELECT count(*) FROM jobq.outbox")
    allowed_s = stage.shape.lease_s + DRAIN_S + waiting / DRAINED_A_SECOND
    while left := await stage.observer.value("SELECT count(*) FROM jobq.outbox"):
        if time.monotonic() - since > allowed_s:
            found.add("I3 the outbox drains in time", f"{left} of {waiting} jobs are left after {allowed_s:.0f} s")
            break
        await anyio.sleep(0.05)
    return time.monotonic() - since, found
