"""One process after another of a command, each until the code it runs has changed.

Invariant: one at a time, and none outlives the session: a stubborn one is killed, and the others see their line end.
Called by dev. Calls children.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import anyio

from .children import Child, exit_code, said
from .supervised import STOP

log = logging.getLogger(__name__)

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DEBOUNCE_MS = 300
_END_S = 8.0
"""What a process may take beyond its grace to cancel, flush and end."""


class Session:
    """Runs a command until it is told to end.

    1. A process that ends by itself is not started again before a file has changed: its error stays in sight.
    2. When a Python file in `watched` changes, it is told to stop, and started again.
    3. INT, TERM or HUP stop it, and end the session; the second kills it.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], watched: Sequence[Path], grace_s: float):
        self.is_in_a_hurry = False
        self._command = command
        self._variables = variables
        self._watched = watched
        self._end_s = grace_s + _END_S
        self._changed: set[str] = set()
        self._is_stopping = False
        self._woken = asyncio.Event()
        self._over = asyncio.Event()
        """The watcher's thread looks at it often; a cancellation would wait for its next time-out, seconds later."""

    async def run(self) -> int:
        """Run until the end; returns 0, or the command's own code where nothing is watched."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._woken.set)
        for number in _ENDING:
            loop.add_signal_handler(number, self.stop)
        code: int | None = None
        try:
            async with anyio.create_task_group() as group:
                if self._watched:
                    group.start_soon(self._watch)
                    await asyncio.sleep(0)  # now it watches: no change after the first start is missed
                try:
                    while code is None:
                        code = await self._run_once()
                finally:
                    self._over.set()
        finally:
            for number in (signal.SIGCHLD, *_ENDING):
                loop.remove_signal_handler(number)
        return code or 0

    async def _run_once(self) -> int | None:
        """Run one process. Returns the code to end with, if the session ends with it."""
        self._changed.clear()
        child = Child(self._command, self._variables)
        try:
            await self._until(lambda: child.code is not None or self._changed or self._is_stopping)
            if child.code is None:
                await self._end(child)
        except BaseException:
            child.kill()
            raise
        finally:
            child.hear()
            child.forget()
        if self._is_stopping:
            return 0
        assert child.code is not None
        if not self._watched:
            return exit_code(child.code)
        if not self._changed and not child.is_recycling:
            log.warning("process ended, waiting for a change", extra={"fields": said(child.code)})
            await self._until(lambda: self._changed or self._is_stopping)
        if self._is_stopping:
            return 0
        if self._changed:
            names = sorted(Path(path).name for path in self._changed)
            log.info("the code has changed, starting again", extra={"fields": {"files": names}})
        return None

    async def _end(self, child: Child) -> None:
        child.hear()
        child.order(STOP)
        try:
            async with asyncio.timeout(self._end_s):
                await self._until(lambda: child.code is not None or self.is_in_a_hurry)
        except TimeoutError:
            log.warning("process killed, since it did not stop: its jobs run again when its lease is over")
        if child.code is None:
            child.kill()
            await self._until(lambda: child.code is not None)

    async def _until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._woken.clear()
            await self._woken.wait()

    def stop(self) -> None:
        """End the session; called again, at once."""
        self.is_in_a_hurry = self._is_stopping
        self._is_stopping = True
        self._woken.set()

    async def _watch(self) -> None:
        from watchfiles import PythonFilter, awatch

        logging.getLogger("watchfiles").setLevel(logging.WARNING)
        changes = awatch(
            *self._watched,
            watch_filter=PythonFilter(),
            debounce=_DEBOUNCE_MS,
            ignore_permission_denied=True,
            stop_event=self._over,
        )
        try:
            async for found in changes:
                self._changed |= {path for _, path in found}
                self._woken.set()
        except OSError as error:
            fields = {"error": error, "remedy": "give --watch DIR, or --no-reload"}
            log.error("the code cannot be watched", extra={"fields": fields})  # noqa: TRY400
