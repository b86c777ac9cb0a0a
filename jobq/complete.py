"""The one transaction that finishes a job: what `ctx.complete()` opens.

Invariant: the effects written in it and the job's own completion are one COMMIT, whose first statement is the
DELETE of the job's row. Called by context. Calls run, step, outbox.settle and outbox.patience.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction, async_sessionmaker

from .errors import AlreadyDone, ConfigurationError, TransactionUsed
from .model import Job
from .outbox.database import PoolTimeout, is_unavailable
from .outbox.patience import Patience
from .outbox.settle import begin_complete, is_same_transaction
from .run import Completion, HandBack, Run, hand_back_if_away
from .step import to_the_end

_TRIES_TO_BEGIN = 3
_LOCK_NOT_AVAILABLE = "55P03"
_SERIALIZATION = ("40001", "40P01")
_FAILED_TRANSACTION = "25P02"


@asynccontextmanager
async def complete(job: Job, run: Run) -> AsyncIterator[AsyncSession]:
    """Give a session in whose transaction the job is done. Raises what `Context.complete` names."""
    if run.completion is not Completion.UNUSED:
        raise TransactionUsed(
            f"task {job.task!r} entered ctx.complete() twice: it finishes the job, so put all effects in one block"
        )
    if run.sessions is None:
        raise ConfigurationError(f"task {job.task!r} is a plain function, and ctx.complete() needs `async def`")
    run.completion = Completion.OPEN
    async with AsyncExitStack() as stack:
        patience = stack.enter_context(Patience())
        session, transaction, xid = await _begin(stack, job, run, run.sessions, patience)
        patience.rest()
        try:
            yield session
        finally:
            patience.go_on()  # also for the ROLLBACK
        await _check_still_open(job, run, session, transaction, xid, patience)
        # Crash here: nothing is committed, the job runs again.
        # Not cancelled half way: nobody would know whether it happened.
        _, cancelled = await to_the_end(transaction.__aexit__(None, None, None))
        run.completion = Completion.COMMITTED
        if cancelled is not None:
            raise cancelled
        # Crash here: all is committed; the entry comes back, and its pre-read finds no row.


async def _begin(
    stack: AsyncExitStack, job: Job, run: Run, sessions: async_sessionmaker[AsyncSession], patience: Patience
) -> tuple[AsyncSession, AsyncSessionTransaction, str]:
    """Open the transaction, and delete the row in it before anything else happens there (MUST)."""
    for attempt in range(1, _TRIES_TO_BEGIN + 1):
        inner = await stack.enter_async_context(AsyncExitStack())
        session = await inner.enter_async_context(sessions())
        transaction = await inner.enter_async_context(session.begin())
        try:
            connection = await session.connection()
            await patience.begin(connection)
            xid = await begin_complete(connection, run.schema, (job.id, job.generation), worker=run.worker)
        except Exception as error:
            if not await _may_begin_again(error, is_last=attempt == _TRIES_TO_BEGIN):
                raise
            await _rolled_back(inner, error)
            continue
        if xid is None:
            raise AlreadyDone(f"job {job.id} is no longer this run's: completed, cancelled or rescheduled")
        # Crash here, or in the block: the DELETE is rolled back with the session, and the job runs again.
        return session, transaction, xid
    raise AssertionError("unreachable")


async def _may_begin_again(error: Exception, *, is_last: bool) -> bool:
    """Whether to begin again. Raises HandBack where another run may: nothing has been done in the transaction."""
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    if state == _LOCK_NOT_AVAILABLE:
        raise HandBack("another transaction holds a lock on the job's row") from error
    # A connection of the pool may have died with its server: the next one is new.
    is_lost = is_unavailable(error) and not isinstance(error, PoolTimeout)
    if (is_lost or state in _SERIALIZATION) and not is_last:
        return True
    await hand_back_if_away(error)
    return False


async def _rolled_back(stack: AsyncExitStack, error: BaseException) -> None:
    await stack.__aexit__(type(error), error, error.__traceback__)


async def _check_still_open(
    job: Job, run: Run, session: AsyncSession, transaction: AsyncSessionTransaction, xid: str, patience: Patience
) -> None:
    """Refuse to commit anything but what began with the DELETE of the row.

    After a statement that failed, PostgreSQL answers COMMIT with a rollback and no error: a block that swallowed
    such a failure would seem done, and run again and again.
    """
    is_open, cause = False, None
    if transaction.is_active:
        try:
            await _flush(session, patience)
            # Of the driver: three layers of SQLAlchemy would take longer than the question.
            is_open = await is_same_transaction(patience.driver, run.schema, xid)
        except (DBAPIError, asyncpg.PostgresError) as error:
            if getattr(getattr(error, "orig", error), "sqlstate", None) != _FAILED_TRANSACTION:
                raise
            cause = error
    if not is_open:
        raise TransactionUsed(
            f"task {job.task!r}: the transaction of ctx.complete() was over before its block. Leave commit and "
            "rollback to it, and put `async with session.begin_nested():` around a statement that may fail"
        ) from cause


async def _flush(session: AsyncSession, patience: Patience) -> None:
    """Have the session write now what it keeps for its COMMIT: the application's, which may take its time."""
    if not (session.new or session.dirty or session.deleted):
        return
    patience.rest()
    try:
        await session.flush()
    finally:
        patience.go_on()
