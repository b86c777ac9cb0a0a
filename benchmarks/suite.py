"""Every measure there is, which of them a command line means, and the order in which they run.

Invariant: runs go round: the first of each measure, the second of each, ... so that noise hits all alike. Called by
__main__. Calls the benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec

from .figures import Figure, Measure, Samples

GROUPS = ("drain", "floor", "relay", "pipeline", "enqueue", "latency", "growth", "recovery", "peers")
ALL = "all"


class UnknownMeasure(Exception):
    """A name that no measure has."""


def measures() -> list[Measure]:
    """All measures, group by group."""
    found: list[Measure] = []
    for group in GROUPS:
        if find_spec(f"benchmarks.{group}") is not None:
            found += import_module(f"benchmarks.{group}").MEASURES
    return found


def chosen(there: Sequence[Measure], names: Sequence[str]) -> list[Measure]:
    """Those that are named: by group, group/variant or variant. Without a name all that are not slow."""
    if not names:
        return [measure for measure in there if not measure.is_slow]
    for name in names:
        if name != ALL and not any(_is_meant(measure, name) for measure in there):
            raise UnknownMeasure(name)
    return [measure for measure in there if any(name == ALL or _is_meant(measure, name) for name in names)]


def rounds(measures: Sequence[Measure], repeat: int) -> Iterator[tuple[int, Measure]]:
    """(run from 1, measure), in the order of running."""
    runs = {measure.name: measure.repeat or repeat for measure in measures}
    for number in range(1, max(runs.values(), default=0) + 1):
        yield from ((number, measure) for measure in measures if number <= runs[measure.name])


def note(figures: dict[str, Figure], measure: Measure, samples: Samples, others_cpu: float) -> None:
    """Add what one run found to the figures."""
    found = samples if isinstance(samples, dict) else {"": samples}
    for place, (key, sample) in enumerate(found.items()):
        name = f"{measure.name}/{key}" if key else measure.name
        about = measure.about if place == 0 else ""
        figure = figures.setdefault(name, Figure(name, measure.units.get(key, measure.unit), about))
        figure.others_cpu.append(others_cpu)
        if isinstance(sample, list):
            figure.is_distribution = True
            figure.samples += sample
        else:
            figure.samples.append(sample)


def _is_meant(measure: Measure, name: str) -> bool:
    return name in (measure.name, measure.group, measure.name.partition("/")[2])
