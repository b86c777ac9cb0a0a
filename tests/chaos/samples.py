"""How large the processes of a run are, all the time: memory, open files, threads, asyncio tasks.

`sample_tasks` runs in the processes themselves, `Sampler` in the run. What grows shows in the medians of the first and
the last quarter of a process's samples.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import anyio

from tests.chaos import journal
from tests.chaos.processes import Process

VARIABLE = "CHAOS_SAMPLES"
EVERY_S = 3.0
WARM_S = 30.0
"""Of a process's life that is not looked at: caches and pools fill."""
FEWEST = 12


class Growth(NamedTuple):
    """Two medians of one figure."""

    process: str
    figure: str
    first: float
    last: float
    is_flat: bool


SLACK: dict[str, Callable[[float], float]] = {
    "MiB": lambda first: first * 1.1 + 4,
    "files": lambda first: first + 6,
    "threads": lambda first: first + 3,
    "tasks": lambda first: first + 6,
}
"""What the last median may be. Pools and caches breathe with the load; a leak grows with time."""


def sample_tasks(written: journal.Journal) -> None:
    """Have a thread count this process's unfinished asyncio tasks, as long as it lives."""

    def count() -> None:
        while True:
            time.sleep(EVERY_S)
            tasks = sum(isinstance(one, asyncio.Task) and not one.done() for one in gc.get_objects())
            written.write("tasks", tasks)

    threading.Thread(target=count, name="chaos samples", daemon=True).start()


@dataclass
class Sampler:
    """Looks at the processes from outside."""

    folder: Path

    def __post_init__(self) -> None:
        self._figures: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        self._names: dict[int, str] = {}

    @contextmanager
    def running(self, processes: Callable[[], Iterable[Process]]) -> Iterator[None]:
        """Look at them all the time."""
        looking = asyncio.create_task(self._run(processes))
        try:
            yield
        finally:
            looking.cancel()

    async def _run(self, processes: Callable[[], Iterable[Process]]) -> None:
        while True:
            for process in processes():
                if not process.has_ended:
                    name = self._names[process.pid] = f"{process.name} ({process.runtime})"
                    kib, files, threads = process.size()
                    self._add(name, MiB=kib / 1024, files=files, threads=threads)
            await anyio.sleep(EVERY_S)

    def growth(self) -> list[Growth]:
        """First against last, for every process that lived long enough."""
        for pid, at, (what, *words) in journal.read(self.folder, "run"):
            if what == "tasks" and pid in self._names:
                self._figures[self._names[pid], "tasks"].append((at, float(words[0])))
        found = []
        for (process, figure), samples in sorted(self._figures.items()):
            values = [value for at, value in samples if at > samples[0][0] + WARM_S]
            if len(values) >= FEWEST:
                quarter = len(values) // 4
                first, last = median(values[:quarter]), median(values[-quarter:])
                found.append(Growth(process, figure, first, last, last <= SLACK[figure](first)))
        return found

    def _add(self, process: str, **figures: float) -> None:
        for figure, value in figures.items():
            self._figures[process, figure].append((time.time(), value))
