"""The processes that serve: their event loop, how signals end them, and the exit code they end with.

TSTP: quiet, fetch nothing more. TERM or INT: stop, with grace for running jobs. The same again: hand back at once,
but for a worker under a supervisor, which leaves that to the supervisor.
Invariant: the process ends, whatever a task does with its cancellation. Called by run. Calls worker, relay,
probes, supervised and watchdog.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

import anyio
import click

from ..health import Part
from ..relay.leadership import Relay
from ..worker.worker import Milestone, Worker
from .failures import ExitCode
from .probes import Address, probed
from .processes.supervised import HURRY, QUIET, READY, RECYCLING, STOP, Line
from .watchdog import watched

log = logging.getLogger(__name__)

_CLOSE_WAIT_S = 2.0
_PYTHONS_THRESHOLD = gc.get_threshold()
_GARBAGE_THRESHOLD = 10_000
"""Objects that may become garbage in cycles before they are looked for: some megabytes."""
_NOTICES: dict[Milestone, bytes] = {"ready": READY, "recycling": RECYCLING}


async def serve_relay(relay: Relay) -> int:
    stopping = asyncio.Event()

    def stop(code: ExitCode) -> None:
        if stopping.is_set():
            log.warning("relay killed")
            _exit_now(code)  # nothing is lost by it: the next leader walks the whole table
        log.info("relay stops")
        stopping.set()

    _on_signals(stop)
    await relay.check()
    await relay.run(stopping)
    return ExitCode.OK


async def serve_worker(worker: Worker, relay: Relay | None, supervisor: Line | None = None) -> int:
    """Serve until told to stop; returns the exit code. A relay beside the worker ends after it."""
    told = Told(worker)
    loop = asyncio.get_running_loop()
    if supervisor is None:
        _on_signals(told.stop_or_hurry)
    else:
        _on_signals(lambda _: told.stop())
        worker.announce = lambda milestone: supervisor.tell(_NOTICES[milestone])
        supervisor.obey(loop, {QUIET: told.quiet, STOP: told.stop, HURRY: told.hurry}, told.orphaned)
    loop.add_signal_handler(signal.SIGTSTP, told.quiet)
    try:
        code = await (worker.run() if relay is None else _run_both(worker, relay))
    except asyncio.CancelledError:
        if not told.has_given_up:
            raise
        log.info("worker stopped before it served")
        code = ExitCode.OK
    finally:
        with anyio.move_on_after(_CLOSE_WAIT_S, shield=True):
            await worker.app.database.engine.dispose()
    return code if told.forced is None else told.forced


class Told:
    """What a worker was told from outside, by signals or by its supervisor, handed on as its orders.

    One that does not serve yet heeds none: stop cancels its start, which a lifespan or a store may hold up for long,
    and hurry ends the process. Made by the task that runs the worker.
    """

    def __init__(self, worker: Worker):
        self._worker = worker
        self._orders = worker.orders
        self._starting = asyncio.current_task()
        self._is_stopping = False
        self.has_given_up = False
        """Whether the start was cancelled."""
        self.forced: ExitCode | None = None
        """The code to end with, once there is a hurry."""

    def quiet(self) -> None:
        log.info("worker quiet, fetching nothing more")
        self._orders.quiet.set()
        self._orders.wake()

    def stop(self) -> None:
        """Stop with grace. Said again it changes nothing: a service manager and a supervisor may both say it."""
        if not self._worker.is_open and not self._is_stopping and self._starting is not None:
            self.has_given_up = self._starting.cancel()
        self._is_stopping = True
        self._orders.stopping.set()
        self._orders.wake()

    def hurry(self, code: ExitCode = ExitCode.FORCED) -> None:
        if not self._worker.is_open:
            log.warning("worker killed before it served")
            _exit_now(code)  # it holds no job
        log.warning("worker hands back at once")
        self.forced = code
        self._orders.hurry.set()
        self.stop()

    def stop_or_hurry(self, code: ExitCode) -> None:
        """The first signal stops, the second hurries."""
        if self._is_stopping:
            self.hurry(code)
        else:
            self.stop()

    def orphaned(self) -> None:
        if not self._is_stopping:
            log.warning("the supervisor is gone, so this worker stops")
            self.stop()


async def _run_both(worker: Worker, relay: Relay) -> int:
    relay_stopping = asyncio.Event()
    code = 0
    await relay.check()
    async with anyio.create_task_group() as group:
        group.start_soon(relay.run, relay_stopping)
        code = await worker.run()
        relay_stopping.set()
    return code


def _on_signals(stop: Callable[[ExitCode], None]) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop, ExitCode.FORCED)
    loop.add_signal_handler(signal.SIGINT, stop, ExitCode.INTERRUPTED)


def end_with(
    loop: str, serve: Callable[[], Coroutine[Any, Any, int]], *parts: Part, health: Address | None = None
) -> NoReturn:
    """Serve in an event loop, and end the process with its code.

    `parts` are what serves: probes at `health` tell how they are, and one that is frozen ends the process.
    """
    with (
        garbage_looked_for_seldom(),
        probed(health, parts),
        watched(parts),
        asyncio.Runner(loop_factory=_loop_factory(loop)) as runner,
    ):
        code = runner.run(serve())
        left = [name for task in asyncio.all_tasks(runner.get_loop()) if (name := task.get_name()).startswith("job ")]
        if left:
            # Closing the loop would wait for them, and so would the interpreter for their threads.
            log.warning("ended while jobs still ran", extra={"fields": {"jobs": left}})
            _exit_now(code)
    sys.exit(code)


@contextmanager
def garbage_looked_for_seldom() -> Iterator[None]:
    """Keep the cycle collector from walking the live jobs, and all that was imported, thousands of times for nothing.

    It costs a busy worker a fifth of its time. An application that has set a threshold of its own keeps it. Put back
    afterwards, for a command may be run inside another process.
    """
    if gc.get_threshold() != _PYTHONS_THRESHOLD:
        yield
        return
    gc.set_threshold(_GARBAGE_THRESHOLD, *_PYTHONS_THRESHOLD[1:])
    gc.freeze()
    try:
        yield
    finally:
        gc.set_threshold(*_PYTHONS_THRESHOLD)
        gc.unfreeze()


def _exit_now(code: int) -> NoReturn:
    logging.shutdown()
    os._exit(code)


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if name == "asyncio":
        return None
    try:
        factory: Callable[[], asyncio.AbstractEventLoop] = import_module("uvloop").new_event_loop
    except ImportError:
        if name == "auto":
            return None
        raise click.UsageError("uvloop is not installed: pip install 'jobq[uvloop]', or use --loop asyncio") from None
    return factory
