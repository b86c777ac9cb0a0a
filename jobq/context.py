"""What a running job sees: who it is, what it may use, its recovery points, and the one transaction that finishes it.

Invariant: a step whose result is kept is not called again by the same job. Called by the executor and by tasks.
Calls complete, step and outbox.steps.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import cached_property, partial
from typing import Any, Generic, overload
from uuid import UUID, uuid5

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from typing_extensions import ParamSpec, TypeVar

from .codec import ResultCodec
from .complete import complete
from .errors import AlreadyDone, ConfigurationError, InvalidResult, TransactionUsed
from .model import Job
from .outbox import steps
from .outbox.database import is_unavailable
from .run import Completion, Run, hand_back_if_away
from .step import called, codec_of, refuse_bad_name, to_the_end

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

S_co = TypeVar("S_co", covariant=True, default=object)
"""The application's state. Its default is not Any: mypy gives up on an overload whose argument holds one, and would
let wrong calls of a task with a bare `Context` pass."""

_PASSING = ("08", "25006", "40", "53", "57")
"""SQLSTATEs, or their classes, of what goes by: connections, a failover, conflicts, resources, operators."""
_PAUSE_S = 0.5
"""Between two tries while PostgreSQL cannot be had."""
_PATIENCE_S = 3.0
"""How long a worker that stops waits for PostgreSQL to take a step's result, once it has cancelled the run."""


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
        """What was given as `opts(headers=...)` at enqueue, and W3C trace context (`traceparent`, `tracestate`)."""
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

    @overload
    async def step(self, name: str, function: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    async def step(self, name: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    async def step(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call `function(*args, **kwargs)` and keep its result: later runs of this job get that, and call nothing.

        A recovery point: what is behind it is not done again by a retry, a snooze, a crash, a shutdown or
        `jobq dead retry`. A step is known by its `name` alone, one for each call in a task. Plain functions run in a
        thread. The result is kept as JSON (1 MiB) and comes back as the function's return annotation says: a
        dataclass, a pydantic model, a UUID, ...; without one as plain JSON. Two runs at once go on with one result.

        The call itself happens at least once: a crash after it, and before its result is kept, repeats it. Give
        `ctx.idempotency_key(name)` to services that take one.

        Raises what the function raises (nothing is kept then); AlreadyDone (not an Exception) before the call when
        the job is no longer this run's; ConfigurationError, before the call, for a return type that JSON cannot hold
        and for a name used twice; InvalidResult after it for a result that cannot be kept: the job is dead at once,
        since a retry would repeat the call. TransactionUsed inside and after `ctx.complete()`.
        """
        owner = f"task {self.task!r}, ctx.step({name!r})"
        sessions, taken = self._may_step(owner, name)
        codec = codec_of(owner, function)
        taken.add(name)
        try:
            kept = await self._recall(sessions, name)
            if kept is None:
                kept = await self._take(sessions, name, codec, partial(called, function, args, kwargs))
            return codec.decode(kept)
        except InvalidResult as error:
            raise InvalidResult(f"{owner}: {error}") from None
        except BaseException:
            taken.discard(name)  # it was not taken, and the task may try it again
            raise

    def _may_step(self, owner: str, name: str) -> tuple[async_sessionmaker[AsyncSession], set[str]]:
        run = self._run
        refuse_bad_name(f"task {self.task!r}, ctx.step()", name)
        if run.sessions is None:
            raise ConfigurationError(f"task {self.task!r} is a plain function, and ctx.step() needs `async def`")
        if run.completion is not Completion.UNUSED:
            raise TransactionUsed(
                f"{owner}: ctx.complete() finishes the job, and its block may run again without the step's result; "
                "take the step before it"
            )
        if run.steps is None:
            run.steps = set()
        if name in run.steps:
            raise ConfigurationError(
                f"{owner}: this run has taken a step of that name, and would get that one's result; "
                "give each call a name of its own, say f'mail:{order_id}'"
            )
        return run.sessions, run.steps

    async def _take(
        self,
        sessions: async_sessionmaker[AsyncSession],
        name: str,
        codec: ResultCodec,
        call: Callable[[], Awaitable[tuple[Any, asyncio.CancelledError | None]]],
    ) -> str:
        """Make the call and keep its result, also when the run is cancelled meanwhile. Returns what is kept."""
        result, cancelled = await call()
        # Crash here: the call has been made and its result is not kept; the next run makes it again.
        kept, cancelled_again = await to_the_end(
            self._record(sessions, name, codec.encode(result)),
            patience_s=lambda: _PATIENCE_S if self.stopping else None,
        )
        # Crash here: the result is kept, and the next run makes no call.
        if (cancelled := cancelled_again or cancelled) is not None:
            raise cancelled
        return kept

    async def _recall(self, sessions: async_sessionmaker[AsyncSession], name: str) -> str | None:
        """What an earlier run has kept. Nothing has been done yet: without PostgreSQL the job goes back."""
        run, job = self._run, self._job
        try:
            found = await steps.recall(sessions, run.schema, (job.id, job.generation), name)
        except Exception as error:
            await hand_back_if_away(error)
            raise
        if not found.is_current:
            raise AlreadyDone(f"job {job.id} is no longer this run's: completed, cancelled or rescheduled")
        return found.result

    async def _record(self, sessions: async_sessionmaker[AsyncSession], name: str, result: str) -> str:
        """Keep a result, however long PostgreSQL is away: what it stands for has happened. Returns what is kept."""
        is_told = False
        while True:
            try:
                return await steps.record(sessions, self._run.schema, self._job.id, name, result)
            except Exception as error:
                state = getattr(getattr(error, "orig", None), "sqlstate", None) or ""
                if not is_unavailable(error) and not state.startswith(_PASSING):
                    raise
                if not is_told:
                    is_told = True
                    fields = {"job": str(self._job.id), "step": name, "error": f"{type(error).__name__}: {error}"}
                    log.warning("cannot keep the result of a step yet, trying again", extra={"fields": fields})
            await asyncio.sleep(_PAUSE_S)

    def complete(self) -> AbstractAsyncContextManager[AsyncSession]:
        """Finish the job: a session whose COMMIT applies the block's writes and the completion together.

        Use it once, as the last thing in the task. Jobs enqueued with the session belong to the same COMMIT.
        An exception in the block rolls everything back, and the attempt counts as failed.

        Raises AlreadyDone (not an Exception) before the block when the job is no longer this run's, and
        TransactionUsed on a second use. Do not commit or roll back inside.
        """
        return complete(self._job, self._run)
