"""All that runs: two servers, relays, workers, producers; and who of them is who.

Invariant: a process that ends without being told to is noticed, and fails the run. Faults use what is here to break
things, and put something in the place of what they broke.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle, product
from pathlib import Path

from jobq.embedded import Servers
from tests.chaos import app, journal, samples
from tests.chaos.observer import Observer
from tests.chaos.processes import Process
from tests.waiting import until

ROOT = Path(__file__).parents[2]
APP = "tests.chaos.app:jobs"
KILLED = 247
_START_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How much of everything a run has."""

    workers: int = 4
    relays: int = 2
    producers: int = 2
    slots: int = 16
    lease_s: float = 2.5
    beat_s: float = 0.4
    orders_per_second: float = 150.0
    pythons: tuple[str, ...] = (sys.executable,)
    loops: tuple[str, ...] = ("auto",)
    is_sampled: bool = False
    """Whether the processes count their tasks."""

    @property
    def capacity(self) -> int:
        """Jobs that run at one moment, of all workers."""
        return self.workers * self.slots


@dataclass(eq=False)
class Stage:
    """The processes of a run.

    1. `start` starts them and returns when each does its work;
    2. faults kill and stop them, and `replace` those that ended;
    3. `check` raises when one ended that nobody told to;
    4. `stop` ends them as a deployment would, and returns their exit codes.
    """

    shape: Shape
    servers: Servers
    folder: Path
    seed: int
    observer: Observer
    workers: list[Process] = field(default_factory=list)
    relays: list[Process] = field(default_factory=list)
    producers: list[Process] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    """What each worker goes by in Redis, by its pid."""

    def __post_init__(self) -> None:
        self._count = 0
        self._runtimes = cycle(product(self.shape.loops, self.shape.pythons))
        variables = {name: value for name, value in os.environ.items() if not name.startswith("JOBQ_")}
        self._environment = {
            **variables,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "JOBQ_DATABASE_URL": self.servers.database_url,
            "JOBQ_REDIS_URL": self.servers.redis_url,
            "JOBQ_LEASE": str(self.shape.lease_s),
            "JOBQ_BEAT": str(self.shape.beat_s),
            "JOBQ_LOG_FORMAT": "text",
            journal.VARIABLE: str(self.folder),
            **({samples.VARIABLE: "1"} if self.shape.is_sampled else {}),
        }

    async def start(self) -> None:
        """Start everything, and return when all of it is at work."""
        self.relays = [self._relay() for _ in range(self.shape.relays)]
        self.workers = [self._worker() for _ in range(self.shape.workers)]
        await self.ready()
        self.start_producers()

    def start_producers(self) -> None:
        rate = self.shape.orders_per_second / self.shape.producers
        for number in range(self.shape.producers):
            command = ["-m", "tests.chaos.producer", f"{self.seed}-{number}", str(rate)]
            self.producers.append(self._add("producer", [sys.executable, *command]))

    async def ready(self) -> None:
        """Return when Redis knows every worker, and each relay has found its place."""

        async def are_known() -> bool:
            self.check()
            self.names |= await self.observer.names()
            return all(worker.pid in self.names for worker in self.workers)

        await until(are_known, f"the workers are known to Redis{self._last_words()}", _START_S)
        for relay in self.relays:
            await until(lambda relay=relay: "relay stands by" in relay.said(), f"{relay.name} is ready", _START_S)  # type: ignore[misc]
        await until(lambda: self.leader() is not None, "a relay leads", _START_S)

    def leader(self) -> Process | None:
        """The relay that leads, as the logs say."""
        return next((relay for relay in self.relays if not relay.has_ended and _leads(relay.said())), None)

    def name_of(self, worker: Process) -> str:
        return self.names[worker.pid]

    def replace(self, ended: Process) -> Process:
        """Start another where one was."""
        group, start = (self.workers, self._worker) if ended in self.workers else (self.relays, self._relay)
        place = group.index(ended)
        group[place] = start()
        return group[place]

    def check(self) -> None:
        """Raise when a process ended that nobody told to."""
        ended = [process for process in self.all if process.has_ended]
        assert not ended, "ended without being told to:\n" + "\n".join(process.last_words() for process in ended)

    @property
    def all(self) -> list[Process]:
        return [*self.workers, *self.relays, *self.producers]

    async def stop_producers(self) -> list[tuple[str, int]]:
        codes = await _stopped(self.producers)
        self.producers.clear()
        return codes

    async def stop(self) -> list[tuple[str, int]]:
        """End workers, then relays, by SIGTERM. Returns their exit codes."""
        codes = await _stopped(self.workers) + await _stopped(self.relays)
        self.workers.clear()
        self.relays.clear()
        return codes

    def kill(self) -> None:
        for process in self.all:
            process.kill()

    def _relay(self) -> Process:
        return self._serving("relay", [])

    def _worker(self) -> Process:
        options = ["-q", ",".join(app.QUEUES), "-c", str(self.shape.slots), "--threads", "4", "--grace", "2"]
        return self._serving("worker", ["--log-level", "warning", *options])

    def _serving(self, kind: str, options: list[str]) -> Process:
        loop, python = next(self._runtimes)
        return self._add(
            kind, [python, "-m", "jobq", kind, APP, "--loop", loop, *options], f"{_version(python)}, {loop}"
        )

    def _add(self, kind: str, command: list[str], runtime: str = "") -> Process:
        self._count += 1
        name = f"{kind}-{self._count}"
        return Process(name, command, self._environment, self.folder / f"{name}.log", runtime)

    def _last_words(self) -> str:
        return "".join(f"\n{process.last_words(3)}" for process in self.all)


async def _stopped(processes: Iterable[Process]) -> list[tuple[str, int]]:
    for process in processes:
        process.signal(signal.SIGTERM)
    return [(process.name, await process.ends()) for process in processes]


@cache
def _version(python: str) -> str:
    return subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.strip()


def _leads(log: str) -> bool:
    return log.rfind("relay leads") > log.rfind("relay stands by")
