"""The processes that serve: their event loop, how signals end them, and the exit code they end with.

TSTP: quiet, fetch nothing more. TERM or INT: stop, with grace for running jobs. The same again: hand back at once.
Invariant: the process ends, whatever a task does with its cancellation. Called by run. Calls worker, relay.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from importlib import import_module
from typing import Any, NoReturn

import anyio
import click

from ..relay.leadership import Relay
from ..worker.worker import Worker
from .failures import ExitCode

log = logging.getLogger(__name__)

_CLOSE_WAIT_S = 2.0


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


async def serve_worker(worker: Worker, relay: Relay | None) -> int:
    """Serve until a signal; returns the exit code. A relay beside the worker ends after it."""
    orders = worker.orders
    forced: list[ExitCode] = []

    def stop(code: ExitCode) -> None:
        if orders.stopping.is_set():
            log.warning("worker hands back at once")
            forced.append(code)
            orders.hurry.set()
        orders.stopping.set()
        orders.wake()

    def be_quiet() -> None:
        log.info("worker quiet, fetching nothing more")
        orders.quiet.set()
        orders.wake()

    _on_signals(stop)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTSTP, be_quiet)
    try:
        code = await (worker.run() if relay is None else _run_both(worker, relay))
    finally:
        with anyio.move_on_after(_CLOSE_WAIT_S, shield=True):
            await worker.app.database.engine.dispose()
    return forced[-1] if forced else code


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


def end_with(loop: str, serve: Callable[[], Coroutine[Any, Any, int]]) -> NoReturn:
    """Serve in an event loop, and end the process with its code."""
    with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
        code = runner.run(serve())
        left = [name for task in asyncio.all_tasks(runner.get_loop()) if (name := task.get_name()).startswith("job ")]
        if left:
            # Closing the loop would wait for them, and so would the interpreter for their threads.
            log.warning("ended while jobs still ran", extra={"fields": {"jobs": left}})
            _exit_now(code)
    sys.exit(code)


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
