"""The doorbells of a worker's queues: where it waits while it is idle.

Invariant: a bell carries nothing, so that a wait cut off at any moment loses no entry. Called by turns. Calls broker.
"""

from __future__ import annotations

from ..broker.scripts import Broker
from ..settings import WorkerSettings
from .orders import Orders

_BELL_S = 1.0
_ANSWER_S = 2.0
"""Beyond that: then the connection leads nowhere."""


class Bells:
    """The bells of one worker."""

    def __init__(self, broker: Broker, settings: WorkerSettings, orders: Orders):
        self._broker = broker
        self._queues = settings.queues
        self._orders = orders
        self.heard: set[str] = set()
        """Queues whose bell this worker took and that it has not asked since."""

    async def listen(self) -> None:
        """Block on the bell, never on a queue: a cancelled blocking move loses its entry (MUST)."""
        if self._orders.woken.is_set():
            self._orders.woken.clear()
            return
        # Interrupted, it may have taken any bell without telling.
        self.heard = set(self._queues)
        heard = await self._orders.unless_woken(self._broker.listen(self._queues, _BELL_S), _BELL_S + _ANSWER_S)
        if heard is not None:
            self.heard = heard
