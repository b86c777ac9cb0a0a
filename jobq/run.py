"""What one run of a job is given, and where it notes how far it got.

Invariant: a run that hands its job back has begun nothing new. Called by the executor, context and complete. Calls
outbox.database.
"""

from __future__ import annotations

import asyncio
import enum

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from .outbox.database import PoolTimeout, is_unavailable

_PAUSE_S = 0.5
"""Before a job goes back to run again while PostgreSQL is away."""


class Completion(enum.Enum):
    """How far a run got with `ctx.complete()`."""

    UNUSED = "unused"
    OPEN = "open"
    """It was entered, and how it ends is told by the row: even COMMIT may go without an answer."""
    COMMITTED = "committed"


class HandBack(BaseException):
    """The run cannot go on here and now, and has begun nothing new: its entry goes back and no attempt is used."""


class Run:
    """What the worker gives each context: the means, and the place where the run's completion is noted."""

    __slots__ = ("completion", "schema", "sessions", "steps", "worker")

    def __init__(self, worker: str, schema: str, sessions: async_sessionmaker[AsyncSession] | None):
        self.worker = worker
        self.schema = schema
        self.sessions = sessions
        self.completion = Completion.UNUSED
        self.steps: set[str] | None = None
        """Names of the steps that this run has taken."""


async def hand_back_if_away(error: Exception) -> None:
    """Raise HandBack where PostgreSQL, or a connection to it, cannot be had just now."""
    if isinstance(error, PoolTimeout):
        raise HandBack("the application's connection pool had no connection free") from error
    if is_unavailable(error):
        await asyncio.sleep(_PAUSE_S)
        raise HandBack("PostgreSQL was away") from error
