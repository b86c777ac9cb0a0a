"""When a failed job runs again. Pure: the same policy object serves every run of a task."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .errors import ConfigurationError

LONGEST_DELAY_S = 365 * 86_400.0


def is_attempt_limit(value: object) -> bool:
    """Whether `value` can be a number of attempts: PostgreSQL keeps it in a smallint."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 32_767


def default_delay(attempt: int, error: BaseException) -> float:
    """Seconds until the next attempt: attempt**4 + 15, a tenth more or less. 25 attempts take about 20 days.

    `attempt` is the number of the attempt that failed, from 1. The spread keeps jobs that failed together
    from coming back together.
    """
    return (attempt**4 + 15) * random.uniform(0.9, 1.1)  # noqa: S311


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a task is attempted, and how long it waits in between.

    `delay(attempt, error)` returns seconds. An error that is an instance of one of `never` ends the job at
    once, as `raise Reject(...)` would; a group does that holds nothing else.
    """

    max_attempts: int = 25
    delay: Callable[[int, BaseException], float] = default_delay
    never: tuple[type[Exception], ...] = ()

    def __post_init__(self) -> None:
        if not is_attempt_limit(self.max_attempts):
            raise ConfigurationError(f"RetryPolicy(max_attempts={self.max_attempts!r}) must be an int of 1 to 32767")
        if not callable(self.delay):
            raise ConfigurationError("RetryPolicy(delay=...) takes a function of (attempt, error)")
        if not isinstance(self.never, tuple) or not all(
            isinstance(kind, type) and issubclass(kind, Exception) for kind in self.never
        ):
            raise ConfigurationError("RetryPolicy(never=...) takes a tuple of exception classes")

    def verdict(
        self, attempt: int, max_attempts: int, error: BaseException
    ) -> float | Literal["rejected", "exhausted"]:
        """Seconds until the next attempt after attempt number `attempt` failed, or why there is none."""
        if isinstance(error, self.never) or _holds_only(error, self.never):
            return "rejected"
        if attempt >= max_attempts:
            return "exhausted"
        delay = float(self.delay(attempt, error))
        if math.isnan(delay):
            raise ValueError("a retry policy's delay() returned NaN")
        return min(max(delay, 0.0), LONGEST_DELAY_S)


def _holds_only(error: BaseException, kinds: tuple[type[Exception], ...]) -> bool:
    return isinstance(error, BaseExceptionGroup) and error.split(kinds)[1] is None
