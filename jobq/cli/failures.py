"""What a failure says on stderr, and the exit code it ends with.

Invariant: whatever a command raises leaves the process as one sentence without secrets and one of the codes
below. Called by the command group, around every command. Calls masking, errors.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import click

from ..errors import ConfigurationError, JobqError, SchemaMismatch
from .masking import mask


class ExitCode(IntEnum):
    """How a jobq process ends."""

    OK = 0
    FAILED = 1
    USAGE = 2
    APP = 3
    UNREACHABLE = 4
    SCHEMA = 5
    FORCED = 6
    INTERRUPTED = 130


class Failure(click.ClickException):
    """A command failed, as its `sentence` says."""

    def __init__(self, sentence: str, code: ExitCode = ExitCode.FAILED):
        super().__init__(mask(sentence))
        self.exit_code = code  # type: ignore[misc]  # click's own failures have one code for each class


class AppImportError(ConfigurationError):
    """The application that was named cannot be imported, or is none."""


POSTGRESQL = "jobq.postgresql"
REDIS = "jobq.redis"
"""Where in `click.Context.meta` the URLs in use are noted, for the sentence of a connection that fails."""

_REMEDIES = {
    POSTGRESQL: ("PostgreSQL", "--database-url or JOBQ_DATABASE_URL"),
    REDIS: ("Redis", "--redis-url or JOBQ_REDIS_URL"),
}
# Connection failures, refused logins, no such database, too many connections, server starting or stopping.
_UNREACHABLE_STATES = ("08", "28", "3D", "53300", "57P")
_LOCK_NOT_AVAILABLE = "55P03"
_REDIS_AWAY = {
    f"redis.exceptions.{name}"
    for name in ("ConnectionError", "TimeoutError", "ReadOnlyError", "ClusterDownError", "TryAgainError")
}


@contextmanager
def failures_explained(ctx: click.Context) -> Iterator[None]:
    """Turn what a command raises into a `Failure`. With JOBQ_DEBUG=1 the traceback comes before it."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        if os.environ.get("JOBQ_DEBUG", "0") not in ("", "0"):
            click.echo(mask(traceback.format_exc()), err=True)
        raise explain(error, ctx.meta) from error


def explain(error: Exception, urls: dict[str, str]) -> Failure:
    """Say what happened and what to do. `urls` is a context's `meta`."""
    if isinstance(error, ExceptionGroup):
        # A task group's first error is the cause; the others were cancelled because of it.
        return explain(error.exceptions[0], urls)
    for kinds, code in (
        (AppImportError, ExitCode.APP),
        (SchemaMismatch, ExitCode.SCHEMA),
        (JobqError, ExitCode.FAILED),
    ):
        if isinstance(error, kinds):
            return Failure(str(error), code)
    store = _unreachable(error)
    if store is not None:
        name, setting = _REMEDIES[store]
        where = f" at {urls[store]}" if store in urls else ""
        remedy = f"check that it runs and that {setting} is right"
        return Failure(f"cannot reach {name}{where}: {_first_line(error)}; {remedy}", ExitCode.UNREACHABLE)
    if sqlstate(error) == _LOCK_NOT_AVAILABLE:
        return Failure("other transactions held a table for too long, so nothing was changed: try again")
    return Failure(f"{type(error).__name__}: {_first_line(error)} (JOBQ_DEBUG=1 shows where)")


def _unreachable(error: Exception) -> str | None:
    """Which store a failed connection was meant for, if `error` is one."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    if kinds & _REDIS_AWAY:
        return REDIS
    if "asyncpg.exceptions._base.TargetServerAttributeNotMatched" in kinds:  # of several hosts none takes writes
        return POSTGRESQL
    if sqlstate(error).startswith(_UNREACHABLE_STATES):
        return POSTGRESQL
    # asyncpg lets the operating system's errors through; those of an application's own files are not meant. A
    # deadline that passed is one of them, for Redis too.
    if isinstance(error, OSError):
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if any(module.startswith("jobq.broker.") for module in modules):
            return REDIS
        if any(module.startswith(("asyncpg.", "jobq.outbox.")) for module in modules):
            return POSTGRESQL
    return None


def sqlstate(error: BaseException) -> str:
    """The five letters of PostgreSQL, through SQLAlchemy or not."""
    return getattr(getattr(error, "orig", error), "sqlstate", None) or ""


def _first_line(error: Exception) -> str:
    # SQLAlchemy's own text carries the statement and its parameters.
    text = str(getattr(error, "orig", error)).strip()
    if not text and isinstance(error, TimeoutError):
        return "no answer in time"
    return text.splitlines()[0] if text else type(error).__name__
