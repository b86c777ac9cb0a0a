"""What a running job sees: who it is, what it may use, and the one transaction that finishes it.

Invariant: the effects written in `complete()` and the job's own completion are one COMMIT, whose first
statement is the DELETE of the job's row. Called by the executor and by tasks. Calls outbox.settle.
"""

from __future__ import annotations

import asyncio
import enum
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cached_property
from typing import Any, Generic
from uuid import UUID, uuid5

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction, async_sessionmaker
from typing_extensions import TypeVar

from .errors import AlreadyDone, ConfigurationError, TransactionUsed
from .model import Job
from .outbox.database import PoolTimeout
from .outbox.settle import begin_complete, is_same_transaction

S_co = TypeVar("S_co", covariant=True, default=object)
"""The application's state. Its default is not Any: mypy gives up on an overload whose argument holds one, and would
let wrong calls of a task with a bare `Context` pass."""

_TRIES_TO_BEGIN = 3
_LOCK_NOT_AVAILABLE = "55P03"
_SERIALIZATION = ("40001", "40P01")
_FAILED_TRANSACTION = "25P02"


class Completion(enum.Enum):
    """How far a run got with `ctx.complete()`."""

    UNUSED = "unused"
    OPEN = "open"
    """It was entered, and how it ends is told by the row: even COMMIT may go without an answer."""
    COMMITTED = "committed"


class HandBack(BaseException):
    """The run cannot go on here and now, and has done nothing: its entry goes back and no attempt is used."""


class Run:
    """What the worker gives each context: the means, and the place where the run's completion is noted."""

    __slots__ = ("completion", "schema", "sessions", "worker")

    def __init__(self, worker: str, schema: str, sessions: async_sessionmaker[AsyncSession] | None):
        self.worker = worker
        self.schema = schema
        self.sessions = sessions
        self.completion = Completion.UNUSED


class Context(Generic[S_co]):
    """A running job, as its task sees it. `state` is what the application's lifespan yielded."""

    def __init__(self, job: Job, run: Run, *, state: S_co, max_attempts: int, is_stopping: Callable[[], bool]):
        self._job = job
        self._run = run
        self._is_stopping = is_stopping
        self.state = state
        self.max_attempts = max_attempts

    @property
    def id(self) -> UUID:
        """The job's id: the same at every attempt."""
        return self._job.id

    @property
    def task(self) -> str:
        return self._job.task

    @property
    def queue(self) -> str:
        return self._job.queue

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1. Snoozes, shutdowns and crashes of the worker use up none."""
        return self._job.attempts + 1

    @cached_property
    def headers(self) -> Mapping[str, str]:
        """What was given as `opts(headers=...)` at enqueue."""
        return json.loads(self._job.headers) if self._job.headers else {}

    @property
    def stopping(self) -> bool:
        """Whether this worker is shutting down: a long task may wrap up or snooze."""
        return self._is_stopping()

    def idempotency_key(self, name: str = "") -> str:
        """A key for an outside call, the same at every attempt and different for each `name`.

        An outside call happens at least once; a service that honours such keys makes it once.
        """
        return str(uuid5(self._job.id, name))

    @asynccontextmanager
    async def complete(self) -> AsyncIterator[AsyncSession]:
        """Finish the job: a session whose COMMIT applies the block's writes and the completion together.

        Use it once, as the last thing in the task. Jobs enqueued with the session belong to the same COMMIT.
        An exception in the block rolls everything back, and the attempt counts as failed.

        Raises AlreadyDone (not an Exception) before the block when the job is no longer this run's, and
        TransactionUsed on a second use. Do not commit or roll back inside.
        """
        run = self._run
        if run.completion is not Completion.UNUSED:
            raise TransactionUsed(
                f"task {self.task!r} entered ctx.complete() twice: it finishes the job, so put all effects in one block"
            )
        if run.sessions is None:
            raise ConfigurationError(f"task {self.task!r} is a plain function, and ctx.complete() needs `async def`")
        run.completion = Completion.OPEN
        async with AsyncExitStack() as stack:
            session, transaction, xid = await self._begin(stack, run.sessions)
            yield session
            await self._check_still_open(session, transaction, xid)
            # Crash here: nothing is committed, the job runs again.
            await _unless_cancelled(transaction.__aexit__(None, None, None), lambda: self._note_commit())
            # Crash here: all is committed; the entry comes back, and its pre-read finds no row.

    async def _check_still_open(self, session: AsyncSession, transaction: AsyncSessionTransaction, xid: str) -> None:
        """Refuse to commit anything but what began with the DELETE of the row.

        After a statement that failed, PostgreSQL answers COMMIT with a rollback and no error: a block that swallowed
        such a failure would seem done, and run again and again.
        """
        is_open, cause = False, None
        if transaction.is_active:
            try:
                is_open = await is_same_transaction(session, self._run.schema, xid)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) != _FAILED_TRANSACTION:
                    raise
                cause = error
        if not is_open:
            raise TransactionUsed(
                f"task {self.task!r}: the transaction of ctx.complete() was over before its block. Leave commit and "
                "rollback to it, and put `async with session.begin_nested():` around a statement that may fail"
            ) from cause

    def _note_commit(self) -> None:
        self._run.completion = Completion.COMMITTED

    async def _begin(
        self, stack: AsyncExitStack, sessions: async_sessionmaker[AsyncSession]
    ) -> tuple[AsyncSession, AsyncSessionTransaction, str]:
        """Open the transaction, and delete the row in it before anything else happens there (MUST)."""
        for attempt in range(1, _TRIES_TO_BEGIN + 1):
            inner = await stack.enter_async_context(AsyncExitStack())
            session = await inner.enter_async_context(sessions())
            transaction = await inner.enter_async_context(session.begin())
            try:
                xid = await begin_complete(
                    session, self._run.schema, (self._job.id, self._job.generation), worker=self._run.worker
                )
            except PoolTimeout as error:
                raise HandBack("the application's connection pool had no connection free") from error
            except DBAPIError as error:
                state = getattr(error.orig, "sqlstate", None)
                if state == _LOCK_NOT_AVAILABLE:
                    raise HandBack("another transaction holds a lock on the job's row") from error
                if state not in _SERIALIZATION or attempt == _TRIES_TO_BEGIN:
                    raise
                await _rolled_back(inner, error)
                continue
            if xid is None:
                raise AlreadyDone(f"job {self._job.id} is no longer this run's: completed, cancelled or rescheduled")
            return session, transaction, xid
        raise AssertionError("unreachable")


async def _rolled_back(stack: AsyncExitStack, error: BaseException) -> None:
    await stack.__aexit__(type(error), error, error.__traceback__)


async def _unless_cancelled(commit: Coroutine[Any, Any, object], done: Callable[[], None]) -> None:
    """Let COMMIT end before a cancellation goes on: cancelled half way, nobody knows whether it happened."""
    task = asyncio.ensure_future(commit)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except BaseException:  # noqa: S110, BLE001
            pass  # raised below, by result()
    task.result()
    done()
    if cancelled is not None:
        raise cancelled
