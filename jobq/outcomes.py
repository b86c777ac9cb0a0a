"""What a task raises to steer its own end. Control flow, not errors: none of them derives from JobqError."""

from __future__ import annotations

import math
from datetime import timedelta


def seconds(value: float | timedelta, name: str) -> float:
    """Turn a public duration (float seconds or timedelta) into float seconds, refusing what is none."""
    if not isinstance(value, (int, float, timedelta)) or isinstance(value, bool):
        raise TypeError(f"{name} is float seconds or a timedelta, not {type(value).__name__}")
    try:
        number = value.total_seconds() if isinstance(value, timedelta) else float(value)
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} is a duration of 0 seconds or more, not {value!r}")
    return number


class Retry(Exception):
    """End this attempt as failed and run the job again, after `delay` if given, else as the policy says.

    Uses up one attempt: after the last one the job is dead with reason `exhausted`.
    """

    def __init__(self, reason: str = "the task asked for a retry", *, delay: float | timedelta | None = None):
        super().__init__(reason)
        self.delay_s = None if delay is None else seconds(delay, "Retry(delay=...)")


class Reject(Exception):
    """End the job: dead at once with reason `rejected`, whatever attempts are left."""


class Snooze(Exception):
    """Run the job again after `delay`. Uses up no attempt."""

    def __init__(self, delay: float | timedelta):
        super().__init__(f"snoozed for {delay}")
        self.delay_s = seconds(delay, "Snooze(delay)")
