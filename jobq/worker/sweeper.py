"""The sweeper: takes back what dead workers held, and counts a crash for each job exactly once.

1. Watch every worker's counter; one that stood still for a lease, as this process saw it, is dead.
2. PostgreSQL first: end the sessions the worker left, then give each of its jobs a new generation and one crash.
3. Bury the jobs that killed their third worker in a row.
4. Redis: put the new entries at the front of ready, and forget the worker.

The generation counts a crash once, however many sweep, and fences the worker should it come back. Dying half way
is safe: the next sweeper finds the rest. Called by worker. Calls broker, outbox.settle and burial.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

import asyncpg

from ..broker.client import TROUBLE
from ..broker.scripts import Broker
from ..model import Entry
from ..outage import Outage
from ..outbox import settle
from ..outbox.database import is_unavailable
from ..outbox.line import Line
from ..outbox.settle import Burial, Standing
from ..settings import CRASHES_BEFORE_POISON
from .burial import Undertaker

log = logging.getLogger(__name__)

_OF_OURS = re.compile(r"w-[a-z0-9-]{1,64}")
SWEEP_EVERY_S = 1.0
_LONGEST_GAP_S = 2.0
"""Between two looks at the counters. After a longer one the watch starts anew: nobody was seen standing still."""
_LOCKED_S = 0.05
"""How long rows that are locked are left to whoever has them, before they are counted again."""


@dataclass(slots=True)
class _Watch:
    counter: bytes
    since: float


class Sweeper:
    """One process's watch over all workers of its database."""

    def __init__(
        self,
        line: Line,
        broker: Broker,
        schema: str,
        worker: str,
        undertaker: Undertaker,
        *,
        queues: tuple[str, ...],
        lease_s: float,
        has_beaten: Callable[[], bool],
    ):
        """`has_beaten`: whether Redis has taken this process's own beat lately."""
        self._line = line
        self._broker = broker
        self._schema = schema
        self._worker = worker
        self._undertaker = undertaker
        self._queues = queues
        self._lease_s = lease_s
        self._has_beaten = has_beaten
        self._watches: dict[tuple[str, str], _Watch] = {}
        self._looked_at = float("-inf")
        self._outage = Outage("redis", "sweeper")

    async def step(self) -> list[str]:
        """Look once at every counter, and sweep the workers that are dead. Returns their names."""
        if not self._has_beaten():
            # Nor can the others beat where Redis takes no writes: nobody stood still of its own accord (MUST).
            self._watches.clear()
            return []
        try:
            dead = await self._look()
        except TROUBLE as error:
            # What was not seen did not stand still (MUST): else workers sweep each other after an outage.
            self._watches.clear()
            self._outage.begin(error)
            return []
        self._outage.end()
        for queue, worker, counter in dead:
            try:
                await self.sweep(queue, worker, counter)
            except Exception as error:
                # One that cannot be swept, say because somebody made it up, is tried again after the others.
                if isinstance(error, TROUBLE) or is_unavailable(error):
                    raise
                log.exception("could not sweep a worker", extra={"fields": {"worker": worker, "queue": queue}})
        return [worker for _, worker, _ in dead]

    async def sweep(self, queue: str, worker: str, counter: bytes) -> None:
        """Take back what one worker held in one queue, if its counter is still `counter`."""
        found = map(Entry.parse, await self._broker.working(queue, worker))
        entries = [entry for entry in found if entry is not None]
        # Crash here: nothing is counted; the next sweeper reads the same list.
        standings = {}
        if entries:
            async with self._line.open() as connection:
                standings = await self._count_crashes(connection, worker, entries)
        # Crash here: the rows have new generations; the next sweep finds them so, and counts nothing twice.
        swept = await self._broker.sweep(queue, worker, counter, _verdicts(entries, standings))
        # Crash here, or no answer: the entries are ready again, and the worker is forgotten.
        if swept is None:
            log.info("worker came back while being swept", extra={"fields": {"swept": worker}})
        else:
            fields = {"swept": worker, "queue": queue, "taken_back": swept[0], "dropped": swept[1]}
            log.warning("swept a dead worker", extra={"fields": fields})
        self._watches.pop((queue, worker), None)

    async def _look(self) -> list[tuple[str, str, bytes]]:
        """Read all counters; returns (queue, worker, counter) of those that stood still for a lease."""
        # Those of watched workers too: the names are a hint, and who beats in a queue not looked at has not vanished.
        queues = {*self._queues, *await self._broker.queues(), *(queue for queue, _ in self._watches)}
        for queue in queues.difference(self._queues):
            # In a cluster its node may refuse the beats that are seen to be missing, and take those of this process.
            await self._broker.check_writable(queue)
        beats = {
            (queue, worker): counter
            for queue in queues
            for worker, counter in (await self._broker.beats(queue)).items()
        }
        # Swept or signed off, and has left no list; or Redis lost its counter alone, and nobody else knows of its jobs.
        vanished = self._watches.keys() - beats.keys()
        beats |= dict.fromkeys(vanished, b"")
        now = monotonic()
        if now - self._looked_at > _LONGEST_GAP_S:
            self._watches.clear()
        self._looked_at = now
        dead = []
        watches: dict[tuple[str, str], _Watch] = {}
        for (queue, worker), counter in beats.items():
            watch = self._watches.get((queue, worker))
            if watch is None or watch.counter != counter:
                watch = _Watch(counter, now)
            watches[queue, worker] = watch
            if worker == self._worker or now - watch.since < self._lease_s:
                continue
            if (queue, worker) in vanished and not await self._broker.working(queue, worker):
                del watches[queue, worker]
            else:
                dead.append((queue, worker, counter))
        self._watches = watches
        return dead

    async def _count_crashes(
        self, connection: asyncpg.Connection, worker: str, entries: list[Entry]
    ) -> dict[bytes, Standing | None]:
        if _OF_OURS.fullmatch(worker):  # Redis may say any name, and there are sessions that are no dead worker's
            await settle.end_backends(connection, self._schema, worker)
        now = await self._crash(connection, entries)
        if any(entry.id in now and now[entry.id].generation == entry.generation for entry in entries):
            # Locked just then, as a rule by another sweeper that counts them: its new generations belong into Redis.
            await asyncio.sleep(_LOCKED_S)
            now = await self._crash(connection, entries)
        poison = [
            Burial(id_, row.generation, "poison", failed=False, error_type="Poison", error=_POISON_TEXT)
            for id_, row in now.items()
            if row.crashes >= CRASHES_BEFORE_POISON
        ]
        if poison:
            buried = await self._undertaker.bury(connection, poison)
            log.error("buried poison jobs", extra={"fields": {"jobs": [str(id_) for id_ in buried]}})
            now = {id_: row for id_, row in now.items() if id_ not in buried}
        return {entry.raw: now.get(entry.id) for entry in entries}

    async def _crash(self, connection: asyncpg.Connection, entries: list[Entry]) -> dict[UUID, Standing]:
        """Count a crash for each that is still at its generation, and not locked. Returns how all stand then."""
        await settle.crash(connection, self._schema, [entry.key for entry in entries])
        # Crash here: counted; whoever sweeps next finds the generations moved on, and the poison by its crashes.
        return await settle.standings(connection, self._schema, [entry.id for entry in entries])


_POISON_TEXT = f"its worker died while it ran, {CRASHES_BEFORE_POISON} times in a row"


def _verdicts(entries: list[Entry], standings: dict[bytes, Standing | None]) -> dict[bytes, int]:
    """The generation each entry is to have; 0 for none. One that did not move on goes back as it is."""
    verdicts = {}
    for entry in entries:
        row = standings[entry.raw]
        if row is None or not row.due:
            verdicts[entry.raw] = 0
        elif row.generation != entry.generation:
            verdicts[entry.raw] = row.generation
    return verdicts
