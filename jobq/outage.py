"""How long a store has been away, and when to try it again.

Invariant: one WARNING when an outage begins and one, with its length, when it ends, however often it is noticed.
No I/O. Called by relay, worker and health.
"""

from __future__ import annotations

import logging
import random
import time

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


class Outage:
    """The outages of one store, as one part of a process sees them."""

    def __init__(self, store: str, part: str):
        self._fields = {"store": store, "part": part}
        self._since: float | None = None
        self._next_try = 0.0
        self._pause = _FIRST_PAUSE_S

    @property
    def is_waiting(self) -> bool:
        """Whether it failed last time, and it is not yet time to try again."""
        return self._since is not None and time.monotonic() < self._next_try

    @property
    def away_s(self) -> float:
        """Seconds since it began to fail; 0 when it answered last."""
        since = self._since
        return 0.0 if since is None else max(time.monotonic() - since, 1e-9)

    def begin(self, error: BaseException) -> float:
        """Note a failure; returns the seconds to wait before the next try, longer each time."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            problem = f"{type(error).__name__}: {error}"
            log.warning("store away", extra={"fields": {**self._fields, "error": problem}})
        pause = self._pause * random.uniform(0.5, 1.0)  # noqa: S311  spreads the processes that wait
        self._next_try = now + pause
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_S)
        return pause

    def end(self) -> None:
        """Note a success."""
        if self._since is None:
            return
        away_s = round(time.monotonic() - self._since, 1)
        log.warning("store back", extra={"fields": {**self._fields, "away_s": away_s}})
        self._since = None
        self._pause = _FIRST_PAUSE_S
