"""`jobq worker --processes N`: keeps N worker processes running.

Run as a script, by path, with the standard library only: the supervisor takes a tenth of a worker's memory, and has
nothing to lose. Invariant: what it started ends with it, since each child's line does, SIGKILL included.

    supervisor.py COUNT LOG_FORMAT LOG_LEVEL COMMAND [ARGUMENT ...]

Called by run, which becomes it. Calls children and logs.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":
    # The packages, without what their __init__ loads.
    __package__ = "jobq.cli.processes"
    for _level, _name in enumerate(("jobq.cli.processes", "jobq.cli", "jobq")):
        sys.modules[_name] = ModuleType(_name)
        sys.modules[_name].__path__ = [str(Path(__file__).parents[_level])]

from .. import logs
from .children import Child, environment, exit_code, said
from .supervised import HURRY, QUIET, STOP

log = logging.getLogger("jobq.cli.processes.supervisor")

_LOOK_UP_S = 1.0
_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 30.0
_FORGIVEN_AFTER_S = 60.0
_PERMANENT = (2, 3, 5)
"""Wrong usage, no application, tables of another release: starting again does not help."""
_FORCED, _INTERRUPTED = 6, 130


class _Slot:
    """The place of one process."""

    def __init__(self) -> None:
        self.child: Child | None = None
        self.retired: Child | None = None
        """Recycles: it ends its last jobs while another serves in its place."""
        self.failures = 0
        self.due_at = 0.0

    def fail(self, lived_s: float) -> float:
        """Note an early end; returns the seconds until the next start."""
        self.failures = 1 if lived_s >= _FORGIVEN_AFTER_S else self.failures + 1
        delay_s: float = min(_FIRST_DELAY_S * 2 ** (self.failures - 1), _LONGEST_DELAY_S)
        self.due_at = time.monotonic() + delay_s
        return delay_s


class Supervisor:
    """Keeps `count` processes of one command running.

    1. One process starts alone. If it ends before it serves, all ends with its code, as without a supervisor.
    2. Then each is started again when it dies, after 1, 2, 4 ... 30 s, and at once when it has recycled.
    3. Told to stop, or when one ends with an error that stays: all are told, and the worst of their codes is `code`.
    """

    def __init__(self, command: Sequence[str], count: int):
        self.code: int | None = None
        """What to end with, once all have ended."""
        self._command = command
        self._slots = [_Slot() for _ in range(count)]
        self._has_served = False
        self._is_quiet = False
        self._is_stopping = False
        self._codes = [0]
        self._told_to_stop = 0

    @property
    def children(self) -> Iterator[Child]:
        for slot in self._slots:
            yield from filter(None, (slot.retired, slot.child))

    def step(self) -> None:
        """Look after every process once."""
        for slot in self._slots:
            self._attend(slot)
        if self._is_stopping and not any(self.children):
            self.code = max(self._codes)
            log.info("supervisor stopped", extra={"fields": {"code": self.code}})
        for slot in self._slots if self._has_served else self._slots[:1]:
            if slot.child is None and time.monotonic() >= slot.due_at and not (self._is_stopping or self._is_quiet):
                self._start(slot)

    def due_in_s(self) -> float:
        """Seconds until a step is worth while, if nothing is heard before."""
        waiting = [slot.due_at - time.monotonic() for slot in self._slots if slot.child is None]
        return max(0.0, min([_LOOK_UP_S, *(due_in for due_in in waiting if due_in > 0)]))

    def tell(self, number: int) -> None:
        """Hand a signal on: TSTP is quiet; the first TERM or INT stops, the second hurries, the third kills."""
        if number == signal.SIGTSTP:
            log.info("supervisor quiet", extra={"fields": {"processes": len(list(self.children))}})
            self._is_quiet = True
            self._order(QUIET)
            return
        self._told_to_stop += 1
        if self._told_to_stop == 1:
            self._stop()
            return
        self._codes.append(_INTERRUPTED if number == signal.SIGINT else _FORCED)
        if self._told_to_stop > 2:
            log.warning("supervisor kills what still runs", extra={"fields": {"processes": len(list(self.children))}})
            for child in self.children:
                child.kill()
            return
        log.warning("supervisor has everything handed back at once")
        self._order(HURRY)

    def _start(self, slot: _Slot) -> None:
        try:
            slot.child = Child(self._command, environment())
        except OSError as error:
            fields = {"error": error, "next_in_s": slot.fail(0)}
            log.error("process could not be started, trying again", extra={"fields": fields})  # noqa: TRY400
        else:
            log.info("process started", extra={"fields": {"process": slot.child.pid}})

    def _attend(self, slot: _Slot) -> None:
        for child in filter(None, (slot.retired, slot.child)):
            code = child.code
            child.hear()  # after the code: what it said before its end is there by now
            self._has_served |= child.is_ready
            if code is not None:
                self._end(slot, child, code)
        if slot.child is not None and slot.child.is_recycling and slot.retired is None:
            slot.retired, slot.child = slot.child, None

    def _end(self, slot: _Slot, child: Child, code: int) -> None:
        child.forget()
        lived_s = time.monotonic() - child.started_at
        fields: dict[str, object] = {"process": child.pid, **said(code), "lived_s": round(lived_s)}
        if child is slot.retired:
            slot.retired = None
        else:
            slot.child = None
        if self._is_stopping:
            was_ended = not child.is_ready and code == -signal.SIGTERM
            self._codes.append(0 if was_ended else exit_code(code))
            log.info("process stopped", extra={"fields": fields})
        elif code in _PERMANENT or not self._has_served:
            log.error("process cannot serve, so all stop", extra={"fields": fields})
            self._codes.append(exit_code(code))
            self._stop()
        elif child.is_recycling or (code == 0 and child.is_ready):
            log.log(logging.WARNING if code else logging.INFO, "process has ended", extra={"fields": fields})
        elif self._is_quiet:
            log.warning("process died, and none starts while quiet", extra={"fields": fields})
        else:
            fields["next_in_s"] = slot.fail(lived_s)
            log.warning("process died, starting another", extra={"fields": fields})

    def _stop(self) -> None:
        log.info("supervisor stops", extra={"fields": {"processes": len(list(self.children))}})
        self._is_stopping = True
        self._order(STOP)

    def _order(self, order: bytes) -> None:
        for child in self.children:
            child.order(order)


def supervise(supervisor: Supervisor) -> int:
    """Step until all has ended; returns the exit code."""
    signals: list[int] = []
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTSTP):
        signal.signal(number, lambda number, _: signals.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)  # it wakes
    while True:
        while signals:
            supervisor.tell(signals.pop(0))
        supervisor.step()
        if supervisor.code is not None:
            return supervisor.code
        lines = [child.line for child in supervisor.children if not child.is_silent]
        if woken in select.select([woken, *lines], [], [], supervisor.due_in_s())[0]:
            woken.recv(64)


def main(arguments: list[str]) -> int:
    count, log_format, log_level, *command = arguments
    os.environ[logs.PID_VARIABLE] = "1"  # of the children, too: their lines are told apart
    logs.set_up(log_format, log_level)
    log.info("supervisor starts", extra={"fields": {"processes": int(count)}})
    return supervise(Supervisor(command, int(count)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
