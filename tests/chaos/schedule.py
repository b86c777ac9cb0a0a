"""Which fault strikes when: the same seed and the same faults make the same order, victims and pauses."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 1.2


RARE = ("flush_backlog", "usurp_leader")
EVERY = 3
"""What takes long comes in every third round, the first among them."""


class Schedule:
    """Endless rounds: each holds every fault once, in an order of its own."""

    def __init__(self, seed: int, faults: Sequence[str]):
        self._choose = random.Random(seed)
        self._faults = faults

    def __iter__(self) -> Iterator[tuple[str, float, random.Random]]:
        """The name of a fault, the pause before it, and what it draws its choices from."""
        for number in count() if self._faults else ():
            faults = [name for name in self._faults if name not in RARE or number % EVERY == 0]
            for name in self._choose.sample(faults, len(faults)):
                pause_s = self._choose.uniform(SHORTEST_PAUSE_S, LONGEST_PAUSE_S)
                # Its own source: how much one fault draws changes nothing for the next.
                yield name, pause_s, random.Random(self._choose.getrandbits(64))
