"""Outages: one warning each way, and longer and longer pauses."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from jobq import outage
from jobq.outage import Outage


class Clock:
    """A monotonic clock that stands until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(outage, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_store_that_never_failed_is_not_waited_for(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    store = Outage("redis", "relay")
    store.end()
    assert not store.is_waiting
    assert caplog.records == []


def test_pauses_double_up_to_two_seconds_and_spread(clock: Clock) -> None:
    store = Outage("redis", "relay")
    pauses = [store.begin(OSError()) for _ in range(12)]
    longest = [min(0.05 * 2**n, 2.0) for n in range(12)]
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))


def test_the_next_try_is_made_when_the_pause_is_over(clock: Clock) -> None:
    store = Outage("redis", "relay")
    pause = store.begin(OSError())
    assert store.is_waiting
    clock.now += pause
    assert not store.is_waiting


def test_a_success_ends_the_outage_and_starts_with_short_pauses_again(clock: Clock) -> None:
    store = Outage("redis", "relay")
    for _ in range(10):
        store.begin(OSError())
    store.end()
    assert not store.is_waiting
    assert store.begin(OSError()) <= 0.05


def test_an_outage_is_told_once_when_it_begins_and_once_with_its_length_when_it_ends(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    store = Outage("postgresql", "settler")
    for _ in range(3):
        store.begin(OSError("no route"))
    clock.now += 12.34
    store.end()
    store.end()

    away, back = caplog.records
    assert (away.levelno, back.levelno) == (logging.WARNING, logging.WARNING)
    assert (away.getMessage(), back.getMessage()) == ("store away", "store back")
    assert away.__dict__["fields"] == {"store": "postgresql", "part": "settler", "error": "OSError: no route"}
    assert back.__dict__["fields"] == {"store": "postgresql", "part": "settler", "away_s": 12.3}
