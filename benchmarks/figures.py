"""What a benchmark yields: named figures, each with one sample per run, and what the machine did meanwhile.

Invariant: a figure says its unit and keeps every sample. Called by all benchmarks. Calls nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from .stage import Stage

Samples: TypeAlias = "float | list[float] | dict[str, float | list[float]]"
"""What one run of a measure found: a sample, many of one distribution, or either for each of several names.

Such a name stands after the measure's, `group/variant/name`; the empty name is the measure itself."""


@dataclass(frozen=True)
class Measure:
    """One thing to measure, in one run over empty stores."""

    name: str
    """`group/variant`, as it is given on the command line and stands in the tables."""
    unit: str
    run: Callable[[Stage], Awaitable[Samples]]
    about: str = ""
    """What was done, for the table."""
    is_slow: bool = False
    """Left out unless it is named: it takes minutes."""
    repeat: int | None = None
    """Runs, where another number than --repeat makes sense."""
    units: Mapping[str, str] = field(default_factory=dict)
    """Of those of its several names that have another unit."""

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]


@dataclass
class Figure:
    """The samples of one name over all runs."""

    name: str
    unit: str
    about: str = ""
    samples: list[float] = field(default_factory=list)
    others_cpu: list[float] = field(default_factory=list)
    """Share of the CPU time of all cores, 0 to 1, that other processes than the benchmark took; one for each run."""
    is_distribution: bool = False
    """Whether a run yields many samples, of which those of all runs are one distribution."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: float) -> float:
        """The smallest sample that `percent` of all do not exceed."""
        ordered = sorted(self.samples)
        return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
