"""The worker process: registers, takes turns until told to stop, and shuts down.

Beside the turns the heartbeat keeps the lease, the settler writes how runs ended, and the sweeper looks after
dead workers. Called by cli. Calls everything else here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any, Literal

import anyio

from ..app import JobQ
from ..broker.client import TROUBLE, ResponseError, check_server, connect
from ..broker.scripts import UNPARKED_A_CALL, Broker
from ..health import Check, Pulse
from ..migrate import check as check_tables
from ..outbox.database import is_unavailable
from ..outbox.line import Line
from ..settings import WorkerSettings
from .burial import Undertaker
from .checks import STARTING, checks
from .executor import Executor
from .heartbeat import Heartbeat
from .orders import Orders
from .owned import Owned
from .recycling import Recycling, check_memory
from .settler import Settler
from .shutdown import Shutdown
from .sweeper import SWEEP_EVERY_S, Sweeper
from .turns import Turns

log = logging.getLogger(__name__)

_UNPARK_EVERY_BEATS = 5
_LOOK_EVERY_S = 5.0
_TICK_S = 0.25

Milestone = Literal["ready", "recycling"]


class Worker:
    """One worker process.

    1. checks both stores and registers, 2. takes turns, 3. finishes or hands back all it owns and deregisters.
    """

    def __init__(self, app: JobQ, settings: WorkerSettings | None = None):
        self.app = app
        self.settings = settings or WorkerSettings()
        # Random, and new at every start: containers share host names and pids (MUST).
        self.name = f"w-{secrets.token_hex(6)}"
        self.orders = Orders()
        self.owned = Owned(self.settings.queues)
        self.announce: Callable[[Milestone], None] = lambda milestone: None
        """Told when this worker serves, and when it recycles."""
        self.is_open = False
        self.pulse = Pulse("worker", self.settings.frozen_after)

    async def run(self) -> int:
        """Serve until `orders.stopping`. Returns the exit code: 0, or 6 when something had to be left behind."""
        code = 0
        async with AsyncExitStack() as stack:
            await self.open(stack)
            async with anyio.create_task_group() as group:
                group.start_soon(self.settler.run)
                group.start_soon(self._look_after_others)
                group.start_soon(self._look_at_postgresql)
                group.start_soon(self._tick)
                await self.turns.take_until_stopped()
                code = await self.shutdown.run()
                group.cancel_scope.cancel()
        return code

    async def open(self, stack: AsyncExitStack) -> None:
        """Check everything that keeps a worker from working, and register. `stack` closes what is opened."""
        app, settings = self.app, self.settings
        app.check()
        read_line, settle_line, sweep_line = (
            Line(app.database, app.schema, f"jobq:{self.name}:{part}") for part in ("read", "settle", "sweep")
        )
        for line in (read_line, settle_line, sweep_line):
            stack.push_async_callback(line.close)
        async with read_line.open() as connection:
            await check_tables(connection, app.schema)
            database_id = await app.database.database_id(connection, app.schema)
        client = connect(app.redis_url)
        stack.push_async_callback(client.aclose)
        await check_server(client)
        self.broker = Broker(client, database_id)
        with suppress(ResponseError):  # a hint, which a full Redis does not take; its own queues a worker knows
            await self.broker.announce(settings.queues)
        state = await stack.enter_async_context(app.lifespan()) if app.lifespan is not None else None
        check_memory(settings)
        undertaker = Undertaker(app)
        self.settler = Settler(
            settle_line,
            self.broker,
            app.schema,
            self.name,
            self.owned,
            undertaker,
            slots=settings.concurrency,
            on_room=self.orders.wake,
        )
        self.executor = Executor(
            app,
            self.settler,
            self.name,
            state=state,
            threads=settings.threads,
            is_stopping=self.orders.stopping.is_set,
        )
        stack.callback(self.executor.close)
        self.sweeper = Sweeper(
            sweep_line,
            self.broker,
            app.schema,
            self.name,
            undertaker,
            queues=settings.queues,
            lease_s=settings.lease,
            has_beaten=lambda: self.heartbeat.may_start,
        )
        self.turns = Turns(
            app,
            settings,
            self.name,
            broker=self.broker,
            line=read_line,
            owned=self.owned,
            settler=self.settler,
            executor=self.executor,
            orders=self.orders,
            pulse=self.pulse,
        )
        self.recycling = Recycling(
            settings, self.name, self.turns, self.owned, self.orders, lambda: self.announce("recycling")
        )
        self.heartbeat = self.turns.heartbeat = self._make_heartbeat()
        stack.callback(self.heartbeat.stop)
        self.shutdown = Shutdown(
            settings,
            self.name,
            broker=self.broker,
            owned=self.owned,
            orders=self.orders,
            turns=self.turns,
            executor=self.executor,
            settler=self.settler,
            heartbeat=self.heartbeat,
        )
        self.heartbeat.start()
        self._warn_of_small_pool()
        self.is_open = True
        fields = {"worker": self.name, "queues": _served(settings), "slots": settings.concurrency}
        log.info("worker ready", extra={"fields": fields})
        self.announce("ready")

    def checks(self) -> list[Check]:
        """What keeps this worker from its work, as far as it knows. Safe from any thread; asks nobody."""
        if not self.is_open:
            return [STARTING]
        return checks(
            self.name,
            self.settings,
            pulse=self.pulse,
            orders=self.orders,
            turns=self.turns,
            settler=self.settler,
            heartbeat=self.heartbeat,
        )

    def _make_heartbeat(self) -> Heartbeat:
        loop = asyncio.get_running_loop()
        info = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": _version(),
            "tasks": sorted(self.app.tasks),
            "slots": self.settings.concurrency,
        }
        return Heartbeat(
            self.app.redis_url,
            [self.broker.keys(queue) for queue in self.settings.queues],
            self.name,
            self.owned,
            self.settings,
            info=json.dumps(info),
            adopt=lambda queue, entries: _tell(loop, self.turns.adopt, queue, entries),
            lose=lambda queue, entries: _tell(loop, self.turns.lose, queue, entries),
        )

    async def _tick(self) -> None:
        while True:
            self.heartbeat.loop_ticked()
            self.recycling.step()
            await asyncio.sleep(_TICK_S)

    async def _look_after_others(self) -> None:
        """Sweep dead workers, and call back what was parked for tasks that this worker knows."""
        next_unpark = 0.0
        while True:
            try:
                await self.sweeper.step()
                if time.monotonic() >= next_unpark and self.app.tasks:
                    next_unpark = time.monotonic() + _UNPARK_EVERY_BEATS * self.settings.beat
                    await self._unpark()
            except TROUBLE:
                pass  # the turns report it
            except Exception as error:
                if not is_unavailable(error):
                    log.exception("sweeping failed, trying again")
            await asyncio.sleep(SWEEP_EVERY_S)

    async def _look_at_postgresql(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await self.turns.look()

    async def _unpark(self) -> None:
        """Call back what is parked for tasks that this worker knows, in calls that hold up nobody."""
        for queue in self.settings.queues:
            while await self.turns.unpark(queue) >= UNPARKED_A_CALL:
                pass

    def _warn_of_small_pool(self) -> None:
        """Of an engine that the application made, and may make larger, where a task could come to wait for it."""
        limit = None if self.app.database.is_own else self.app.database.pool_limit
        completes = any(task.takes_context and task.is_async for task in self.app.tasks.values())
        if limit is not None and limit < self.settings.concurrency and completes:
            fields = {
                "pool": limit,
                "concurrency": self.settings.concurrency,
                "remedy": "raise pool_size or max_overflow of the engine, or lower --concurrency",
            }
            log.warning("more slots than database connections for ctx.complete()", extra={"fields": fields})


def _served(settings: WorkerSettings) -> str:
    """The queues as the command line takes them."""
    weights = settings.weights
    names = [f"{queue}:{weights[queue]}" if queue in weights else queue for queue in settings.queues]
    return ",".join(names) + (" --strict" if settings.strict else "")


def _tell(
    loop: asyncio.AbstractEventLoop,
    what: Callable[[str, list[bytes]], Coroutine[Any, Any, None]],
    queue: str,
    raws: list[bytes],
) -> None:
    """Run a coroutine on the loop, from the heartbeat's thread."""

    async def told() -> None:
        try:
            await what(queue, raws)
        except TROUBLE:
            pass  # the next two beats find the same again
        except Exception:
            log.exception("a finding of the heartbeat could not be followed up")

    if not loop.is_closed():
        asyncio.run_coroutine_threadsafe(told(), loop)


def _version() -> str:
    from .. import __version__

    return __version__
