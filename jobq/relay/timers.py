"""Timers: jobs that come due soon, held in memory and pushed on time.

Invariant: the horizon moves only between two polls, and before it moves the rows up to the new one are read;
so a row due later is in this heap, or beyond the horizon, or answered by the next poll. Where a limit cut rows
off, the walk brings those that are due by then, and the next look the others. Durations come from the database's
clock and are counted on this process's monotonic one. Called by relay. Calls outbox.follow.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from datetime import datetime
from itertools import count

import asyncpg

from ..outbox import follow
from ..settings import RelaySettings
from .backlog import ReadyList


class Timers:
    """The jobs that come due up to `horizon`."""

    def __init__(self, connection: asyncpg.Connection, schema: str, settings: RelaySettings, *, start: datetime):
        self.horizon = start
        self._connection = connection
        self._schema = schema
        self._settings = settings
        self._heap: list[tuple[float, int, ReadyList, str]] = []
        self._order = count()
        self._next_look = 0.0
        self._crowded_at: float | None = None

    def __len__(self) -> int:
        return len(self._heap)

    async def look_ahead(self) -> None:
        """Move the horizon, when half of it is used up, and read what lies before the new one."""
        now = time.monotonic()
        if now < self._next_look or self._crowded_at is not None:
            return
        ahead_s, limit = self._settings.look_ahead, self._settings.poll_limit
        horizon = await follow.clock(self._connection, self._schema, ahead_s=ahead_s)
        # First this query, then the next poll with the new horizon (MUST): the other way round a job whose delay
        # is shorter than the look-ahead falls between the two.
        found = await follow.timers(self._connection, self._schema, after=self.horizon, horizon=horizon, limit=limit)
        for timer in found:
            self.add(timer.queue, timer.priority, timer.entry, timer.delay_s)
        if len(found) == limit:
            # More than fit in memory: go on from the last one, and let the walk bring those due with it.
            horizon = found[-1].run_at
            self._crowded_at = time.monotonic() + max(found[-1].delay_s, 0.0)
        self.horizon = horizon
        self._next_look = now + ahead_s / 2

    async def look_again(self) -> None:
        """Have everything that is not due yet read anew before the next poll, which may have been cut short.

        Called between that poll and the walk: what comes due in between, the walk still finds or this look does.
        """
        self.horizon = await follow.clock(self._connection, self._schema, ahead_s=0.0)
        self._next_look = 0.0
        self._crowded_at = None

    def add(self, queue: str, priority: int, entry: str, delay_s: float) -> None:
        """Hold an entry for `delay_s` seconds."""
        due_at = time.monotonic() + delay_s
        heapq.heappush(self._heap, (due_at, next(self._order), (queue, priority), entry))

    def take_due(self) -> dict[ReadyList, list[str]]:
        """Entries that are due now, by list, soonest first."""
        now, due = time.monotonic(), defaultdict[ReadyList, list[str]](list)
        while self._heap and self._heap[0][0] <= now:
            _, _, at, entry = heapq.heappop(self._heap)
            due[at].append(entry)
        return due

    def take_crowd(self) -> bool:
        """Whether a crowd of timers beyond memory has come due: then the walk must look everywhere."""
        if self._crowded_at is None or time.monotonic() < self._crowded_at:
            return False
        self._crowded_at = None
        self._next_look = 0.0
        return True

    @property
    def next_in_s(self) -> float:
        """Seconds until the next entry is due, or until it is time to look ahead."""
        next_look = self._next_look if self._crowded_at is None else self._crowded_at
        return min(next_look, self._heap[0][0] if self._heap else next_look) - time.monotonic()
