"""The settler: how runs end in both stores, many at a time.

1. Runs that ended wait in a buffer for a few milliseconds, unless there are many already.
2. One statement for each kind of end writes them to PostgreSQL; what it passed over is read, and waits if it is
   still at its generation.
3. Only then are their entries acked in Redis (MUST): until the commit is certain they must stay reachable.

Nothing leaves the buffer before both stores have answered, however long one is away. Called by worker,
executor, turns and shutdown. Calls outbox.settle, broker and burial.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Literal, NamedTuple
from uuid import UUID

import anyio
import asyncpg

from ..broker.client import TROUBLE
from ..broker.scripts import Broker
from ..model import Entry
from ..outage import Outage
from ..outbox import settle
from ..outbox.database import is_unavailable
from ..outbox.line import Line
from ..outbox.settle import Burial, Reschedule
from .burial import Undertaker
from .owned import Holding, Owned

log = logging.getLogger(__name__)

GATHER_S = 0.002
"""How long a flush waits for company: with the buffer's size, the runs that a crash can repeat."""
_COMPANY = 100
"""Runs in the buffer from which a flush does not wait."""
BUFFER_LIMIT = 500
"""Runs in the buffer beyond which a worker fetches nothing; one of many slots has room for two batches."""
_RETRY_LOCKED_S = 0.05
_PAUSE_AFTER_BUG_S = 1.0


class _Move(NamedTuple):
    """What is to happen to entries in Redis."""

    verb: Literal["ack", "release", "park"]
    queue: str
    label: str = ""
    """The counter of an ack, or the task of a park."""


class Settler:
    """Buffers of a process, and the loop that empties them."""

    def __init__(
        self,
        line: Line,
        broker: Broker,
        schema: str,
        worker: str,
        owned: Owned,
        undertaker: Undertaker,
        *,
        slots: int,
        on_room: Callable[[], None],
    ):
        self._line = line
        self._broker = broker
        self._schema = schema
        self._worker = worker
        self._owned = owned
        self._undertaker = undertaker
        self.limit = max(BUFFER_LIMIT, 2 * slots)
        self._on_room = on_room
        self._is_room_awaited = False
        self._completed: list[Holding] = []
        self._rescheduled: list[tuple[Holding, Reschedule]] = []
        self._buried: list[tuple[Holding, Burial]] = []
        self._moves: dict[_Move, list[Holding]] = defaultdict(list)
        self._in_hand = 0
        self._writing = anyio.CancelScope()
        self._giving_up = asyncio.Event()
        self._work = asyncio.Event()
        self._empty = asyncio.Event()
        self.database_outage = Outage("postgresql", "settler")
        self.redis_outage = Outage("redis", "settler")

    def complete(self, holding: Holding) -> None:
        """The run is done, and left no effects that were committed with it."""
        self._completed.append(self._settling(holding))

    def reschedule(self, holding: Holding, end: Reschedule) -> None:
        self._rescheduled.append((self._settling(holding), end))

    def bury(self, holding: Holding, end: Burial) -> None:
        self._buried.append((self._settling(holding), end))

    def ack(self, holding: Holding, counter: str = "acked") -> None:
        """The row is settled already, or was never this entry's."""
        self._moves[_Move("ack", holding.queue, counter)].append(self._settling(holding))

    def release(self, holding: Holding) -> None:
        """Give the entry back unrun."""
        self._moves[_Move("release", holding.queue)].append(self._settling(holding))

    def park(self, holding: Holding, task: str) -> None:
        """Set the entry aside for a worker that knows its task."""
        self._moves[_Move("park", holding.queue, task)].append(self._settling(holding))

    @property
    def pending(self) -> int:
        """Runs that are not settled in both stores yet."""
        rows = len(self._completed) + len(self._rescheduled) + len(self._buried)
        return rows + sum(map(len, self._moves.values())) + self._in_hand

    def has_room(self) -> bool:
        """Whether more may be fetched. If not, `on_room` is called as soon as it may."""
        self._is_room_awaited = self.pending >= self.limit
        return not self._is_room_awaited

    def hand_back_unwritten(self) -> None:
        """PostgreSQL is away for too long: give the entries of unwritten runs back, to run again elsewhere.

        A write that is under way is broken off. If it happens all the same, the entry is a ghost when it is read.
        """
        if not self.pending:
            return  # what ends later is not meant
        self._giving_up.set()
        self._writing.cancel()
        self._work.set()

    def _release_unwritten(self) -> None:
        unwritten = [*self._completed, *(h for h, _ in self._rescheduled), *(h for h, _ in self._buried)]
        self._completed, self._rescheduled, self._buried = [], [], []
        for holding in unwritten:
            self.release(holding)

    async def flushed(self) -> None:
        """Wait until nothing is pending; `run` does the work."""
        while self.pending:
            self._empty.clear()
            await self._empty.wait()

    async def run(self) -> None:
        """Flush whenever there is something, until cancelled."""
        while True:
            await self._work.wait()
            if self.pending < _COMPANY:
                await asyncio.sleep(GATHER_S)
            try:
                pause = await self.step()
            except Exception:
                log.exception("settling failed, trying again")
                self._work.set()
                pause = _PAUSE_AFTER_BUG_S
            await self._rest(pause)

    async def _rest(self, seconds: float) -> None:
        """Let others run; longer while a store is away, unless the worker gives up waiting for it."""
        if not seconds:
            await asyncio.sleep(0)
            return
        try:
            async with asyncio.timeout(seconds):
                await self._giving_up.wait()
        except TimeoutError:
            pass

    async def step(self) -> float:
        """Flush what has ended, first to PostgreSQL, then to Redis. Returns the seconds until the next try."""
        self._work.clear()
        pause = 0.0
        with anyio.CancelScope() as self._writing:
            pause = await self._flush_rows()
        if self._giving_up.is_set():
            self._giving_up.clear()
            self._release_unwritten()
        pause = max(pause, await self._flush_entries())
        (self._work if self.pending else self._empty).set()
        if self._is_room_awaited and self.has_room():
            self._on_room()
        return pause

    async def _flush_rows(self) -> float:
        completed, self._completed = self._completed, []
        rescheduled, self._rescheduled = self._rescheduled, []
        buried, self._buried = self._buried, []
        holdings = [*completed, *(holding for holding, _ in rescheduled), *(holding for holding, _ in buried)]
        if not holdings:
            return 0.0
        self._in_hand = len(holdings)
        locked = set(holdings)
        try:
            async with self._line.open() as connection:
                # Crash here: nothing of this buffer is written; its jobs are swept, and those that were done run again.
                ended = await self._write(connection, completed, rescheduled, buried)
                locked = await self._still_there(connection, [h for h in holdings if h.entry.id not in ended])
        except Exception as error:
            if not is_unavailable(error):
                log.exception("settling failed, trying again")
            # The outcome is unknown: what was written will be found gone at the next try.
            return self.database_outage.begin(error)
        finally:
            self._in_hand = 0
            self._completed += [holding for holding in completed if holding in locked]
            self._rescheduled += [pair for pair in rescheduled if pair[0] in locked]
            self._buried += [pair for pair in buried if pair[0] in locked]
        # Crash here: the rows are settled and the entries are not; each is dropped at its next pre-read.
        self._ack_settled(holdings, locked)
        self.database_outage.end()
        return _RETRY_LOCKED_S if locked else 0.0

    def _ack_settled(self, holdings: list[Holding], locked: set[Holding]) -> None:
        settled: dict[str, list[Holding]] = defaultdict(list)
        for holding in holdings:
            if holding not in locked:
                settled[holding.queue].append(holding)
        for queue, acked in settled.items():
            self._moves[_Move("ack", queue, "acked")] += acked

    async def _write(
        self,
        connection: asyncpg.Connection,
        completed: list[Holding],
        rescheduled: list[tuple[Holding, Reschedule]],
        buried: list[tuple[Holding, Burial]],
    ) -> set[UUID]:
        ended: set[UUID] = set()
        if completed:
            ended |= await settle.complete(connection, self._schema, [holding.entry.key for holding in completed])
        if rescheduled:
            ended |= await settle.reschedule(connection, self._schema, [end for _, end in rescheduled])
        if buried:
            ended |= await self._undertaker.bury(connection, [end for _, end in buried])
        return ended

    async def _still_there(self, connection: asyncpg.Connection, passed_over: list[Holding]) -> set[Holding]:
        """Which of the rows that a statement passed over are still at their generation: locked just then."""
        if not passed_over:
            return set()
        now = await settle.standings(connection, self._schema, [holding.entry.id for holding in passed_over])
        return {h for h in passed_over if h.entry.id in now and now[h.entry.id].generation == h.entry.generation}

    async def _flush_entries(self) -> float:
        for move in list(self._moves):
            holdings = self._moves.pop(move)
            self._in_hand = len(holdings)
            is_moved = False
            try:
                await self._move(move, [holding.entry for holding in holdings])
                is_moved = True
            except TROUBLE as error:
                return self.redis_outage.begin(error)
            finally:
                self._in_hand = 0
                if not is_moved:
                    self._moves[move] = holdings + self._moves[move]
            # Crash here, or no answer: Redis has moved them, and moving them again changes nothing.
            for holding in holdings:
                self._owned.drop(holding)
            self.redis_outage.end()
        return 0.0

    async def _move(self, move: _Move, entries: list[Entry]) -> None:
        match move.verb:
            case "ack":
                await self._broker.ack(move.queue, self._worker, entries, move.label)
            case "release":
                await self._broker.release(move.queue, self._worker, entries)
            case "park":
                await self._broker.park(move.queue, self._worker, move.label, entries)

    def _settling(self, holding: Holding) -> Holding:
        holding.is_settling = True
        self._work.set()
        return holding
