"""Fetching: how entries come from Redis into a worker's hands.

Invariant: whatever stands in the working list is owned, or has not been heard of and is adopted later. Called by
turns. Calls broker, shares, orders and owned.
"""

from __future__ import annotations

import logging
import time

from ..broker.scripts import Broker, Fetched
from ..model import Entry
from ..settings import WorkerSettings
from .orders import Orders, Woken
from .owned import Holding, Owned
from .shares import Shares

log = logging.getLogger(__name__)

_BELL_S = 1.0
_ANSWER_S = 2.0
"""Beyond that: then the connection leads nowhere."""


class Fetching:
    """What one worker fetches of its queues."""

    def __init__(self, settings: WorkerSettings, worker: str, *, broker: Broker, owned: Owned, orders: Orders):
        self._queues = settings.queues
        self._worker = worker
        self._broker = broker
        self._owned = owned
        self._orders = orders
        self._shares = Shares(settings.queues, settings.weights, strict=settings.strict)
        self._heard: set[str] = set()
        """Queues whose bell this worker took and that it has not asked since."""
        self.is_fenced = False
        """Whether Redis does not know this worker, and gives it nothing."""

    async def fetch(self, room: int) -> list[Holding]:
        """Own up to `room` entries, each queue's share."""
        taken: list[Holding] = []
        self._shares.begin(time.monotonic())
        while portions := self._shares.split(room - len(taken)):
            for queue, count in portions:
                taken += await self._fetch_from(queue, count)
        for queue in list(self._heard):
            # Others filled all slots: its bell is to wake another worker, which may have some to spare.
            await self._fetch_from(queue, 0)
        return taken

    async def wait(self, room: int) -> list[Holding]:
        """Wait for a bell, or to be woken. Block on that, never on a queue: a cancelled blocking move loses its entry.

        (MUST.) Where there is one queue its fetch is sent behind the wait, and returns up to `room` entries: whoever
        waits for the bell first and then asks takes a round trip longer.
        """
        try:
            async with self._orders.unless_woken(_BELL_S + _ANSWER_S):
                # Interrupted, it may have taken any bell without telling.
                self._heard = set(self._queues)
                if len(self._queues) != 1:
                    self._heard = await self._broker.listen(self._queues, _BELL_S)
                    return []
                queue = self._queues[0]
                fetched = await self._broker.fetch_at_bell(queue, self._worker, room, _BELL_S)
        except Woken:
            return []
        return await self._take(queue, room, fetched)

    async def _fetch_from(self, queue: str, count: int) -> list[Holding]:
        # Crash here, or no answer: the entries are in the working list, and are adopted or swept.
        return await self._take(queue, count, await self._broker.fetch(queue, self._worker, count))

    async def _take(self, queue: str, count: int, fetched: Fetched | None) -> list[Holding]:
        self._heard.discard(queue)
        entries, left = (fetched.entries, fetched.left) if fetched is not None else ([], 0)
        self._shares.note(queue, count, len(entries), left, time.monotonic())
        if fetched is None:
            self._note_fenced()
            return []
        self.is_fenced = False
        return await self.own(queue, entries)

    async def own(self, queue: str, raws: list[bytes]) -> list[Holding]:
        """Own what is well formed and not owned yet; drop garbage."""
        entries = [Entry.parse(raw) for raw in raws]
        # First, since it may fail: what is owned by then would be nobody's, and would be vouched for all the same.
        if garbage := [raw for raw, entry in zip(raws, entries, strict=True) if entry is None]:
            await self._broker.ack(queue, self._worker, garbage, "garbage")
        taken = [self._owned.take(queue, entry) for entry in entries if entry is not None]
        return [holding for holding in taken if holding is not None]

    def _note_fenced(self) -> None:
        if not self.is_fenced:
            self.is_fenced = True
            log.warning("fenced: redis does not know this worker, waiting for the next beat")
