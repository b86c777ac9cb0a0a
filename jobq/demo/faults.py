"""What the demo breaks, in the middle of the traffic, and how long each repair took.

Invariant: a fault is reported with what was there to be lost when it struck, counted afterwards or at that very
moment; a time runs from the kill. Called by demo. Calls stage, stores and traffic.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import anyio
from anyio.abc import TaskGroup

from .mailbox import Mailbox
from .screen import Screen
from .stage import LEASE_S, SLOTS, DemoFailed, Process, Stage
from .stores import Stores
from .traffic import Traffic

_WORKER_AT, _LEADER_AT, _FLUSH_AT = 0.3, 0.55, 0.8
"""How much of the traffic has been sent when a fault strikes: each early in a wave."""
_PATIENCE_S = 3.0
"""How long a fault waits for a moment when it does harm."""
_REPAIR_S = 60.0
_SLOW = 5.0
_POLL_S = 0.02
_AIM_S = 0.002


class Recovery(NamedTuple):
    """A fault, and how long it was felt."""

    struck_at: float
    fault: str
    until: str
    seconds: float | None
    """None when it was not over after a minute."""


@dataclass
class Faults:
    """Kills a worker, kills the leading relay, empties Redis; each once, at its share of the traffic."""

    stage: Stage
    stores: Stores
    traffic: Traffic
    mailbox: Mailbox
    screen: Screen

    def __post_init__(self) -> None:
        self.recoveries: list[Recovery] = []

    async def run(self) -> None:
        """Returns when the last fault has been repaired."""
        async with anyio.create_task_group() as repairs:
            for share, strike in (
                (_WORKER_AT, self._kill_worker),
                (_LEADER_AT, self._kill_leader),
                (_FLUSH_AT, self._empty_redis),
            ):
                await self._reached(share)
                await strike(repairs)

    async def _reached(self, share: float) -> None:
        wanted = share * len(self.traffic.purchases)
        await self.stage.until(lambda: self.traffic.sent >= wanted, f"{wanted:.0f} orders are sent", within_s=3600)

    async def _kill_worker(self, repairs: TaskGroup) -> None:
        victim, name = await self._busy_worker()
        self.stage.kill(victim)
        killed_at = time.monotonic()
        # It is dead: only a sweeper takes entries out of its lists, a lease from now. What it had committed is done.
        orphans = set().union(*(await self.stores.in_hand(name)).values()) & await self.stores.waiting()
        self.stage.add_worker()
        self.screen.say(f"kill -9 {victim.name}: {_jobs(len(orphans))} in its hands. Another is started.")
        repairs.start_soon(
            self._time,
            f"worker killed with {_jobs(len(orphans))} in its hands",
            f"the last of them was done by others (lease {LEASE_S} s)",
            killed_at,
            partial(self.stores.are_done, orphans),
        )

    async def _busy_worker(self) -> tuple[Process, str]:
        """Wait for a worker in the middle of mails and of many bookings; of fewer, the longer that takes."""
        names = {worker: await self.stores.worker_of(worker.pid) for worker in self.stage.workers}
        known = [(worker, name) for worker, name in names.items() if name is not None]
        if not known:
            raise DemoFailed("Redis knows none of the workers")
        started_at = time.monotonic()
        while True:
            impatience = (time.monotonic() - started_at) / _PATIENCE_S
            for worker, name in known:
                mails, bookings = [len(jobs) for jobs in (await self.stores.in_hand(name)).values()]
                is_busy = mails > 0 and bookings >= max(1, round(SLOTS / 2 * (1 - impatience)))
                if is_busy or (impatience > 1 and mails + bookings > 0) or impatience > 2:
                    return worker, name
            await anyio.sleep(_AIM_S)

    async def _kill_leader(self, repairs: TaskGroup) -> None:
        leader, session = self.stage.leader(), await self.stores.leading_session()
        if leader is None or session is None:
            raise DemoFailed("no relay leads")
        self.stage.kill(leader)
        killed_at = time.monotonic()
        tokens = await self.stores.tokens()
        self.screen.say(f"kill -9 {leader.name}, which leads")

        async def has_taken_over() -> bool:
            # The lock is another session's, and a token has changed since the death of the one before.
            leads_now = await self.stores.leading_session()
            return leads_now not in (None, session) and await self.stores.tokens() != tokens

        await self._time("leading relay killed", "the other one pushed", killed_at, has_taken_over)
        # Only now, so that it was the other that took over.
        self.stage.add_relay()

    async def _empty_redis(self, repairs: TaskGroup) -> None:
        self.mailbox.slowness = _SLOW
        await self._wait_for_backlog()
        lost = await self.stores.flush()
        self.mailbox.slowness = 1.0
        flushed_at = time.monotonic()
        committed = await self.stores.waiting()
        self.screen.say(f"FLUSHALL: {_jobs(lost.ready)} waited in Redis, {lost.working} were running")
        repairs.start_soon(
            self._time,
            f"FLUSHALL with {_jobs(lost.ready)} waiting in Redis, {lost.working} running",
            "all that was committed before was done",
            flushed_at,
            partial(self.stores.are_done, committed),
        )

    async def _wait_for_backlog(self) -> None:
        """Wait until many jobs wait in Redis and some run, or at least one does either.

        The mail server is slow meanwhile: else only fast machines would have a backlog.
        """
        started_at = time.monotonic()
        while (waited_s := time.monotonic() - started_at) < _PATIENCE_S:
            now = await self.stores.in_redis()
            is_worth_it = now.working > 0 and now.ready >= self._share_of(SLOTS)
            if is_worth_it or (waited_s > _PATIENCE_S / 2 and sum(now) > 0):
                return
            await anyio.sleep(_POLL_S)

    def _share_of(self, jobs: int) -> int:
        """As many jobs as a fault is to hit; fewer where there are few at all."""
        return min(jobs, len(self.traffic.purchases) // 20)

    async def _time(self, fault: str, until: str, since: float, is_over: Callable[[], Awaitable[bool]]) -> None:
        seconds: float | None = None
        while time.monotonic() - since < _REPAIR_S:
            if await is_over():
                seconds = time.monotonic() - since
                break
            self.stage.check()
            await anyio.sleep(_POLL_S)
        self.recoveries.append(Recovery(since, fault, until, seconds))
        self.screen.say(f"{fault}: {_spent(seconds)} until {until}")


def _jobs(count: int) -> str:
    return f"{count:,} job{'' if count == 1 else 's'}"


def _spent(seconds: float | None) -> str:
    return "over a minute, and not yet" if seconds is None else f"{seconds:.1f} s"
