"""A worker's turns: fetch -> read -> start.

1. `fetch` owns as many entries as there are free slots. Only where whole batches end as soon as they start is the
   next one fetched and read while one runs. All that is owned counts as started.
2. `read` reads their rows on the primary: a row that is gone or has moved on is never run, whatever Redis says.
3. `start` runs them; a job that killed its worker before runs with nothing beside it.

Called by worker, shutdown and, with its findings, the heartbeat. Calls fetching, broker, outbox.settle, executor and
settler.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from collections import deque
from typing import TypeAlias
from uuid import UUID

from ..app import JobQ
from ..broker.client import TROUBLE
from ..broker.scripts import Broker
from ..errors import ConfigurationError
from ..health import Pulse
from ..model import Job
from ..outage import Outage
from ..outbox import settle
from ..outbox.database import is_unavailable
from ..outbox.line import Line
from ..run import Completion
from ..settings import CRASHES_BEFORE_ALONE, WorkerSettings
from .attempt import Attempt
from .executor import Executor
from .fetching import Fetching
from .heartbeat import Heartbeat
from .orders import Orders
from .owned import Ending, Holding, Owned
from .settler import Settler

log = logging.getLogger(__name__)

_LOOK_UP_S = 0.25
_WORTH_FETCHING_ON = 10
"""Jobs in a batch from which it saves more than it costs to fetch the next one meanwhile."""
_QUICK_S = 0.05
"""A batch that took longer has let the rows of the next one grow old."""
_SHORT_OF_THREADS_S = 5.0
_LOOK_S = 5.0


Batch: TypeAlias = tuple[list[Holding], dict[UUID, Job]]
"""What was fetched, and the rows of it that are there."""


class Turns:
    """The runs of one process, and how they come to start."""

    def __init__(
        self,
        app: JobQ,
        settings: WorkerSettings,
        worker: str,
        *,
        broker: Broker,
        line: Line,
        owned: Owned,
        settler: Settler,
        executor: Executor,
        orders: Orders,
        pulse: Pulse,
    ):
        self._app = app
        self._settings = settings
        self._worker = worker
        self._broker = broker
        self._line = line
        self._owned = owned
        self._settler = settler
        self._executor = executor
        self._orders = orders
        self._pulse = pulse
        self.heartbeat: Heartbeat | None = None
        self.runs: set[asyncio.Task[Attempt | None]] = set()
        self.budget = settings.max_jobs if settings.max_jobs is not None else sys.maxsize
        """Runs that may still start."""
        self._adopted: deque[Holding] = deque()
        self._coming: asyncio.Task[Batch] | None = None
        """The next batch, fetched and read while one runs, where batches end as soon as they start."""
        self._is_quick = False
        """Whether all of the last batch, as many as there are slots, ended without waiting for anything."""
        self._suspect: Holding | None = None
        """A job that waits to run alone. Only one: what stands in the working list beside it would die with it."""
        self._is_alone = False
        self._told_unknown: set[str] = set()
        self.fetching = Fetching(settings, worker, broker=broker, owned=owned, orders=orders)
        self._short_of_threads_at: float | None = None
        self.redis_outage = Outage("redis", "worker")
        self.database_outage = Outage("postgresql", "worker")

    async def step(self) -> None:
        """One turn: fetch -> read -> start. Waits for work or room when there is none."""
        can_fetch = self._may_fetch()
        holdings, jobs = await self._take_batch()
        if holdings:
            await self._start_batch(holdings, jobs)
        elif self._suspect is not None and len(self._owned) == 1 and self._may_start:
            suspect, self._suspect = self._suspect, None
            await self._run_alone(suspect)
        elif not self._orders.stopping.is_set() and (holdings := await self._idle(has_looked=can_fetch)):
            await self._start_batch(holdings, await self._read(holdings))

    async def take_until_stopped(self) -> None:
        """Turn after turn; whatever breaks one, the next comes."""
        self._pulse.begin()
        while not self._orders.stopping.is_set():
            self._pulse.tick()
            try:
                await self.step()
            except TROUBLE as error:
                await self._release_unstarted()
                await self._orders.wait(self.redis_outage.begin(error))
            except Exception:
                log.exception("worker turn failed, trying again")
                await self._release_unstarted()
                await self._orders.wait(1.0)
        self._pulse.rest()

    async def _release_unstarted(self) -> None:
        """A turn broke off: what it had fetched must not stay owned by nobody."""
        coming, self._coming = self._coming, None
        if coming is not None:
            await asyncio.gather(coming, return_exceptions=True)
        waiting = {*self._adopted, self._suspect}
        for holding in self._owned.all():
            if holding.task is None and not holding.is_settling and holding not in waiting:
                self._settler.release(holding)

    async def _take_batch(self) -> Batch:
        """The next entries to start, and their rows: what has been coming meanwhile, else what there is now."""
        coming, self._coming = self._coming, None
        holdings, jobs = await coming if coming is not None else ([], {})
        room = self._room()
        for holding in holdings[room:]:
            self._settler.release(holding)  # the batch before has not left its slots after all
        if holdings := holdings[:room]:
            return holdings, jobs if self._is_quick else await self._read(holdings)
        return await self._fetch_and_read(room)

    async def _fetch_and_read(self, room: int) -> Batch:
        holdings = await self._fetch(room)
        # Crash here, or before the first line of a run: swept, and counted like one that had started.
        return holdings, await self._read(holdings) if holdings else {}

    async def _start_batch(self, holdings: list[Holding], jobs: dict[UUID, Job]) -> None:
        """Start a batch; after one that ended at once, have the next fetched and read while this one runs.

        A pass of the loop brings each run to its first pause, before this one asks for more. A batch that fills the
        slots is given a second one: by then what waits for nothing has ended.
        """
        if self._is_quick:
            self._coming = asyncio.create_task(self._fetch_and_read(len(holdings)))
            await asyncio.sleep(0)  # so that its question leaves before the batch keeps the process busy
        began = time.monotonic()
        self._start(holdings, jobs)
        self._is_quick = False
        await asyncio.sleep(0)
        if len(holdings) >= max(self._settings.concurrency, _WORTH_FETCHING_ON):
            await asyncio.sleep(0)
            self._is_quick = not self.runs and time.monotonic() - began < _QUICK_S

    async def _fetch(self, room: int) -> list[Holding]:
        """Own up to `room` entries: adopted ones first, then each queue's share."""
        taken = [self._adopted.popleft() for _ in range(min(room, len(self._adopted)))]
        while self._adopted:
            self._settler.release(self._adopted.popleft())
        if not self._may_fetch():
            return taken
        taken += await self.fetching.fetch(room - len(taken))
        self.redis_outage.end()
        return taken

    @property
    def _may_start(self) -> bool:
        """Whether the lease surely holds long enough to start a run."""
        return self.heartbeat is not None and self.heartbeat.may_start

    def _room(self) -> int:
        if self._is_alone or self._suspect is not None:
            return 0
        return min(self._settings.concurrency - len(self.runs), self.budget)

    def _may_fetch(self) -> bool:
        is_open = not (self._orders.quiet.is_set() or self._orders.stopping.is_set())
        return is_open and self._room() > 0 and self._may_start and self._settler.has_room()

    async def _read(self, holdings: list[Holding]) -> dict[UUID, Job]:
        """Read the rows of a batch on the primary, however long that takes: nothing is dropped unread."""
        ids = [holding.entry.id for holding in holdings]
        while True:
            self._pulse.tick()  # an outage is no hang
            try:
                async with self._line.open() as connection:
                    jobs = await settle.read(connection, self._app.schema, ids)
            except Exception as error:
                if not is_unavailable(error) and not isinstance(error, ConfigurationError):
                    log.exception("reading jobs failed, trying again")
                pause = self.database_outage.begin(error)
                if self._orders.stopping.is_set():
                    for holding in holdings:
                        self._settler.release(holding)
                    holdings.clear()
                    return {}
                await self._orders.wait(pause)
            else:
                self.database_outage.end()
                return jobs

    async def look(self) -> None:
        """Ask PostgreSQL for a sign of life: a worker without jobs would not notice that it is away.

        Soon given up, since a turn may come to wait for the same connection.
        """
        if self._line.is_in_use:
            return
        try:
            async with asyncio.timeout(_LOOK_S), self._line.open() as connection:
                await settle.read(connection, self._app.schema, [])
        except Exception as error:  # noqa: BLE001  whatever keeps it from an answer would keep jobs from being read
            self.database_outage.begin(error)
        else:
            self.database_outage.end()

    def _start(self, holdings: list[Holding], jobs: dict[UUID, Job], *, alone: bool = False) -> None:
        running = len(self.runs)
        may_start = self._may_start and not self._orders.stopping.is_set()
        for holding in holdings:
            job = jobs.get(holding.entry.id)
            generation = holding.entry.generation
            if job is None or job.generation > generation:
                self._settler.ack(holding, "ghost")
            elif job.generation < generation:
                self._settler.ack(holding, "rewound")
            elif job.queue != holding.queue:
                # Somebody put it there, or its row was given another queue: that one's entry counts.
                self._settler.ack(holding, "stale")
            elif job.task not in self._app.tasks:
                self._park(holding, job)
            elif not may_start:
                self._settler.release(holding)
            elif job.crashes >= CRASHES_BEFORE_ALONE and not alone:
                self._keep_suspect(holding, job)
            else:
                self._start_run(holding, job)
        self.budget -= len(self.runs) - running

    def _keep_suspect(self, holding: Holding, job: Job) -> None:
        """Have a suspect wait until nothing is beside it. Others go back: it is to take none with it."""
        if self._suspect is not None:
            self._settler.release(holding)
            return
        log.warning("job killed its worker before, will run alone", extra={"fields": {"job": str(job.id)}})
        self._suspect = holding

    async def _run_alone(self, suspect: Holding) -> None:
        """Start a suspect with nothing beside it. Its row is read again: it may have waited for long."""
        holdings = [suspect]
        self._is_alone = True
        try:
            jobs = await self._read(holdings)
            self._start(holdings, jobs, alone=True)
        finally:
            self._is_alone = bool(self.runs)

    def _start_run(self, holding: Holding, job: Job) -> None:
        # A bare task, kept in a set: at 30,000 jobs a second a task group's bookkeeping is a third of the cost.
        holding.task = task = asyncio.create_task(self._executor.run(holding, job), name=f"job {job.id}")
        self.runs.add(task)
        task.add_done_callback(self._end_run)

    def _end_run(self, task: asyncio.Task[Attempt | None]) -> None:
        self.runs.discard(task)
        self._is_alone = False
        self._orders.note_room()

    def _park(self, holding: Holding, job: Job) -> None:
        fields = {"job": str(job.id), "task": job.task, "queue": holding.queue}
        # Once a task: a deploy parks jobs by the thousand, and `jobq status` counts them.
        level = logging.DEBUG if job.task in self._told_unknown else logging.WARNING
        self._told_unknown.add(job.task)
        log.log(level, "no such task in this worker, parked until one comes that has it", extra={"fields": fields})
        self._settler.park(holding, job.task)

    async def _idle(self, *, has_looked: bool) -> list[Holding]:
        """Wait for something to do: the bell, the end of a run, or a word from the heartbeat. May bring entries."""
        if not self._may_fetch() or self.fetching.is_fenced:
            self._note_short_threads()
            await self._orders.wait(_LOOK_UP_S)
        elif has_looked:
            return await self.fetching.wait(self._room())
        return []

    def _note_short_threads(self) -> None:
        """Say so once when jobs that wait for a thread have kept asynchronous ones from running for a while."""
        waiting = len(self._executor.waiting)
        is_full = self._room() <= 0 and self._suspect is None
        if not waiting or not is_full or not any(task.is_async for task in self._app.tasks.values()):
            self._short_of_threads_at = None
            return
        now = time.monotonic()
        if self._short_of_threads_at is None:
            self._short_of_threads_at = now + _SHORT_OF_THREADS_S
        if now >= self._short_of_threads_at:
            self._short_of_threads_at = math.inf
            fields = {"waiting": waiting, "threads": self._settings.threads, "slots": self._settings.concurrency}
            log.warning(
                "synchronous jobs that wait for a thread fill all slots: raise --threads, or give them a queue and "
                "workers of their own",
                extra={"fields": fields},
            )

    async def adopt(self, queue: str, raws: list[bytes]) -> None:
        """Take up entries in my working list that I never saw arrive.

        As many as fit into the slots, so that a flood of them leaves turns to real jobs; the next beat names the rest.
        """
        # Crash here: they are in the working list, and are swept.
        adopted = await self.fetching.own(queue, raws[: self._settings.concurrency])
        if self._take_up(adopted):
            log.warning("adopted entries whose fetch had no answer", extra={"fields": {"count": len(adopted)}})
            await self._broker.count(queue, "adopted", len(adopted))

    async def unpark(self, queue: str) -> int:
        """Call back what is parked for tasks of this worker. Returns how many entries one call took up."""
        room = max(self._room() - len(self._adopted), 0) if self._may_fetch() else 0
        # Crash here, or no answer: what came to the working list is adopted or swept.
        unparked = await self._broker.unpark(queue, self._worker, sorted(self._app.tasks), room=room)
        self._take_up(await self.fetching.own(queue, unparked.entries))
        return unparked.back + len(unparked.entries)

    def _take_up(self, holdings: list[Holding]) -> bool:
        """Start these next, as far as there is room then. False: there are none, or the worker stops."""
        if self._orders.stopping.is_set():
            for holding in holdings:
                self._settler.release(holding)
            return False
        self._adopted.extend(holdings)
        if holdings:
            self._orders.wake()
        return bool(holdings)

    async def lose(self, queue: str, raws: list[bytes]) -> None:
        """These jobs have moved on without me: stop plain runs; ctx.complete() finds out by itself."""
        for raw in raws:
            holding = self._owned.find(queue, raw)
            if holding is not None and holding.run is not None and holding.run.completion is Completion.UNUSED:
                holding.interrupt(Ending.LOST)

    async def hand_back_unstarted(self) -> None:
        """Release what has not started, jobs that wait for a thread among it."""
        self._adopted.clear()
        self._suspect = None
        await self._release_unstarted()
        for holding in self._executor.waiting:
            holding.interrupt()
