"""Run what is due, in the test itself: real arguments, executor and endings; no Redis, no relay, no waiting.

1. take the job that a worker would take first, 2. run it in the calling task, 3. write how it ended, and again.

Time passes only when the test says so, and then as it would: from one due job to the next. Called by tests of
applications. Calls outbox.rehearsal, outbox.settle, executor and burial.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from ..app import JobQ
from ..errors import AlreadyDone
from ..model import Entry, Job
from ..outbox import rehearsal, settle
from ..outbox.settle import Burial, Reschedule
from ..outbox.statement import Transaction
from ..outcomes import Reject, Retry, Snooze, seconds
from ..tracing import kept_apart
from ..worker.attempt import Attempt as Record
from ..worker.attempt import exc_info_from_task
from ..worker.burial import Undertaker
from ..worker.executor import Executor
from ..worker.owned import Holding
from .application import OWN_STATE, GivenDatabase, on_stores

_WORKER = "testing"
_THREADS = 4


@dataclass(frozen=True, slots=True)
class Attempt:
    """How one run of a job ended."""

    id: UUID
    task: str
    number: int
    """From 1; a snooze does not count."""
    outcome: str
    """`done`, `retried`, `snoozed`, `dead`, `already done` or `failed after completion`."""
    error: BaseException | None
    """What the task raised."""
    delay_s: float | None
    """Until the next attempt, if there is one."""
    duration_s: float


async def run_pending(
    jobs: JobQ,
    *,
    advance: float | timedelta = 0,
    raises: bool = True,
    state: Any = OWN_STATE,
    database: GivenDatabase | None = None,
    limit: int = 1_000,
) -> list[Attempt]:
    """Run the committed jobs that are due, and those that they enqueue, until none is. Returns every attempt.

    `advance` lets that much time pass, in seconds or as a timedelta: delayed jobs and retries run at their
    moments within it. `state` is what tasks get as `ctx.state`; without it the lifespan is entered.
    `database` is another one than that of `jobs`: an AsyncConnection with an open transaction keeps everything in
    it, for tests that roll it back.

    An error that a task raises ends its attempt as in a worker, and is then raised here, unless it is a Retry,
    Snooze or Reject or `raises` is false. Raises AssertionError after `limit` attempts.
    """
    __tracebackhide__ = True  # pytest then shows the test and the task
    left_s = seconds(advance, "advance")
    attempts: list[Attempt] = []
    async with AsyncExitStack() as stack:
        app = await stack.enter_async_context(on_stores(jobs, database=database, state=state))
        app.check()
        state = await stack.enter_async_context(app.lifespan()) if app.lifespan is not None else None
        inline = _Inline(app, state)
        stack.callback(inline.close)
        while (found := await inline.next_job()) is not None and found[1] <= left_s:
            job_id, due_in_s = found
            if due_in_s > 0:
                await inline.pass_time(due_in_s)
                left_s -= due_in_s
                continue
            if len(attempts) == limit:
                raise AssertionError(_endless(attempts))
            attempt = await inline.run(job_id)
            if attempt is not None:
                attempts.append(attempt)
                _raise_unexpected(attempt, everything=raises)
        if left_s > 0:
            await inline.pass_time(left_s)
    return attempts


class _Inline:
    """A worker of one slot that takes its jobs from PostgreSQL."""

    def __init__(self, app: JobQ, state: Any):
        self._app = app
        self._ends = _Ends(app)
        self._executor = Executor(app, self._ends, _WORKER, state=state, threads=_THREADS, is_stopping=lambda: False)

    async def next_job(self) -> tuple[UUID, float] | None:
        async with self._app.database.sessions.begin() as session:
            return await rehearsal.next_job(session, self._app.schema, self._app.tasks)

    async def pass_time(self, seconds: float) -> None:
        async with self._app.database.sessions.begin() as session:
            await rehearsal.pass_time(session, self._app.schema, seconds)

    async def run(self, job_id: UUID) -> Attempt | None:
        """Run one job and write its end. None: another run had it first."""
        async with self._app.database.sessions.begin() as session:
            job = (await settle.read(session, self._app.schema, [job_id])).get(job_id)
        if job is None:
            return None
        holding = Holding(job.queue, Entry.of(job.id, job.generation, job.priority))
        with kept_apart():
            record = await self._executor.run(holding, job)
        await self._write(job)
        if record is None:
            raise AssertionError(f"the run of {job.task} broke off: the log says why")
        if record.outcome == "handed back":
            raise AssertionError(f"{job.task} could not be completed: {record.error}") from record.error
        return _attempt(record)

    async def _write(self, job: Job) -> None:
        end, self._ends.end = self._ends.end, None
        if end is None:
            return
        async with self._app.database.sessions.begin() as session:
            if job.id in await end(session):
                return
            now = await settle.standings(session, self._app.schema, [job.id])
        if job.id in now and now[job.id].generation == job.generation:
            raise AssertionError(
                f"the end of {job.task} could not be written: another transaction, say one that the test has left "
                "open, holds a lock on the row of its job"
            )

    def close(self) -> None:
        self._executor.close()


class _Ends:
    """Keeps how the run ended, until it is written."""

    def __init__(self, app: JobQ):
        self._schema = app.schema
        self._undertaker = Undertaker(app)
        self.end: Callable[[Transaction], Awaitable[Collection[UUID]]] | None = None

    def complete(self, holding: Holding) -> None:
        self.end = lambda tx: settle.complete(tx, self._schema, [holding.entry.key])

    def reschedule(self, holding: Holding, end: Reschedule) -> None:
        self.end = lambda tx: settle.reschedule(tx, self._schema, [end])

    def bury(self, holding: Holding, end: Burial) -> None:
        self.end = lambda tx: self._undertaker.bury(tx, [end])

    def ack(self, holding: Holding) -> None:
        """There is no entry."""

    def release(self, holding: Holding) -> None:
        """There is no entry."""


def _attempt(record: Record) -> Attempt:
    job = record.job
    return Attempt(job.id, job.task, job.attempts + 1, record.outcome, record.error, record.delay_s, record.duration_s)


def _raise_unexpected(attempt: Attempt, *, everything: bool) -> None:
    """A test wants to see what its task broke on; a cancelled test, or Ctrl-C, is no outcome of a job at all."""
    __tracebackhide__ = True
    error = attempt.error
    if error is None or isinstance(error, (Retry, Snooze, Reject, AlreadyDone)):
        return
    if everything or not isinstance(error, Exception):
        error.add_note(
            f"raised by {attempt.task}, attempt {attempt.number}, which ended as {attempt.outcome!r}; "
            "run_pending(raises=False) returns such attempts instead"
        )
        raise error.with_traceback(exc_info_from_task(error)[2])


def _endless(attempts: list[Attempt]) -> str:
    tasks = ", ".join(f"{task} {count:,} times" for task, count in Counter(a.task for a in attempts).most_common(3))
    return (
        f"after {len(attempts):,} attempts there are still jobs due ({tasks}): does a task enqueue itself? "
        "If that is meant, give run_pending(limit=...)"
    )
