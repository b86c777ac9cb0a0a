"""A task: a function that can be enqueued, and still be called.

Invariant: arguments are checked against the function's own annotations before anything is written. Called by
applications, app and the executor. Calls outbox.enqueue and codec.
"""

from __future__ import annotations

import copy
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Concatenate, Generic, Protocol, TypeVar, overload

from sqlalchemy import TextualSelect
from typing_extensions import ParamSpec

from .annotations import resolved
from .codec import ArgumentCodec, to_json
from .context import Context
from .errors import ConfigurationError, InvalidArguments, JobqError
from .model import PRIORITIES, Enqueued, Intent
from .outbox.enqueue import enqueue, require_kind
from .outbox.insert import Query, as_insert, as_sql
from .outbox.statement import Transaction
from .outcomes import seconds
from .retry import RetryPolicy, is_attempt_limit
from .tracing import outgoing

Q = ParamSpec("Q")
P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

QUEUE_NAME = re.compile(r"[a-z0-9_.-]{1,64}")
_LONGEST_KEY = 500
_LONGEST_NAME = 128
"""Both together must fit an entry of a PostgreSQL index, 2,704 bytes at four a character."""
_LONGEST_DELAY_S = 100 * 365 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `.opts()` sets for the jobs enqueued through it."""

    queue: str | None = None
    priority: int = 2
    delay_s: float | None = None
    run_at: datetime | None = None
    max_attempts: int | None = None
    timeout_s: float | None = None
    idempotency_key: str | None = None
    idempotency_ttl_s: float = 86_400.0
    headers: str | None = None


class Task(Generic[Q, P, T]):
    """A function registered with `JobQ.task`.

    1. called, it is the function: `await send_receipt(ctx, 7)`;
    2. `enqueue` writes one job for it into the caller's transaction, and `insert` and `sql` are that as a
       statement, for synchronous drivers;
    3. `opts` gives the same task with other options; `job` makes an intent for `enqueue_many`.
    """

    def __init__(
        self,
        function: Callable[Q, T],
        *,
        name: str,
        schema: str,
        queue: str,
        retry: RetryPolicy,
        timeout_s: float | None,
        aliases: tuple[str, ...],
    ):
        self.function = function
        self.name = name
        self.queue = queue
        self.retry = retry
        self.timeout_s = timeout_s
        self.aliases = aliases
        self.is_async = inspect.iscoroutinefunction(function)
        self._schema = schema
        self._options = Options()
        self._registered = self
        self._signature = inspect.signature(function)
        for known_as in (name, *aliases):
            _refuse_bad_name(known_as)
        _refuse_generator(name, function)
        _refuse_odd_parameters(name, self._signature)
        _refuse_bad_queue(f"task {name!r}", queue, ConfigurationError)
        self.__name__ = getattr(function, "__name__", name)
        self.__qualname__ = getattr(function, "__qualname__", name)
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__wrapped__ = function

    def __call__(self, *args: Q.args, **kwargs: Q.kwargs) -> T:
        """Call the function itself: for tests, and for one task that uses another."""
        return self.function(*args, **kwargs)

    async def enqueue(self, tx: Transaction, /, *args: P.args, **kwargs: P.kwargs) -> Enqueued:
        """Write one job into the caller's transaction: it runs after the commit, and never if that fails.

        Raises InvalidArguments or NotInTransaction, with nothing written and the transaction still usable.
        """
        try:
            intent = self.job(*args, **kwargs)
        except InvalidArguments:
            require_kind(tx)  # the transaction was forgotten: its place was taken by an argument, which now is missing
            raise
        return await enqueue(tx, intent, schema=self._schema)

    def insert(self, *args: P.args, **kwargs: P.kwargs) -> TextualSelect:
        """Return the enqueue of one job as a statement: `session.execute(task.insert(7)).one()`, any SQLAlchemy.

        The row is `(id, created)`. It joins whatever transaction executes it, which jobq cannot see from here:
        on a connection in AUTOCOMMIT the job is committed at once. Make a statement for each job and execute it
        once: the id is in it. Raises InvalidArguments.
        """
        return as_insert(self.job(*args, **kwargs), schema=self._schema)

    def sql(self, *args: P.args, **kwargs: P.kwargs) -> Query:
        """Return the enqueue of one job as (query, parameters): `cursor.execute(*task.sql(7))`, psycopg or Django.

        `cursor.fetchone()` is then `(id, created)`. It joins whatever transaction executes it, which jobq cannot
        see from here: in autocommit, Django's default outside `atomic()`, the job is committed at once. Make a
        query for each job and execute it once: the id is in it. Raises InvalidArguments.
        """
        return as_sql(self.job(*args, **kwargs), schema=self._schema)

    def job(self, *args: P.args, **kwargs: P.kwargs) -> Intent:
        """Check a call's arguments and make an intent of it, for `JobQ.enqueue_many`. Writes nothing."""
        options = self._options
        return Intent(
            task=self.name,
            queue=options.queue or self.queue,
            args=self.codec.encode(args, kwargs),
            priority=options.priority,
            delay_s=options.delay_s,
            run_at=options.run_at,
            max_attempts=options.max_attempts,
            timeout_s=options.timeout_s,
            idempotency_key=options.idempotency_key,
            idempotency_ttl_s=options.idempotency_ttl_s,
            headers=outgoing(options.headers),
            former_names=self.aliases,
        )

    def opts(
        self,
        *,
        delay: float | timedelta | None = None,
        run_at: datetime | None = None,
        priority: int | None = None,
        queue: str | None = None,
        max_attempts: int | None = None,
        timeout: float | timedelta | None = None,
        idempotency_key: str | None = None,
        idempotency_ttl: float | timedelta | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Task[Q, P, T]:
        """The same task with other options for the jobs enqueued through the result.

        Durations are float seconds or timedelta; `run_at` has a time zone. `priority` is 1 (first) to 4.
        Twice with one `idempotency_key` makes one job: the second call gets the first one's id, also after
        that job is done, until `idempotency_ttl` (24 h) has passed. Raises InvalidArguments.
        """
        changes: dict[str, Any] = {
            "delay_s": None if delay is None else _duration(self.name, "delay", delay),
            "run_at": _checked_time(self.name, run_at),
            "priority": priority,
            "queue": queue,
            "max_attempts": max_attempts,
            "timeout_s": None if timeout is None else _duration(self.name, "timeout", timeout),
            "idempotency_key": idempotency_key,
            "idempotency_ttl_s": None
            if idempotency_ttl is None
            else _duration(self.name, "idempotency_ttl", idempotency_ttl),
            "headers": None if headers is None else _headers_json(self.name, headers),
        }
        options = replace(self._options, **{name: value for name, value in changes.items() if value is not None})
        _refuse_bad_options(self.name, options)
        task = copy.copy(self)
        task._options = options
        return task

    @property
    def codec(self) -> ArgumentCodec:
        """Built at first use, when the annotations can be resolved. Raises ConfigurationError."""
        return self._registered._codec  # that of the task itself, not one for every result of opts()

    @cached_property
    def _codec(self) -> ArgumentCodec:
        parameters = dict(self._signature.parameters)
        if self.takes_context:
            parameters.pop(next(iter(parameters)))
        return ArgumentCodec(self.name, parameters, self._hints)

    @cached_property
    def takes_context(self) -> bool:
        """Whether the first parameter is annotated `Context`. Raises ConfigurationError if another one is."""
        contexts = [name for name, hint in self._hints.items() if hint is Context or typing.get_origin(hint) is Context]
        first = next(iter(self._signature.parameters.values()), None)
        if contexts and (first is None or contexts != [first.name] or first.kind is first.KEYWORD_ONLY):
            raise ConfigurationError(
                f"task {self.name!r}: parameter {contexts[-1]!r} is a Context, which must be the first parameter and "
                f"not keyword-only: def {self.__name__}({contexts[-1]}: Context, ...)"
            )
        return bool(contexts)

    @cached_property
    def _hints(self) -> dict[str, Any]:
        function = inspect.unwrap(self.function)
        try:
            annotations = dict(inspect.get_annotations(function))
            annotations.pop("return", None)
            return resolved(function, annotations)
        except (NameError, TypeError, SyntaxError) as error:
            raise ConfigurationError(
                f"task {self.name!r}: its annotations cannot be resolved ({error}); "
                "define or import the names at module level, outside `if TYPE_CHECKING:`"
            ) from error

    def __repr__(self) -> str:
        return f"<Task {self.name!r} queue={self.queue!r}>"


class TaskDecorator(Protocol):
    """What `@jobs.task(...)` is: it makes a Task of a function, with or without a Context in front."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[Context[S], P], T], /
    ) -> Task[Concatenate[Context[S], P], P, T]: ...

    @overload
    def __call__(self, function: Callable[P, T], /) -> Task[P, P, T]: ...


def _refuse_bad_name(name: str) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise ConfigurationError(f"task {name!r}: a name is 1 to {_LONGEST_NAME} printable characters; give name='...'")


def _refuse_generator(name: str, function: Callable[..., Any]) -> None:
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(f"task {name!r}: calling a generator function runs nothing; remove its `yield`")


def _refuse_odd_parameters(name: str, signature: inspect.Signature) -> None:
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigurationError(
                f"task {name!r}: parameter {parameter} cannot be kept by name; "
                "give each argument a name of its own, without *, ** or /"
            )


def _refuse_bad_queue(owner: str, queue: str, error: type[JobqError]) -> None:
    if not isinstance(queue, str) or not QUEUE_NAME.fullmatch(queue):
        raise error(f"{owner}: queue {queue!r} must be 1 to 64 characters of a-z, 0-9, underscore, dot and hyphen")


def _refuse_bad_options(name: str, options: Options) -> None:
    owner = f"{name}.opts()"
    if options.queue is not None:
        _refuse_bad_queue(owner, options.queue, InvalidArguments)
    if type(options.priority) is not int or options.priority not in PRIORITIES:
        raise InvalidArguments(f"{owner}: priority is 1 (first) to 4, not {options.priority!r}")
    if options.delay_s is not None and options.run_at is not None:
        raise InvalidArguments(f"{owner}: give delay or run_at, not both")
    if options.max_attempts is not None and not is_attempt_limit(options.max_attempts):
        raise InvalidArguments(f"{owner}: max_attempts is 1 to 32767, not {options.max_attempts!r}")
    if options.timeout_s is not None and options.timeout_s <= 0:
        raise InvalidArguments(f"{owner}: timeout must be more than 0 seconds")
    key = options.idempotency_key
    if key is not None and (not isinstance(key, str) or not 0 < len(key) <= _LONGEST_KEY or not key.isprintable()):
        raise InvalidArguments(f"{owner}: idempotency_key is a string of 1 to {_LONGEST_KEY} printable characters")


def _duration(name: str, option: str, value: float | timedelta) -> float:
    try:
        found = seconds(value, option)
    except (TypeError, ValueError) as error:
        raise InvalidArguments(f"{name}.opts(): {error}") from None
    if found > _LONGEST_DELAY_S:
        raise InvalidArguments(f"{name}.opts(): {option} is more than 100 years")
    return found


def _checked_time(name: str, value: datetime | None) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, datetime) or value.utcoffset() is None:
        raise InvalidArguments(f"{name}.opts(): run_at is a datetime with a time zone, not {value!r}")
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise InvalidArguments(f"{name}.opts(): run_at is outside the years 1 to 9999 UTC") from None


def _headers_json(name: str, headers: Mapping[str, str]) -> str:
    if not isinstance(headers, Mapping) or not all(
        type(key) is str and type(value) is str for key, value in headers.items()
    ):
        raise InvalidArguments(f"{name}.opts(): headers map strings to strings")
    return to_json(f"{name}.opts(headers=...)", dict(headers))
