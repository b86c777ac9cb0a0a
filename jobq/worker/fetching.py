"""Fetching: how entries come from Redis into a worker's hands.

Invariant: whatever stands in the working list is owned, or has not been heard of and is adopted later. Called by
turns. Calls broker, shares, bells and owned.
"""

from __future__ import annotations

import logging
import time

from ..broker.scripts import Broker
from ..model import Entry
from ..settings import WorkerSettings
from .bells import Bells
from .owned import Holding, Owned
from .shares import Shares

log = logging.getLogger(__name__)


class Fetching:
    """What one worker fetches of its queues."""

    def __init__(self, settings: WorkerSettings, worker: str, *, broker: Broker, owned: Owned, bells: Bells):
        self._worker = worker
        self._broker = broker
        self._owned = owned
        self._bells = bells
        self._shares = Shares(settings.queues, settings.weights, strict=settings.strict)
        self.is_fenced = False
        """Whether Redis does not know this worker, and gives it nothing."""

    async def fetch(self, room: int) -> list[Holding]:
        """Own up to `room` entries, each queue's share."""
        taken: list[Holding] = []
        self._shares.begin(time.monotonic())
        while portions := self._shares.split(room - len(taken)):
            for queue, count in portions:
                taken += await self._fetch_from(queue, count)
        for queue in list(self._bells.heard):
            # Others filled all slots: its bell is to wake another worker, which may have some to spare.
            await self._fetch_from(queue, 0)
        return taken

    async def _fetch_from(self, queue: str, count: int) -> list[Holding]:
        # Crash here, or no answer: the entries are in the working list, and are adopted or swept.
        fetched = await self._broker.fetch(queue, self._worker, count)
        self._bells.heard.discard(queue)
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
