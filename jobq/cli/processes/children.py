"""The processes that a supervisor starts: each on a line of its own, which ends with the supervisor.

Called by supervisor and dev. Calls supervised, for the words; the standard library alone is loaded.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

from .supervised import READY, RECYCLING, STOP, VARIABLE


class Child:
    """One supervised process, from its start to its end."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        self.line, theirs = socket.socketpair()
        with theirs, ExitStack() as undo:
            undo.callback(self.line.close)
            self._process = subprocess.Popen(  # noqa: S603  our own command line
                command,
                env={**environment, VARIABLE: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # the keys of a terminal are for the supervisor alone
            )
            undo.pop_all()
        self.line.setblocking(False)
        self.started_at = time.monotonic()
        self.is_ready = False
        self.is_recycling = False
        self.is_silent = False
        """Its line has ended, as it has, or soon will."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """How it ended: its exit code, or minus the signal that killed it. None while it lives."""
        return self._process.poll()

    def hear(self) -> None:
        """Take in what it has told."""
        try:
            heard = self.line.recv(64)
        except BlockingIOError:
            return
        except OSError:
            heard = b""
        self.is_ready |= READY in heard
        self.is_recycling |= RECYCLING in heard
        self.is_silent = not heard

    def order(self, order: bytes) -> None:
        """Tell it what to do. One that does not serve yet is told when it does, but stops at once."""
        with suppress(OSError):  # it has ended
            self.line.send(order)
        if order == STOP and not self.is_ready:
            # Handled, once it can be, like the order. Until then the process loads the application: it may be ended.
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._process.kill()

    def forget(self) -> None:
        """Close the line of one that has ended, or will."""
        self._process.wait()
        self.line.close()


def said(code: int) -> dict[str, object]:
    """An exit code, or the name of the signal that killed, as a field for the log."""
    return {"code": code} if code >= 0 else {"signal": signal.Signals(-code).name}


def exit_code(code: int) -> int:
    """What a shell would make of it."""
    return code if code >= 0 else 128 - code


def environment() -> dict[str, str]:
    """What this process's children inherit."""
    return {name: value for name, value in os.environ.items() if name != VARIABLE}
