"""How a worker stops: hand back, wait, cancel, flush, deregister.

Invariant: in this order nothing is lost and little runs twice; whatever a task does with its cancellation and
whichever store is away, it comes to an end. Called by worker. Calls turns, executor, settler, heartbeat and broker.
"""

from __future__ import annotations

import logging
import time

import anyio

from ..broker.client import TROUBLE
from ..broker.scripts import Broker
from ..outbox.settle import Reschedule
from ..run import Completion
from ..settings import WorkerSettings
from .executor import Executor
from .heartbeat import Heartbeat
from .orders import Orders
from .owned import Owned
from .settler import Settler
from .turns import Turns

log = logging.getLogger(__name__)

_CANCEL_WAIT_S = 3.0
"""With what follows it, well within the 5 s beyond the grace that the pages ask of whoever kills a process."""
_FLUSH_WAIT_S = 10.0
_POSTPONE_WAIT_S = 3.0
_NAMED_JOBS = 20
_DEREGISTER_TRIES = 8
"""After an outage every pooled connection fails once."""
_DEREGISTER_S = 5.0

EXIT_LEFT_BEHIND = 6


class Shutdown:
    """How one worker leaves nothing behind."""

    def __init__(
        self,
        settings: WorkerSettings,
        worker: str,
        *,
        broker: Broker,
        owned: Owned,
        orders: Orders,
        turns: Turns,
        executor: Executor,
        settler: Settler,
        heartbeat: Heartbeat,
    ):
        self._settings = settings
        self._worker = worker
        self._broker = broker
        self._owned = owned
        self._orders = orders
        self._turns = turns
        self._executor = executor
        self._settler = settler
        self._heartbeat = heartbeat

    async def run(self) -> int:
        """Finish or hand back all that is owned. Returns the exit code: EXIT_LEFT_BEHIND if something stays."""
        log.info("worker draining", extra={"fields": {"worker": self._worker, "running": len(self._turns.runs)}})
        await self._turns.hand_back_unstarted()
        self._tell_of_threads(logging.INFO, "waiting for synchronous jobs that cannot be interrupted")
        await self._wait_for_runs(self._settings.grace)
        self._tell_of_threads(logging.WARNING, "synchronous jobs outlast the grace, and cannot be interrupted")
        self.cancel_runs()
        await self._wait_for_runs(_CANCEL_WAIT_S, even_in_a_hurry=True)
        await self._flush(_FLUSH_WAIT_S)
        self._settler.hand_back_unwritten()
        await self._flush(_FLUSH_WAIT_S)
        if self._turns.runs:
            self._postpone_runs()
            await self._flush(_POSTPONE_WAIT_S)
        # Crash here, or no PostgreSQL: what still runs keeps its entry, and is swept; that counts as a crash.
        # Last of all: until here it vouched for what was not settled yet.
        self._heartbeat.stop()
        # Crash here: all is written and acked; a sweeper forgets this worker, and counts nothing.
        if not len(self._owned):
            await self._deregister()
        left = max(len(self._owned), len(self._turns.runs))
        fields = {"worker": self._worker, "left": left}
        log.log(logging.WARNING if left else logging.INFO, "worker stopped", extra={"fields": fields})
        return EXIT_LEFT_BEHIND if left else 0

    def cancel_runs(self) -> None:
        """Interrupt what still runs; each settles as interrupted, unless it swallows the cancellation."""
        for holding in self._owned.all():
            holding.interrupt()

    def _postpone_runs(self) -> None:
        """Let what cannot be interrupted run again after a lease: no sooner than a sweeper would, and as no crash.

        What is inside ctx.complete() keeps its entry: its COMMIT may still come.
        """
        for holding in self._owned.all():
            may_commit = holding.run is not None and holding.run.completion is Completion.OPEN
            if holding.is_running and not may_commit:
                self._settler.reschedule(holding, Reschedule(*holding.entry.key, self._settings.lease))

    async def _wait_for_runs(self, seconds: float, *, even_in_a_hurry: bool = False) -> None:
        """Wait until nothing runs, `seconds` at most, and not at all once there is a hurry."""
        until = time.monotonic() + seconds
        while self._turns.runs and (even_in_a_hurry or not self._orders.hurry.is_set()):
            if (left := until - time.monotonic()) <= 0:
                return
            await self._orders.wait(left)

    async def _flush(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await self._settler.flushed()

    def _tell_of_threads(self, level: int, phrase: str) -> None:
        """Name the jobs that keep the worker from stopping. Those that do not end in time run again after the lease."""
        jobs = [f"{job.task} {job.id}" for job in self._executor.in_threads.values()]
        if jobs:
            log.log(level, phrase, extra={"fields": {"count": len(jobs), "jobs": jobs[:_NAMED_JOBS]}})

    async def _deregister(self) -> None:
        ends_at = time.monotonic() + _DEREGISTER_S
        for attempt in range(1, _DEREGISTER_TRIES + 1):
            try:
                for queue in self._settings.queues:
                    counters = await self._broker.beats(queue)
                    if self._worker in counters:
                        await self._broker.sweep(queue, self._worker, counters[self._worker], {})
                return
            except TROUBLE as error:
                if attempt == _DEREGISTER_TRIES or time.monotonic() > ends_at:
                    log.warning("could not deregister, a sweeper will", extra={"fields": {"error": str(error)}})
                    return
