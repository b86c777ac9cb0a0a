"""What this process owns: one table, keyed by (id, generation).

Invariant: an entry is here from the moment it is fetched or adopted until Redis has confirmed that it was
acked, released or parked. The heartbeat lists all of it; what is here is ignored when it is fetched again.
Called by all parts of the worker. Calls nothing.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterable

from ..model import Entry
from ..outbox.settle import RunKey
from ..run import Run
from .attempt import Attempt


class Ending(enum.Enum):
    """Why a run was cancelled from outside."""

    LOST = "lost"
    SHUTDOWN = "shutdown"


class Holding:
    """One owned entry, and the run it has, if it has started."""

    __slots__ = ("ending", "entry", "is_settling", "queue", "run", "task")

    def __init__(self, queue: str, entry: Entry):
        self.queue = queue
        self.entry = entry
        self.task: asyncio.Task[Attempt | None] | None = None
        self.run: Run | None = None
        self.ending: Ending | None = None
        self.is_settling = False

    @property
    def is_listed(self) -> bool:
        """Whether a heartbeat may vouch for it: not for a run whose task ended without settling."""
        return self.is_settling or self.task is None or not self.task.done()

    @property
    def is_running(self) -> bool:
        """Whether it has a run that goes on, and that nobody has settled."""
        return self.task is not None and not self.task.done() and not self.is_settling

    def interrupt(self, ending: Ending = Ending.SHUTDOWN) -> None:
        """Cancel its run, if one goes on."""
        if self.task is not None and self.is_running:
            self.ending = ending
            self.task.cancel()


class Owned:
    """All holdings of a process, by queue."""

    def __init__(self, queues: Iterable[str]):
        self._holdings: dict[str, dict[RunKey, Holding]] = {queue: {} for queue in queues}

    def __len__(self) -> int:
        return sum(map(len, self._holdings.values()))

    def take(self, queue: str, entry: Entry) -> Holding | None:
        """Own an entry; None if it is owned already, by a run that is alive."""
        holdings, key = self._holdings[queue], entry.key
        held = holdings.get(key)
        if held is not None and held.is_listed:
            return None
        holdings[key] = holding = Holding(queue, entry)
        return holding

    def drop(self, holding: Holding) -> None:
        """Own it no more. Only after Redis has confirmed that it holds it no more either."""
        holdings, key = self._holdings[holding.queue], holding.entry.key
        if holdings.get(key) is holding:
            del holdings[key]

    def find(self, queue: str, raw: bytes) -> Holding | None:
        entry = Entry.parse(raw)
        return self._holdings[queue].get(entry.key) if entry is not None else None

    def listed(self, queue: str) -> list[bytes]:
        """What a heartbeat says of a queue. Called from the heartbeat's thread: the copy is one atomic step."""
        return [holding.entry.raw for holding in list(self._holdings[queue].values()) if holding.is_listed]

    def all(self) -> list[Holding]:
        return [holding for holdings in self._holdings.values() for holding in holdings.values()]
