"""What a worker is told from outside: to be quiet, to stop, to hurry.

Invariant: an order is never taken back. No I/O. Given by cli and recycling. Read by worker, turns and checks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


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
        self._patience: asyncio.Timeout | None = None

    def wake(self) -> None:
        """Look up from whatever is waited for."""
        self.woken.set()
        if self._patience is not None:
            self._patience.reschedule(0)

    async def wait(self, seconds: float) -> None:
        """Wait to be woken, `seconds` at most."""
        self.woken.clear()
        try:
            async with asyncio.timeout(seconds):
                await self.woken.wait()
        except TimeoutError:
            pass

    async def unless_woken(self, call: Awaitable[T], seconds: float) -> T | None:
        """What the call returns; None if it was interrupted, by a wake-up or after `seconds`. One at a time."""
        try:
            async with asyncio.timeout(seconds) as self._patience:
                return await call
        except TimeoutError:
            return None
        finally:
            self._patience = None
