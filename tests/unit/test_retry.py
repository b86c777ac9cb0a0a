"""When a failed job runs again."""

from __future__ import annotations

import asyncio
import math
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobq import ConfigurationError, Reject, Retry, RetryPolicy, Snooze
from jobq.retry import LONGEST_DELAY_S, default_delay

ERROR = OSError("mail server is away")


@pytest.mark.parametrize("attempt", range(1, 26))
def test_the_default_delay_is_the_fourth_power_and_15_s_a_tenth_more_or_less(attempt):
    middle = attempt**4 + 15

    delays = [default_delay(attempt, ERROR) for _ in range(200)]

    assert all(middle * 0.9 <= delay <= middle * 1.1 for delay in delays)
    assert max(delays) - min(delays) > middle * 0.1, "jobs that failed together come back together"


def test_the_default_attempts_take_about_20_days():
    total = timedelta(seconds=sum(attempt**4 + 15 for attempt in range(1, RetryPolicy().max_attempts)))

    assert timedelta(days=19) < total < timedelta(days=22)


def test_a_failed_attempt_comes_again_until_the_last_one():
    policy = RetryPolicy(max_attempts=3, delay=lambda attempt, error: attempt * 10)

    assert [policy.verdict(attempt, 3, ERROR) for attempt in (1, 2, 3, 4)] == [10.0, 20.0, "exhausted", "exhausted"]


def test_the_jobs_own_limit_counts_and_not_the_policys():
    policy = RetryPolicy(max_attempts=3, delay=lambda attempt, error: 1)

    assert policy.verdict(3, 5, ERROR) == 1.0
    assert policy.verdict(1, 1, ERROR) == "exhausted"


def test_the_delay_is_told_the_attempt_and_the_error():
    seen: list[Any] = []
    policy = RetryPolicy(delay=lambda attempt, error: seen.append((attempt, error)) or 1)

    policy.verdict(4, 25, ERROR)

    assert seen == [(4, ERROR)]


def test_an_error_that_is_never_retried_rejects_the_job_whatever_attempts_are_left():
    policy = RetryPolicy(never=(LookupError,))

    assert policy.verdict(1, 25, KeyError("a subclass")) == "rejected"
    assert policy.verdict(25, 25, KeyError()) == "rejected"
    assert policy.verdict(1, 25, ERROR) != "rejected"


@pytest.mark.parametrize(
    ("group", "is_rejected"),
    [
        (ExceptionGroup("one", [KeyError()]), True),
        (ExceptionGroup("two", [KeyError(), ExceptionGroup("inner", [IndexError()])]), True),
        (ExceptionGroup("beside another", [KeyError(), ERROR]), False),
        (BaseExceptionGroup("beside a cancellation", [KeyError(), asyncio.CancelledError()]), False),
    ],
    ids=lambda value: value.message if isinstance(value, BaseExceptionGroup) else "",
)
def test_a_group_is_never_retried_when_it_holds_nothing_else(group: BaseException, is_rejected: bool):
    assert (RetryPolicy(never=(LookupError,)).verdict(1, 25, group) == "rejected") is is_rejected
    assert RetryPolicy().verdict(1, 25, group) != "rejected"


@given(st.floats(allow_nan=False))
def test_any_delay_is_brought_between_now_and_a_year(delay):
    policy = RetryPolicy(delay=lambda attempt, error: delay)

    found = policy.verdict(1, 25, ERROR)

    assert isinstance(found, float)
    assert 0 <= found <= LONGEST_DELAY_S
    assert found == delay or not 0 <= delay <= LONGEST_DELAY_S


def test_a_delay_that_is_no_number_is_an_error():
    with pytest.raises(ValueError, match="NaN"):
        RetryPolicy(delay=lambda attempt, error: math.nan).verdict(1, 25, ERROR)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"max_attempts": 32_768},
        {"max_attempts": "3"},
        {"max_attempts": 2.0},
        {"max_attempts": True},
        {"delay": 5},
        {"never": ValueError},
        {"never": (ValueError(),)},
        {"never": (KeyboardInterrupt,)},
    ],
    ids=str,
)
def test_a_wrong_policy_is_refused_where_it_is_made(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        RetryPolicy(**wrong)


def test_a_policy_cannot_be_changed():
    with pytest.raises(AttributeError):
        RetryPolicy().max_attempts = 3  # type: ignore[misc]


# Outcomes


def test_outcomes_take_float_seconds_or_a_timedelta():
    assert Retry(delay=2.5).delay_s == 2.5
    assert Retry(delay=timedelta(minutes=1)).delay_s == 60.0
    assert Retry("the service is busy").delay_s is None
    assert Snooze(timedelta(hours=1)).delay_s == 3600.0
    assert Snooze(0).delay_s == 0.0
    assert str(Reject("no such address")) == "no such address"


@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf, 10**400, "5", True, [1]], ids=lambda value: str(value)[:10])
def test_outcomes_refuse_what_is_no_duration(wrong):
    with pytest.raises((ValueError, TypeError), match="delay"):
        Retry(delay=wrong)
    with pytest.raises((ValueError, TypeError), match="delay"):
        Snooze(wrong)


def test_outcomes_are_no_errors_of_jobq():
    from jobq import JobqError

    assert not any(issubclass(outcome, JobqError) for outcome in (Retry, Reject, Snooze))
