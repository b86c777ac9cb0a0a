"""A deadline for what jobq asks on the application's connections, where a network may swallow everything.

Cancelling would not do: what clears up after a cancelled statement asks the same connection, and would wait for ever
in its turn. Invariant: a connection is ended only while jobq waits for its answer. Called by complete, steps and the
undertaker. Calls nothing.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

ANSWER_TIMEOUT_S = 30.0
"""A connection that says nothing for this long leads nowhere any more."""


class Patience:
    """Ends a connection whose answer does not come in time, so that whatever waits for it raises.

    Use it around the block that gives the connection back, which asks it too.
    """

    def __init__(self) -> None:
        self.driver: Any = None
        """asyncpg's connection, of which an answer is awaited."""
        self._end: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.rest()

    async def begin(self, tx: AsyncSession | AsyncConnection) -> None:
        """From now on the connection of `tx` must answer in time, and no other: it may be somebody else's by now."""
        self.rest()
        self.driver = None
        connection = await tx.connection() if isinstance(tx, AsyncSession) else tx
        assert connection.sync_connection is not None
        self.driver = connection.sync_connection.connection.driver_connection
        self.go_on()

    def rest(self) -> None:
        """It has answered; what comes next is not jobq's."""
        if self._end is not None:
            self._end.cancel()
            self._end = None

    def go_on(self) -> None:
        """Begin anew with the same connection, if there was one."""
        self.rest()
        if self.driver is not None:
            self._end = asyncio.get_running_loop().call_later(ANSWER_TIMEOUT_S, self.driver.terminate)
