"""What the kill test found, from the numbers that jobs wrote at their end.

Called by trials. Calls nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """One worker killed in the middle, another started."""

    jobs: int
    lost: int
    """Never ended, although nothing had moved for longer than the peer's recovery takes."""
    twice: int
    """Ended more than once."""
    waited_s: float
    """From the kill to the end of the watch."""
    done_s: float | None
    """From the kill until every job had ended; None where some never did."""


def count_ends(ends: Iterable[int], jobs: int) -> tuple[int, int]:
    """Count the lost and the twice run among jobs 0 to `jobs` - 1."""
    runs = Counter(number for number in ends if 0 <= number < jobs)
    return jobs - len(runs), sum(1 for count in runs.values() if count > 1)


def read_ends(text: str) -> list[int]:
    """Read the numbers of all complete lines: a killed process may have left a piece of one."""
    complete, _, _ = text.rpartition("\n")
    return [int(line) for line in complete.split("\n") if line.isdigit()]
