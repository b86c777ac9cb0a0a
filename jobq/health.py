"""What a process knows of its own health, for its probes and its watchdog to read from their threads.

Invariant: nothing here waits or asks a store; who reads it may be the only thread that still moves. Called by
worker, relay and cli. Calls nothing.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from typing import NamedTuple, Protocol

from .outage import Outage


class Check(NamedTuple):
    """One thing that must be so for a process to do its work, and one sentence about it."""

    name: str
    ok: bool
    says: str


class Part(Protocol):
    """A worker or a relay, as its probes see it."""

    pulse: Pulse

    def checks(self) -> list[Check]:
        """What it can say without asking anybody."""
        ...


class Pulse:
    """Whether a loop still takes its turns. It is judged from `begin()` to `rest()`."""

    def __init__(self, part: str, frozen_after_s: float):
        self.part = part
        self.frozen_after_s = frozen_after_s
        self.ticked_at: float | None = None
        """Monotonic time of the last tick; None while it is not judged."""
        self._thread = threading.get_ident()
        self._task: asyncio.Task[object] | None = None

    def begin(self) -> None:
        """Called by the task that takes the turns, before the first one."""
        self._thread = threading.get_ident()
        self._task = asyncio.current_task()
        self.tick()

    def tick(self) -> None:
        """A turn begins, idle or not; or one that waits for a store tries again."""
        self.ticked_at = time.monotonic()

    def rest(self) -> None:
        """No turns come any more, as they should not."""
        self.ticked_at = None

    @property
    def still_s(self) -> float:
        """Seconds since the last tick; 0 while it is not judged."""
        ticked_at = self.ticked_at
        return 0.0 if ticked_at is None else time.monotonic() - ticked_at

    @property
    def is_frozen(self) -> bool:
        return self.still_s > self.frozen_after_s

    def check(self, *, longest_s: float | None = None) -> Check:
        """Whether the last turn began within `longest_s` seconds; without it: whether the loop is not frozen."""
        if self._task is None:
            return Check("turns", longest_s is None, "still starting: no turn taken yet")
        if self.ticked_at is None:
            return Check("turns", True, "no turns any more: it stops")
        still_s = self.still_s
        limit_s = self.frozen_after_s if longest_s is None else min(longest_s, self.frozen_after_s)
        if still_s <= limit_s:
            return Check("turns", True, f"the last turn began {still_s:.1f} s ago")
        return Check("turns", False, f"no turn for {still_s:.0f} s: the event loop is blocked, or a turn hangs")

    def stacks(self) -> str:
        """Where the loop's thread is, and where the task of the turns waits."""
        frame = sys._current_frames().get(self._thread)
        shown = [] if frame is None else ["event loop:\n", *traceback.format_stack(frame)[-8:]]
        return "".join([*shown, "turn:\n", *_waits_of(self._task)])


def store_check(store: str, *outages: Outage) -> Check:
    """Whether a store answered all who asked it last. Nobody asks it for this answer."""
    away_s = max((outage.away_s for outage in outages), default=0.0)
    if away_s:
        return Check(store, False, f"away for {away_s:.1f} s")
    return Check(store, True, "answered when it was asked last")


def _waits_of(task: asyncio.Task[object] | None) -> list[str]:
    """The chain of coroutines that a suspended task waits in, outermost first."""
    lines: list[str] = []
    coroutine = None if task is None else task.get_coro()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        lines += traceback.format_list(traceback.extract_stack(frame, limit=1))
        coroutine = getattr(coroutine, "cr_await", None)
    return lines
