"""What a worker is told from outside: to be quiet, to stop, to hurry.

Invariant: an order is never taken back. No I/O. Given by cli and recycling. Read by worker, turns, fetching, shutdown
and checks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Woken(Exception):
    """What was waited for was interrupted."""


class Orders:
    """What a worker is told from outside. `wake()` after setting one."""

    def __init__(self) -> None:
        self.quiet = asyncio.Event()
        """Fetch nothing more, and go on running what has started."""
        self.stopping = asyncio.Event()
        """Fetch nothing more, give running jobs their grace, hand back the rest."""
        self.hurry = asyncio.Event()
        """Hand everything back at once."""
        self.woken = asyncio.Event()
        self._room = asyncio.Event()
        self._patience: asyncio.Timeout | None = None

    def wake(self) -> None:
        """Look up from whatever is waited for."""
        self.woken.set()
        self._room.set()
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(0)

    def note_room(self) -> None:
        """A run has ended: look up from `wait`, but from no bell."""
        self._room.set()

    async def wait(self, seconds: float) -> None:
        """Wait to be woken or for room, `seconds` at most."""
        self._room.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._room.wait()
        except TimeoutError:
            pass

    @asynccontextmanager
    async def unless_woken(self, seconds: float) -> AsyncIterator[None]:
        """Break what is inside off as soon as there is a wake-up, or one since the last time, or after `seconds`.

        Raises Woken then. One at a time.
        """
        if self.woken.is_set():
            self.woken.clear()
            raise Woken
        try:
            async with asyncio.timeout(seconds) as self._patience:
                yield
        except TimeoutError:
            raise Woken from None
        finally:
            self._patience = None
