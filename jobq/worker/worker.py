"""The worker: fetches entries, reads their jobs, runs them, and has them settled.

A turn is `fetch -> read -> start`; runs settle on their own. Beside it the heartbeat keeps the lease, the settler
writes ends, and the sweeper looks after the others. Called by cli. Calls everything else here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID

import anyio

from ..app import JobQ
from ..broker.client import TROUBLE, check_server, connect
from ..broker.scripts import Broker
from ..context import Completion
from ..errors import ConfigurationError
from ..model import Entry, Job
from ..outage import Outage
from ..outbox import settle
from ..outbox.database import is_unavailable
from ..outbox.line import Line
from ..settings import CRASHES_BEFORE_ALONE, WorkerSettings
from .burial import Undertaker
from .executor import Executor
from .heartbeat import Heartbeat
from .owned import Ending, Holding, Owned
from .settler import BUFFER_LIMIT, Settler
from .sweeper import SWEEP_EVERY_S, Sweeper

log = logging.getLogger(__name__)

_BELL_S = 1.0
_UNPARK_EVERY_BEATS = 5
_CANCEL_WAIT_S = 5.0
_FLUSH_WAIT_S = 10.0
_TICK_S = 0.25


class Worker:
    """One worker process.

    1. registers, 2. takes turns until told to stop, 3. hands back or finishes all it owns, and deregisters.
    """

    def __init__(self, app: JobQ, settings: WorkerSettings | None = None):
        self.app = app
        self.settings = settings or WorkerSettings()
        # Random, and new at every start: containers share host names and pids (MUST).
        self.name = f"w-{secrets.token_hex(6)}"
        self.stopping = asyncio.Event()
        """Set it to stop: fetch nothing more, give running jobs their grace, hand back the rest."""
        self.hurry = asyncio.Event()
        """Set it to hand everything back at once."""
        self.quiet = asyncio.Event()
        """Set it to fetch nothing more, and go on running what has started."""
        self._owned = Owned(self.settings.queues)
        self._adopted: deque[Holding] = deque()
        self._suspects: deque[tuple[Holding, Job]] = deque()
        self._runs: set[asyncio.Task[None]] = set()
        self._is_alone = False
        self._wake = asyncio.Event()
        self._turn = 0
        self._redis_outage = Outage("redis", "worker")
        self._database_outage = Outage("postgresql", "worker")
        self._is_fenced = False

    async def run(self) -> int:
        """Serve until stopped. Returns the exit code: 0, or 6 if something had to be left behind."""
        async with AsyncExitStack() as stack:
            await self._open(stack)
            async with anyio.create_task_group() as group:
                group.start_soon(self._settler.run)
                group.start_soon(self._look_after_others)
                group.start_soon(self._tick)
                await self._take_turns()
                code = await self._shut_down()
                group.cancel_scope.cancel()
        return code

    async def step(self) -> None:
        """One turn: fetch -> read -> start. Waits for work or room when there is none."""
        can_fetch = self._may_fetch()
        holdings = await self._fetch()
        if holdings:
            jobs = await self._read(holdings)
            self._start(holdings, jobs)
        elif not self.stopping.is_set():
            await self._idle(has_looked=can_fetch)

    async def _open(self, stack: AsyncExitStack) -> None:
        """Check everything that keeps a worker from working, then register."""
        app, settings = self.app, self.settings
        app.check()
        self._line = Line(app.database, app.schema, f"jobq:{self.name}:read")
        settle_line = Line(app.database, app.schema, f"jobq:{self.name}:settle")
        sweep_line = Line(app.database, app.schema, f"jobq:{self.name}:sweep")
        for line in (self._line, settle_line, sweep_line):
            stack.push_async_callback(line.close)
        async with self._line as connection:
            database_id = await app.database.database_id(connection, app.schema)
        client = connect(app.redis_url)
        stack.push_async_callback(client.aclose)
        await check_server(client)
        self._broker = Broker(client, database_id)
        state = await stack.enter_async_context(app.lifespan()) if app.lifespan is not None else None
        undertaker = Undertaker(app)
        self._settler = Settler(settle_line, self._broker, app.schema, self.name, self._owned, undertaker)
        self._executor = Executor(
            app,
            self._settler,
            self.name,
            state=state,
            threads=settings.threads,
            is_stopping=self.stopping.is_set,
        )
        stack.callback(self._executor.close)
        self._sweeper = Sweeper(
            sweep_line,
            self._broker,
            app.schema,
            self.name,
            undertaker,
            queues=settings.queues,
            lease_s=settings.lease,
        )
        self._heartbeat = self._make_heartbeat()
        stack.callback(self._heartbeat.stop)
        self._heartbeat.start()
        self._warn_of_small_pool()
        await self._broker.announce(settings.queues)
        fields = {"worker": self.name, "queues": ",".join(settings.queues), "slots": settings.concurrency}
        log.info("worker ready", extra={"fields": fields})

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
            [self._broker.keys(queue) for queue in self.settings.queues],
            self.name,
            self._owned,
            self.settings,
            info=json.dumps(info),
            adopt=lambda queue, entries: _tell(loop, self._adopt, queue, entries),
            lose=lambda queue, entries: _tell(loop, self._lose, queue, entries),
        )

    async def _take_turns(self) -> None:
        while not self.stopping.is_set():
            try:
                await self.step()
            except TROUBLE as error:
                self._release_unstarted()
                await self._wait(self._redis_outage.begin(error))
            except Exception:
                log.exception("worker turn failed, trying again")
                self._release_unstarted()
                await self._wait(1.0)

    def _release_unstarted(self) -> None:
        """A turn broke off: what it had fetched must not stay owned by nobody."""
        waiting = {*self._adopted, *(holding for holding, _ in self._suspects)}
        for holding in self._owned.all():
            if holding.task is None and not holding.is_settling and holding not in waiting:
                self._settler.release(holding)

    # --- fetch

    async def _fetch(self) -> list[Holding]:
        """Own up to as many entries as there are free slots: adopted ones first, then from each queue in turn."""
        if self._suspects:
            return []
        room = self._room()
        taken = [self._adopted.popleft() for _ in range(min(room, len(self._adopted)))]
        while self._adopted:
            self._settler.release(self._adopted.popleft())
        if not self._may_fetch():
            return taken
        queues = self.settings.queues
        self._turn += 1
        for at in range(len(queues)):
            if len(taken) < room:
                taken += await self._fetch_from(queues[(self._turn + at) % len(queues)], room - len(taken))
        self._redis_outage.end()
        return taken

    async def _fetch_from(self, queue: str, count: int) -> list[Holding]:
        # Crash here, or no answer: the entries are in the working list, and are adopted or swept.
        fetched = await self._broker.fetch(queue, self.name, count)
        if fetched is None:
            self._note_fenced()
            return []
        self._is_fenced = False
        return await self._own(queue, fetched.entries)

    async def _own(self, queue: str, raws: list[bytes]) -> list[Holding]:
        """Own what is well formed and not owned yet; drop garbage."""
        entries = [Entry.parse(raw) for raw in raws]
        taken = [self._owned.take(queue, entry) for entry in entries if entry is not None]
        if garbage := [raw for raw, entry in zip(raws, entries, strict=True) if entry is None]:
            await self._broker.ack(queue, self.name, garbage, "garbage")
        return [holding for holding in taken if holding is not None]

    def _room(self) -> int:
        return 0 if self._is_alone else self.settings.concurrency - len(self._runs)

    def _may_fetch(self) -> bool:
        is_open = not (self.quiet.is_set() or self.stopping.is_set() or self._suspects)
        return is_open and self._room() > 0 and self._heartbeat.may_start and self._settler.pending < BUFFER_LIMIT

    def _note_fenced(self) -> None:
        if not self._is_fenced:
            self._is_fenced = True
            log.warning("fenced: redis does not know this worker, waiting for the next beat")

    # --- read

    async def _read(self, holdings: list[Holding]) -> dict[UUID, Job]:
        """Read the rows of a batch on the primary, however long that takes: nothing is dropped unread."""
        ids = [holding.entry.id for holding in holdings]
        while True:
            try:
                async with self._line as connection:
                    jobs = await settle.read(connection, self.app.schema, ids)
            except Exception as error:
                if not is_unavailable(error) and not isinstance(error, ConfigurationError):
                    log.exception("reading jobs failed, trying again")
                pause = self._database_outage.begin(error)
                if self.stopping.is_set():
                    for holding in holdings:
                        self._settler.release(holding)
                    holdings.clear()
                    return {}
                await self._wait(pause)
            else:
                self._database_outage.end()
                return jobs

    # --- start

    def _start(self, holdings: list[Holding], jobs: dict[UUID, Job]) -> None:
        for holding in holdings:
            job = jobs.get(holding.entry.id)
            generation = holding.entry.generation
            if job is None or job.generation > generation:
                self._settler.ack(holding, "ghost")
            elif job.generation < generation:
                self._settler.ack(holding, "rewound")
            elif job.task not in self.app.tasks:
                self._park(holding, job)
            elif self.stopping.is_set() or not self._heartbeat.may_start:
                self._settler.release(holding)
            elif job.crashes >= CRASHES_BEFORE_ALONE:
                log.warning("job killed its worker before, will run alone", extra={"fields": {"job": str(job.id)}})
                self._suspects.append((holding, job))
            else:
                self._start_run(holding, job)

    def _start_run(self, holding: Holding, job: Job) -> None:
        # A bare task, kept in a set: at 30,000 jobs a second a task group's bookkeeping is a third of the cost.
        holding.task = task = asyncio.create_task(self._executor.run(holding, job), name=f"job {job.id}")
        self._runs.add(task)
        task.add_done_callback(self._end_run)

    def _end_run(self, task: asyncio.Task[None]) -> None:
        self._runs.discard(task)
        self._is_alone = False
        self._wake.set()

    def _park(self, holding: Holding, job: Job) -> None:
        fields = {"job": str(job.id), "task": job.task}
        log.warning("no such task in this worker, parked until one comes that has it", extra={"fields": fields})
        self._settler.park(holding, job.task)

    # --- between turns

    async def _idle(self, *, has_looked: bool) -> None:
        """Wait for something to do: the bell, the end of a run, or a word from the heartbeat."""
        if self._suspects and not self._runs and self._heartbeat.may_start:
            self._is_alone = True
            self._start_run(*self._suspects.popleft())
        elif not self._may_fetch() or self._is_fenced:
            await self._wait(_TICK_S)
        elif has_looked:
            await self._listen()

    async def _listen(self) -> None:
        """Block on the bell, never on a queue: a cancelled blocking move loses its entry (MUST)."""
        bells = [self._broker.keys(queue).bell for queue in self.settings.queues]
        if self._wake.is_set():
            self._wake.clear()
            return
        ring = asyncio.ensure_future(self._broker.client.blpop(bells, timeout=_BELL_S))
        woken = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({ring, woken}, timeout=_BELL_S + 2, return_when=asyncio.FIRST_COMPLETED)
            if ring.done():
                ring.result()
        finally:
            await _cancelled(ring, woken)

    async def _wait(self, seconds: float) -> None:
        self._wake.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    def wake(self) -> None:
        """Look up: an event was set from outside."""
        self._wake.set()

    async def _tick(self) -> None:
        while True:
            self._heartbeat.loop_ticked()
            await asyncio.sleep(_TICK_S)

    async def _look_after_others(self) -> None:
        """Sweep dead workers, and call back what was parked for tasks that this worker knows."""
        next_unpark = 0.0
        while True:
            try:
                await self._sweeper.step()
                if time.monotonic() >= next_unpark and self.app.tasks:
                    next_unpark = time.monotonic() + _UNPARK_EVERY_BEATS * self.settings.beat
                    for queue in self.settings.queues:
                        await self._broker.unpark(queue, sorted(self.app.tasks))
            except TROUBLE:
                pass  # the turns report it
            except Exception as error:
                if not is_unavailable(error):
                    log.exception("sweeping failed, trying again")
            await asyncio.sleep(SWEEP_EVERY_S)

    # --- what the heartbeat found

    async def _adopt(self, queue: str, raws: list[bytes]) -> None:
        """Take up entries in my working list that I never saw arrive."""
        adopted = await self._own(queue, raws)
        self._adopted.extend(adopted)
        self._wake.set()
        if adopted:
            log.warning("adopted entries whose fetch had no answer", extra={"fields": {"count": len(adopted)}})
            await self._broker.count(queue, "adopted", len(adopted))

    async def _lose(self, queue: str, raws: list[bytes]) -> None:
        """These jobs have moved on without me: stop plain runs; ctx.complete() finds out by itself."""
        for raw in raws:
            holding = self._owned.find(queue, raw)
            if holding is None or holding.is_settling or holding.task is None or holding.run is None:
                continue
            if holding.run.completion is Completion.UNUSED:
                holding.ending = Ending.LOST
                holding.task.cancel()

    # --- shutdown

    async def _shut_down(self) -> int:
        """Hand back, wait, cancel, flush, deregister; in this order nothing is lost and little runs twice."""
        log.info("worker draining", extra={"fields": {"worker": self.name, "running": len(self._runs)}})
        for holding in [*self._adopted, *(holding for holding, _ in self._suspects)]:
            self._settler.release(holding)
        self._adopted.clear()
        self._suspects.clear()
        await self._wait_for_runs(self.settings.grace)
        for holding in self._owned.all():
            if holding.task is not None and not holding.task.done() and not holding.is_settling:
                holding.ending = Ending.SHUTDOWN
                holding.task.cancel()
        await self._wait_for_runs(_CANCEL_WAIT_S, even_in_a_hurry=True)
        await self._flush(_FLUSH_WAIT_S)
        self._settler.hand_back_unwritten()
        await self._flush(_FLUSH_WAIT_S)
        self._heartbeat.stop()
        left = len(self._owned)
        if left == 0:
            await self._deregister()
        fields = {"worker": self.name, "left": left}
        log.log(logging.WARNING if left else logging.INFO, "worker stopped", extra={"fields": fields})
        return 6 if left else 0

    async def _wait_for_runs(self, seconds: float, *, even_in_a_hurry: bool = False) -> None:
        until = time.monotonic() + seconds
        while self._runs and (even_in_a_hurry or not self.hurry.is_set()):
            if (left := until - time.monotonic()) <= 0:
                return
            await self._wait(left)

    async def _flush(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._settler.pending and time.monotonic() < until:
            await asyncio.sleep(0.005)

    async def _deregister(self) -> None:
        counter = str(self._heartbeat.last_counter).encode()
        for queue in self.settings.queues:
            try:
                await self._broker.sweep(queue, self.name, counter, {})
            except TROUBLE as error:
                log.warning("could not deregister, a sweeper will", extra={"fields": {"error": str(error)}})
                return

    def _warn_of_small_pool(self) -> None:
        limit = self.app.database.pool_limit
        if limit is not None and limit < self.settings.concurrency:
            fields = {"pool": limit, "concurrency": self.settings.concurrency}
            log.warning("more slots than database connections for ctx.complete()", extra={"fields": fields})


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


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _version() -> str:
    from .. import __version__

    return __version__
