"""Which fault strikes when: the same seed and the same faults make the same order, victims and pauses."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count, islice

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 1.2
RARE = ("flush_backlog", "usurp_leader")
EVERY = 3
"""What takes long comes in every third round, the first among them."""
IN_PAIRS = 0.2
"""How often a fault strikes before the one before it is repaired."""


class Schedule:
    """Rounds, so many or without end: each holds every fault once, in an order of its own."""

    def __init__(self, seed: int, faults: Sequence[str], *, rounds: int | None = None):
        self._choose = random.Random(seed)
        self._faults = faults
        self._rounds = rounds

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], float, random.Random]]:
        """The names of one fault or two, the pause before, and what they draw their choices from."""
        for number in islice(count(), self._rounds) if self._faults else ():
            faults = [name for name in self._faults if name not in RARE or number % EVERY == 0]
            left = self._choose.sample(faults, len(faults))
            while left:
                size = 2 if self._choose.random() < IN_PAIRS else 1
                names, left = tuple(left[:size]), left[size:]
                pause_s = self._choose.uniform(SHORTEST_PAUSE_S, LONGEST_PAUSE_S)
                # Their own source: how much they draw changes nothing for the next.
                yield names, pause_s, random.Random(self._choose.getrandbits(64))
