"""The executor: runs one job, and says how it ends.

1. reads the arguments as the task wants them now;
2. calls the task with a context, within its time;
3. turns whatever comes of it into one end - complete, reschedule, bury, ack or release - and one record.

Called by worker and testing. Calls the application's tasks, settler and attempt.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from ..app import JobQ
from ..context import Context
from ..errors import AlreadyDone, InvalidResult
from ..model import Job
from ..outbox.database import hide_values
from ..outbox.settle import Burial, Reschedule
from ..outcomes import Reject, Retry, Snooze
from ..retry import LONGEST_DELAY_S, default_delay
from ..run import Completion, HandBack, Run
from ..settings import ERROR_LIMIT
from ..task import Task
from ..tracing import resume
from .attempt import Attempt, log_attempt
from .owned import Ending, Holding

log = logging.getLogger(__name__)


class Ends(Protocol):
    """Where runs end: the worker's settler, or the one of jobq.testing."""

    def complete(self, holding: Holding) -> None: ...
    def reschedule(self, holding: Holding, end: Reschedule) -> None: ...
    def bury(self, holding: Holding, end: Burial) -> None: ...
    def ack(self, holding: Holding) -> None: ...
    def release(self, holding: Holding) -> None: ...


class Executor:
    """Runs the jobs of one process."""

    def __init__(
        self,
        app: JobQ,
        settler: Ends,
        worker: str,
        *,
        state: Any,
        threads: int,
        is_stopping: Callable[[], bool],
    ):
        self._app = app
        self._settler = settler
        self._worker = worker
        self._state = state
        self._is_stopping = is_stopping
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="jobq task")
        self._free_threads = asyncio.Semaphore(threads)
        self.waiting: dict[Holding, Job] = {}
        """Synchronous jobs that wait for a thread. They hold a slot, and have not started."""
        self.in_threads: dict[Holding, Job] = {}
        """Synchronous jobs that run. Nothing can interrupt them."""

    async def run(self, holding: Holding, job: Job) -> Attempt | None:
        """Run a job to one of its ends. Raises nothing. Returns the record, unless the run itself broke off."""
        task = self._app.tasks[job.task]
        limit = job.max_attempts or task.retry.max_attempts
        started = time.monotonic()
        try:
            outcome, delay_s, error = await self._run(holding, job, task, limit)
            attempt = Attempt(job, outcome, time.monotonic() - started, limit, error, delay_s)
            log_attempt(attempt)
            return attempt
        except Exception as fault:
            # Neither the task's nor the policy's: but a run without an end would be adopted and run again for ever.
            log.exception("run broke off", extra={"fields": {"job": str(job.id), "task": job.task}})
            if not holding.is_settling:
                delay_s = default_delay(job.attempts + 1, fault)
                end = Reschedule(job.id, job.generation, delay_s, failed=True, **_told(fault))
                self._settler.reschedule(holding, end)
            return None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(
        self, holding: Holding, job: Job, task: Task[..., Any, Any], limit: int
    ) -> tuple[str, float | None, BaseException | None]:
        holding.run = Run(self._worker, self._app.schema, self._app.database.sessions if task.is_async else None)
        error: BaseException | None = None
        try:
            arguments = task.codec.decode(job.args)
        except Exception as refused:  # noqa: BLE001  also what a validator of the application raises
            hide_values(refused)
            return *self._bury(holding, job, "invalid", refused, failed=False), refused
        try:
            await self._called(holding, holding.run, job, task, limit, arguments)
        except BaseException as raised:  # noqa: BLE001  everything a task raises is an end of the job
            hide_values(raised)
            error = _alone(raised)
        return *self._settle(holding, holding.run, job, task, limit, error), error

    def _called(
        self, holding: Holding, run: Run, job: Job, task: Task[..., Any, Any], limit: int, arguments: dict[str, Any]
    ) -> Awaitable[Any]:
        """The call of the task, to be awaited: where it is async and has no time limit, with nothing around it."""
        call: Callable[[], Any] = partial(task.function, **arguments)
        if task.takes_context:
            context: Context[Any] = Context(
                job, run, state=self._state, max_attempts=limit, is_stopping=self._is_stopping
            )
            call = partial(task.function, context, **arguments)
        if job.headers is not None:
            resume(job.headers)
        timeout_s = job.timeout_s or task.timeout_s
        if not task.is_async:
            return self._called_in_thread(holding, job, call, timeout_s)
        return call() if timeout_s is None else _in_time(call(), timeout_s)

    async def _called_in_thread(
        self, holding: Holding, job: Job, call: Callable[[], Any], timeout_s: float | None
    ) -> None:
        await self._take_thread(holding, job)
        self.in_threads[holding] = job
        try:
            # Its time begins here: what it waited for a thread is not its own doing.
            await _in_time(self._in_thread(holding, job, call), timeout_s)
        finally:
            del self.in_threads[holding]
            self._free_threads.release()

    async def _take_thread(self, holding: Holding, job: Job) -> None:
        """Wait until a thread is free. A worker that stops meanwhile hands the job back: it has not started."""
        self.waiting[holding] = job
        try:
            await self._free_threads.acquire()
        except asyncio.CancelledError:
            if holding.ending is Ending.SHUTDOWN:
                raise HandBack("the worker stops, and no thread was free") from None
            raise
        finally:
            del self.waiting[holding]

    async def _in_thread(self, holding: Holding, job: Job, call: Callable[[], Any]) -> None:
        """Run a synchronous task. A thread cannot be stopped: a cancelled run keeps its slot until it ends.

        If it then ended well it is done, late or not: its work would be done twice by another run.
        """
        work = self._threads.submit(contextvars.copy_context().run, _run_in_thread, call)
        future = asyncio.wrap_future(work)
        while not future.done():
            try:
                await asyncio.shield(future)
            except asyncio.CancelledError:
                if work.cancel():
                    raise  # no thread had taken it up
                if holding.ending is None and not future.done():
                    fields = {"job": str(job.id), "task": job.task}
                    log.warning("job is over its time, and its thread cannot be interrupted", extra={"fields": fields})
            except Exception:  # noqa: BLE001, S110
                pass  # raised below, by result()
        future.result()

    def _settle(
        self,
        holding: Holding,
        run: Run,
        job: Job,
        task: Task[..., Any, Any],
        limit: int,
        error: BaseException | None,
    ) -> tuple[str, float | None]:
        """Hand the end to the settler. Returns the outcome, and the seconds until the next attempt."""
        if run.completion is Completion.COMMITTED:
            self._settler.ack(holding)
            was_cancelled_by_us = holding.ending is not None and isinstance(error, asyncio.CancelledError)
            return ("done" if error is None or was_cancelled_by_us else "failed after completion"), None
        match error:
            case None:
                self._settler.complete(holding)
                return "done", None
            case AlreadyDone():
                self._settler.ack(holding)
                return "already done", None
            case HandBack():
                self._settler.release(holding)
                return "handed back", None
            case asyncio.CancelledError() if holding.ending is Ending.LOST:
                self._settler.ack(holding)
                return "lost", None
            case asyncio.CancelledError() if holding.ending is Ending.SHUTDOWN:
                self._settler.reschedule(holding, Reschedule(job.id, job.generation))
                return "interrupted", None
            case Snooze():
                delay_s = min(error.delay_s, LONGEST_DELAY_S)
                self._settler.reschedule(holding, Reschedule(job.id, job.generation, delay_s))
                return "snoozed", delay_s
            case Reject():
                return self._bury(holding, job, "rejected", error)
            case InvalidResult():  # a retry would repeat the step's call, up to the last attempt
                return self._bury(holding, job, "invalid", error)
            case _:
                return self._retry(holding, job, task, limit, error)

    def _retry(
        self, holding: Holding, job: Job, task: Task[..., Any, Any], limit: int, error: BaseException
    ) -> tuple[str, float | None]:
        attempt = job.attempts + 1
        try:
            verdict = task.retry.verdict(attempt, limit, error)
        except BaseException as broken:  # noqa: BLE001  a policy of the application: its fault must not lose the job
            error.add_note(f"the retry policy's delay() raised {type(broken).__name__}: {broken}")
            verdict = default_delay(attempt, error)
        if isinstance(verdict, str):
            return self._bury(holding, job, verdict, error)
        asked_s = getattr(error, "delay_s", None) if isinstance(error, Retry) else None
        delay_s = verdict if asked_s is None else min(asked_s, LONGEST_DELAY_S)
        self._settler.reschedule(holding, Reschedule(job.id, job.generation, delay_s, failed=True, **_told(error)))
        return "retried", delay_s

    def _bury(
        self, holding: Holding, job: Job, reason: str, error: BaseException, *, failed: bool = True
    ) -> tuple[str, None]:
        self._settler.bury(holding, Burial(job.id, job.generation, reason, failed=failed, **_told(error)))
        return "dead", None


async def _in_time(call: Awaitable[Any], timeout_s: float | None) -> None:
    async with asyncio.timeout(timeout_s):
        await call


def _run_in_thread(call: Callable[[], Any]) -> None:
    """A synchronous task, in its thread."""
    try:
        result = call()
    except (StopIteration, GeneratorExit) as error:
        # No future takes the first, and the second closes the coroutines that wait for it: the run would never end.
        raise RuntimeError(f"the task raised {type(error).__name__}") from error
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError("the task is no `async def`, and what it returned was to be awaited: nothing of it has run")


def _alone(error: BaseException) -> BaseException:
    """An error; of those that came out of a task group together, the one that says how the job ends.

    An outcome of the task's own says so only when it is alone there.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    for kind in (AlreadyDone, InvalidResult, HandBack):
        ours, others = error.split(kind)
        if ours is not None and (kind is not HandBack or others is None):
            return _first(ours)
    alone: BaseException = error
    while isinstance(alone, BaseExceptionGroup) and len(alone.exceptions) == 1:
        alone = alone.exceptions[0]
    return alone if isinstance(alone, (Retry, Reject, Snooze)) else error


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _told(error: BaseException) -> dict[str, str]:
    """What is kept of an error: text that PostgreSQL takes, bounded."""
    text = "".join(traceback.format_exception_only(error)).strip()
    return {"error_type": _storable(type(error).__qualname__)[:200], "error": _storable(text)[:ERROR_LIMIT]}


def _storable(text: str) -> str:
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
