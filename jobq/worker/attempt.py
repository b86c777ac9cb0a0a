"""One record per attempt, and its first listener: the log.

Called by executor. Calls nothing.
"""

from __future__ import annotations

import logging
import traceback
from types import TracebackType
from typing import NamedTuple

from ..model import Job

log = logging.getLogger(__name__)


class Attempt(NamedTuple):
    """How one run of a job ended."""

    job: Job
    outcome: str
    """`done`, `retried`, `snoozed`, `dead`, `interrupted`, `handed back`, `already done`, `lost` or
    `failed after completion`."""
    duration_s: float
    max_attempts: int
    error: BaseException | None = None
    delay_s: float | None = None
    """Until the next attempt, if there is one."""


_LEVELS = {"retried": logging.WARNING, "dead": logging.ERROR, "failed after completion": logging.ERROR}


def log_attempt(attempt: Attempt) -> None:
    """One line per attempt. Never the arguments."""
    level = _LEVELS.get(attempt.outcome, logging.INFO)
    if not log.isEnabledFor(level):
        return
    job, error = attempt.job, attempt.error
    fields: dict[str, object] = {
        "job": str(job.id),
        "task": job.task,
        "queue": job.queue,
        "attempt": f"{job.attempts + 1}/{attempt.max_attempts}",
        "ms": round(attempt.duration_s * 1000, 1),
    }
    if error is not None:
        fields["error"] = "".join(traceback.format_exception_only(error)).strip()
    if attempt.delay_s is not None:
        fields["next_in_s"] = round(attempt.delay_s, 1)
    trace = exc_info_from_task(error) if error is not None and attempt.outcome in _LEVELS else None
    log.log(level, "job %s", attempt.outcome, extra={"fields": fields}, exc_info=trace)


def exc_info_from_task(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """The error with its traceback from the task on: the worker's own frames tell a reader nothing."""
    trace = error.__traceback__
    while (
        trace is not None and trace.tb_next is not None and trace.tb_frame.f_globals.get("__package__") == __package__
    ):
        trace = trace.tb_next
    return type(error), error, trace
