"""How the free slots of a worker are shared among its queues: pure.

Weighted: every start of a job moves its queue forward by 1/weight, and the queue that is furthest behind is next. So
starts are in proportion to the weights at any moment, also when one slot frees at a time; and a queue with work is
served after at most one round of the others. Strict: the order given, the next only when those before are empty.

Invariant: as long as there is room and a queue that has not said it is empty, `split` names somebody to ask.
Called by turns. Calls nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

REST_S = 0.01
"""A queue found empty is not asked again for so long while others fill all slots."""


class Shares:
    """The queues of one worker, and how far each has come.

    1. `begin` a turn; 2. `split` the room, 3. `note` each answer, and split what is left until all is filled or empty.
    """

    def __init__(self, queues: Sequence[str], weights: Mapping[str, int] | None = None, *, strict: bool = False):
        given = {queue: (weights or {}).get(queue, 1) for queue in queues}
        whole = math.lcm(*given.values())
        self._queues = tuple(queues)
        self._is_strict = strict
        self._stride = {queue: whole // weight for queue, weight in given.items()}
        """How far one start moves a queue: whole numbers, so that nothing is rounded however long a worker lives."""
        self._come = dict.fromkeys(queues, 0)
        """How far each queue has come, in strides."""
        self._empty_at: dict[str, float] = {}
        """Queues whose last answer left nothing behind, and when that was."""
        self._open = list(queues)
        """Queues that may have more in this turn."""
        self._rested: list[str] = []
        """Those of them that are worth asking first."""

    def begin(self, now: float) -> None:
        """Begin a turn. `now` is monotonic, in seconds."""
        self._open = list(self._queues)
        self._rested = [queue for queue in self._open if now - self._empty_at.get(queue, -math.inf) >= REST_S]

    def split(self, room: int) -> list[tuple[str, int]]:
        """Whom to ask for how many entries, to fill `room` slots. Nobody once every queue has said that it is empty."""
        if not self._open or room <= 0:
            return []
        if self._is_strict:
            return [(self._open[0], room)]
        self._catch_up()
        asked = self._rested or self._open
        if len(asked) == 1:
            return [(asked[0], room)]
        behind = [(self._come[queue], at, queue) for at, queue in enumerate(asked)]
        heapq.heapify(behind)
        counts = dict.fromkeys(asked, 0)
        for _ in range(room):
            come, at, queue = behind[0]
            counts[queue] += 1
            heapq.heapreplace(behind, (come + self._stride[queue], at, queue))
        return [(queue, count) for queue, count in counts.items() if count]

    def note(self, queue: str, asked: int, got: int, left: int, now: float) -> None:
        """An answer: `got` of the `asked` entries came, and `left` stayed behind."""
        self._come[queue] += self._stride[queue] * got
        if left:
            self._empty_at.pop(queue, None)
        else:
            self._empty_at[queue] = now
        if got < asked or not left:
            self._open = [other for other in self._open if other != queue]
            self._rested = [other for other in self._rested if other != queue]

    def _catch_up(self) -> None:
        """Let queues that were empty begin where the others are: they had no work, and have nothing to make up for."""
        busy = [self._come[queue] for queue in self._queues if queue not in self._empty_at]
        start = min(busy) if busy else max(self._come.values())
        for queue in self._empty_at:
            self._come[queue] = max(self._come[queue], start)
