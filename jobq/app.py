"""JobQ: the application's one object, which ties tasks to a database and a Redis.

Invariant: making it and registering tasks opens nothing. Called by applications and the command line. Calls
task and outbox.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Any, Concatenate, overload
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from .context import Context
from .errors import ConfigurationError
from .migrate import checked_schema
from .model import DeadJob, Enqueued, Intent
from .outbox.browse import cancel
from .outbox.database import Database
from .outbox.enqueue import enqueue_many
from .outbox.statement import Transaction
from .outcomes import seconds
from .retry import RetryPolicy
from .task import P, S, T, Task, TaskDecorator

DeadHook = Callable[[AsyncSession, DeadJob], Awaitable[None]]
Lifespan = Callable[[], AbstractAsyncContextManager[Any]]


class JobQ:
    """Tasks, and where their jobs are kept.

    `database` is an AsyncEngine, an async_sessionmaker or a PostgreSQL URL; `redis` a URL. What is left out,
    the command line takes from JOBQ_DATABASE_URL and JOBQ_REDIS_URL. `lifespan` is an async context manager
    function, entered once in each worker process; what it yields is `ctx.state`.
    """

    def __init__(
        self,
        *,
        database: str | AsyncEngine | async_sessionmaker[Any] | None = None,
        redis: str | None = None,
        schema: str = "jobq",
        lifespan: Lifespan | None = None,
    ):
        self.schema = checked_schema(schema)
        self.lifespan = lifespan
        self.tasks: dict[str, Task[..., Any, Any]] = {}
        """Every task by each of its names."""
        self.dead_hooks: list[DeadHook] = []
        self.given_database = database
        self.given_redis = redis
        self._database: Database | None = None

    @overload
    def task(self, function: Callable[Concatenate[Context[S], P], T], /) -> Task[Concatenate[Context[S], P], P, T]: ...

    @overload
    def task(self, function: Callable[P, T], /) -> Task[P, P, T]: ...

    @overload
    def task(
        self,
        *,
        name: str | None = None,
        queue: str = "default",
        retry: RetryPolicy | None = None,
        timeout: float | timedelta | None = None,
        aliases: Iterable[str] = (),
    ) -> TaskDecorator: ...

    def task(  # type: ignore[misc]  # the overloads say what the two forms take
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        queue: str = "default",
        retry: RetryPolicy | None = None,
        timeout: float | timedelta | None = None,
        aliases: Iterable[str] = (),
    ) -> Any:
        """Register a function as a task, as `@jobs.task` or `@jobs.task(queue=..., ...)`.

        The name, the function's own unless given, is what rows carry. Rename a task with `aliases=[old name]`: jobs
        stored under the old name run then. Leave it there while producers of the last release, or jobs of theirs, may
        be about. An idempotency key counts for all of its names. `timeout` bounds one attempt. A first parameter
        annotated `Context` receives the running job's context.
        Raises ConfigurationError.
        """

        def register(function: Callable[..., Any]) -> Task[..., Any, Any]:
            own_name: str = name if name is not None else getattr(function, "__name__", "")
            task: Task[..., Any, Any] = Task(
                function,
                name=own_name,
                schema=self.schema,
                queue=queue,
                retry=_checked_retry(own_name, retry),
                timeout_s=_checked_timeout(own_name, timeout),
                aliases=_checked_aliases(own_name, aliases),
            )
            for known_as in (own_name, *task.aliases):
                if known_as in self.tasks:
                    raise ConfigurationError(_taken(known_as, own_name, self.tasks[known_as].name))
            self.tasks.update(dict.fromkeys((own_name, *task.aliases), task))
            return task

        return register if function is None else register(function)

    def on_dead(self, hook: DeadHook) -> DeadHook:
        """Call `hook(session, job)` in the transaction that moves a job to the dead.

        What it writes or enqueues with the session happens exactly once. If it raises, the job is buried
        without it and the error is logged.
        """
        if not inspect.iscoroutinefunction(hook):
            raise ConfigurationError("@jobs.on_dead takes an async function of (session, job)")
        self.dead_hooks.append(hook)
        return hook

    async def enqueue_many(self, tx: Transaction, intents: Iterable[Intent], /) -> list[Enqueued]:
        """Write many jobs in one statement; takes what `task.job(...)` makes. Answers keep the order.

        Raises InvalidArguments or NotInTransaction, with nothing written and the transaction still usable.
        """
        if isinstance(intents, Intent):  # a tuple too, so that its fields would be taken for intents
            raise TypeError("'Intent' object is not iterable")
        return await enqueue_many(tx, list(intents), schema=self.schema)

    async def cancel(self, tx: Transaction, job_id: UUID, /) -> bool:
        """Delete a job that is not done: it starts no more once this transaction commits. False: it is gone.

        A run that is under way goes on, but its `ctx.complete()` raises AlreadyDone.
        """
        return await cancel(tx, self.schema, job_id)

    def check(self) -> None:
        """Resolve every task's annotations, as a worker does at its start. Raises ConfigurationError."""
        for task in self.tasks.values():
            _ = task.codec

    @property
    def database(self) -> Database:
        """The database given, or learnt from the command line. Raises ConfigurationError if there is none."""
        if self._database is None:
            if self.given_database is None:
                raise ConfigurationError("no database: give JobQ(database=...) or set JOBQ_DATABASE_URL")
            self._database = Database.of(self.given_database)
        return self._database

    @property
    def redis_url(self) -> str:
        """The Redis URL given, or learnt from the command line. Raises ConfigurationError if there is none."""
        if self.given_redis is None:
            raise ConfigurationError("no Redis: give JobQ(redis=...) or set JOBQ_REDIS_URL")
        return self.given_redis

    def connect_to(self, *, database: str | None = None, redis: str | None = None) -> None:
        """Fill in what the code left out. What it gave wins."""
        self.given_database = self.given_database if self.given_database is not None else database
        self.given_redis = self.given_redis if self.given_redis is not None else redis

    def __repr__(self) -> str:
        return f"<JobQ {len(self.tasks)} tasks, schema {self.schema!r}>"


def _checked_aliases(name: str, aliases: Iterable[str]) -> tuple[str, ...]:
    if isinstance(aliases, str):
        raise ConfigurationError(f"task {name!r}: aliases is a list of names: aliases=[{aliases!r}]")
    found = tuple(aliases)
    if name in found or len(set(found)) < len(found):
        raise ConfigurationError(f"task {name!r}: name each of its former names in aliases once, and not its own")
    return found


def _taken(known_as: str, newcomer: str, holder: str) -> str:
    if known_as == newcomer == holder:
        return f"two tasks are named {known_as!r}: give one of them name='...'"
    return (
        f"task {newcomer!r} cannot be known as {known_as!r}: that is "
        f"{'the name of another task' if known_as == holder else f'an alias of task {holder!r}'}"
    )


def _checked_retry(name: str, retry: object) -> RetryPolicy:
    if retry is None:
        return RetryPolicy()
    if not isinstance(retry, RetryPolicy):
        remedy = "such as RetryPolicy(max_attempts=3)"
        raise ConfigurationError(f"task {name!r}: retry is a RetryPolicy, {remedy}, not {type(retry).__name__}")
    return retry


def _checked_timeout(name: str, timeout: float | timedelta | None) -> float | None:
    if timeout is None:
        return None
    try:
        found = seconds(timeout, "timeout")
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"task {name!r}: {error}") from None
    if found <= 0:
        raise ConfigurationError(f"task {name!r}: timeout must be more than 0 seconds")
    return found
