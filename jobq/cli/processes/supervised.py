"""A supervised process's line to the process that started it: orders come in, notices go out.

The line is a socket, whose number the environment names. Orders are no signals, so that one that arrives before the
process listens waits for it, and a service manager that signals every process of the service stops none of them twice.
Invariant: the end of the line is the supervisor's end, by SIGKILL too, and a supervised process then stops.
Called by serving, run and, for the words, by children. Calls nothing: the supervisor loads it without jobq.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import asyncio

VARIABLE = "JOBQ_SUPERVISOR_FD"

QUIET, STOP, HURRY = b"q", b"s", b"h"
"""Orders: fetch nothing more; stop, with grace; stop without."""
READY, RECYCLING = b"r", b"c"
"""Notices: this process serves; it has done enough, and stops when its last job has ended."""


class Line:
    """The end of the line in the supervised process."""

    def __init__(self, line: socket.socket):
        self._line = line
        self._line.setblocking(False)

    @classmethod
    def find(cls) -> Self | None:
        """Take up the line that the environment names. None: nobody supervises this process."""
        number = os.environ.pop(VARIABLE, None)
        if number is None:
            return None
        os.set_inheritable(int(number), False)
        return cls(socket.socket(fileno=int(number)))

    def tell(self, notice: bytes) -> None:
        with suppress(OSError):  # the supervisor is gone, which obey() will see
            self._line.send(notice)

    def obey(
        self,
        loop: asyncio.AbstractEventLoop,
        orders: Mapping[bytes, Callable[[], None]],
        orphaned: Callable[[], None],
    ) -> None:
        """From now on call what each order means, and `orphaned` when the supervisor has ended."""

        def hear() -> None:
            try:
                heard = self._line.recv(64)
            except BlockingIOError:
                return
            except OSError:
                heard = b""
            # Crash here, of the supervisor: its processes hear the end of their lines, and stop by themselves.
            if not heard:
                loop.remove_reader(self._line)
                orphaned()
            for order in heard:
                orders[bytes([order])]()

        loop.add_reader(self._line, hear)
