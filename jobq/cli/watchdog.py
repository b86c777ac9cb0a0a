"""The watchdog: ends a process that takes no turns any more, so that its supervisor starts another.

Invariant: it needs neither the event loop nor the log to get through. Called by serving. Calls health.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..health import Part, Pulse
from .failures import ExitCode

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_REPORT_WAIT_S = 5.0


class Watchdog:
    """Judges pulses. One is frozen when two looks in a row find it so, at the same tick.

    The first look after the whole process was stopped, or the machine slept, comes before any loop could turn.
    """

    def __init__(self, pulses: Sequence[Pulse]):
        self._pulses = pulses
        self._suspected: dict[Pulse, float | None] = {}

    def look(self) -> Pulse | None:
        """Return a pulse that is frozen, if there is one."""
        before = self._suspected
        self._suspected = {pulse: pulse.ticked_at for pulse in self._pulses if pulse.is_frozen}
        return next((pulse for pulse, at in self._suspected.items() if pulse in before and before[pulse] == at), None)


@contextmanager
def watched(parts: Sequence[Part], *, end: Callable[[int], None] = os._exit) -> Iterator[None]:
    """End the process while the block lasts, once a part has taken no turn for its `frozen_after`.

    What the process held is swept by other workers. `end` gets the exit code, from the watchdog's thread.
    """
    stopping = threading.Event()
    pulses = [part.pulse for part in parts]
    wait_s = min([_LOOK_S, *(pulse.frozen_after_s / 4 for pulse in pulses)])
    watchdog = Watchdog(pulses)

    def watch() -> None:
        while not stopping.wait(wait_s):
            if (frozen := watchdog.look()) is not None:
                # In a thread of its own: what blocks the loop may be the log, and hold its lock.
                report = threading.Thread(target=_report, args=(frozen,), name="jobq last words", daemon=True)
                report.start()
                report.join(_REPORT_WAIT_S)
                end(ExitCode.FORCED)
                return

    threading.Thread(target=watch, name="jobq watchdog", daemon=True).start()
    try:
        yield
    finally:
        stopping.set()


def _report(pulse: Pulse) -> None:
    fields = {"part": pulse.part, "still_s": round(pulse.still_s, 1), "stack": pulse.stacks()}
    log.critical("frozen: no turn was taken for too long, the process ends", extra={"fields": fields})
    logging.shutdown()
