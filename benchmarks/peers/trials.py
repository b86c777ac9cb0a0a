"""How every peer is measured: the same trials, over empty stores, with processes that end with the trial.

    drain       a backlog and one worker: jobs a second from the first run of a task to the last, as the tasks count
    latencies   an idle worker: from the return of enqueue to the task's first line, one job at a time
    enqueue     16 writers on asyncio and no worker: transactions a second, each with one job
    kill        SIGKILL of the worker and all its children 1.1 seconds after the first of 500 jobs of 0.2 s has
                ended, a second worker at once, then the wait; one further job a second goes on, as in a live system

Called by the measures. Calls environments.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import redis.asyncio

from jobq import embedded

from . import environments, marks
from .environments import PeerFailed
from .peers import Peer

KILL_JOBS = 500
KILL_CONCURRENCY = 10
LATENCY_SAMPLES = 200
_KILL_AFTER_S = 1.1
"""Five jobs and a half after the first has ended, so that whoever keeps time is killed in the middle of jobs."""
_LONGEST_KILL_S = 90.0
_LONGEST_DRAIN_S = 180.0
_LONGEST_COMMAND_S = 180.0
_DATABASE = "peers"
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Trial:
    """One peer on empty stores, with a directory that its processes write to."""

    peer: Peer
    directory: Path
    variables: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    async def produce(self, *words: str) -> None:
        """Run a command of the peer's producer to its end. Raises PeerFailed."""
        process = self.start([*self._interpreter(), str(environments.app_of(self.peer)), *words])
        await self.until(lambda: process.poll() is not None, _LONGEST_COMMAND_S, f"`{' '.join(words)}`")
        if process.returncode != 0:
            raise PeerFailed(f"`{' '.join(words)}` failed: {self.last_words()}")

    async def settle(self) -> None:
        """Let PostgreSQL know the tables that were just filled, as autovacuum would have, and write what it has to."""
        connection = await asyncpg.connect(self.variables["PEERS_DATABASE_URL"])
        await connection.execute("VACUUM ANALYZE")
        await connection.execute("CHECKPOINT")
        await connection.close()

    def start_worker(self) -> subprocess.Popen[bytes]:
        return self.start(self._words(self.peer.worker))

    def start_beside(self) -> None:
        """Start what the peer needs beside its worker."""
        for command in self.peer.beside:
            self.start(self._words(command))

    def start_trickle(self) -> None:
        self.start([*self._interpreter(), str(environments.app_of(self.peer)), "trickle"])

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=self.variables,
                cwd=environments.HERE,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL to the process and all of its children."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-process.pid, 0)  # its children are ours now: their CPU seconds, too

    async def until(self, condition: Callable[[], object], longest_s: float, what: str) -> None:
        """Wait for it, while no process fails. Raises PeerFailed."""
        deadline = time.monotonic() + longest_s
        while not condition():
            if time.monotonic() > deadline:
                raise PeerFailed(f"{what} not done in {longest_s:.0f} s: {self.last_words()}")
            dead = [process for process in self.processes if process.poll() not in (None, 0, -signal.SIGKILL)]
            if dead:
                raise PeerFailed(f"a process ended with {dead[0].returncode}: {self.last_words()}")
            await asyncio.sleep(0.01)

    def last_words(self) -> str:
        """The last line of the log that names an error, else the last of all."""
        lines = [line.strip() for line in self.read("log").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return [*lines, *errors][-1][:300] if lines else "it said nothing"

    def read(self, name: str) -> str:
        path = self.directory / name
        return path.read_text(errors="replace") if path.exists() else ""

    def runs(self) -> int:
        return sum(memoryview((self.directory / "runs").read_bytes()).cast("q"))

    def ends(self) -> list[int]:
        return read_ends(self.read("ends"))

    def _interpreter(self) -> list[str]:
        return ["node"] if self.peer.is_node else [environments.python_of(self.peer)]

    def _words(self, command: str) -> list[str]:
        python = environments.python_of(self.peer)
        places = {
            "python": python,
            "bin": str(Path(python).parent),
            "app": str(environments.app_of(self.peer)),
            "module": Path(self.peer.app).stem,
            "concurrency": self.variables["PEERS_CONCURRENCY"],
        }
        return shlex.split(command.format(**places))


async def drain(peer: Peer, servers: embedded.Servers, jobs: int) -> float:
    """Jobs a second of one worker. Raises PeerFailed."""
    async with _fresh(peer, servers, jobs=jobs) as trial:
        await trial.produce("fill", "nothing", str(jobs))
        await trial.settle()
        trial.start_beside()
        trial.start_worker()
        await trial.until(lambda: trial.runs() > 0, _LONGEST_COMMAND_S, "the first job")
        before, started = trial.runs(), time.monotonic()
        await trial.until(lambda: trial.runs() >= jobs, _LONGEST_DRAIN_S, f"{jobs} jobs")
        return (jobs - before) / (time.monotonic() - started)


async def latencies(peer: Peer, servers: embedded.Servers, samples: int) -> list[float]:
    """Milliseconds; fewer than asked for where a peer takes so long that 20 s are over. Raises PeerFailed."""
    async with _fresh(peer, servers) as trial:
        trial.start_beside()
        trial.start_worker()
        await trial.produce("latency", str(samples))
        starts, returns = (_times(trial.read(name)) for name in ("starts", "returns"))
        return [max(0, starts[number] - at) / 1e6 for number, at in returns.items() if number >= 0]


async def enqueue(peer: Peer, servers: embedded.Servers) -> float:
    """Transactions a second. Raises PeerFailed."""
    async with _fresh(peer, servers) as trial:
        await trial.settle()
        await trial.produce("enqueue")
        return float(trial.read("rate"))


async def kill(peer: Peer, servers: embedded.Servers) -> dict[str, float | list[float]]:
    """How many jobs were lost and how many ran twice, and, where all were done, how soon. Raises PeerFailed."""
    async with _fresh(peer, servers, concurrency=KILL_CONCURRENCY, recovery_s=peer.recovery_s) as trial:
        trial.variables |= peer.recovery_variables
        await trial.produce("fill", "sleep", str(KILL_JOBS))
        trial.start_beside()
        doomed = trial.start_worker()
        await trial.until(lambda: trial.ends(), _LONGEST_COMMAND_S, "the first job")
        await asyncio.sleep(_KILL_AFTER_S)
        trial.end(doomed)
        killed_at = time.monotonic()
        trial.start_worker()
        trial.start_trickle()
        return await _watch(trial, killed_at)


async def _watch(trial: Trial, killed_at: float) -> dict[str, float | list[float]]:
    """Wait until nothing moved for as long as the peer's recovery may take, or for a minute and a half."""
    seen, moved_at = 0, killed_at
    done: dict[str, float | list[float]] = {}
    while time.monotonic() - moved_at < trial.peer.back_s and time.monotonic() - killed_at < _LONGEST_KILL_S:
        await asyncio.sleep(0.02)
        ends = trial.ends()
        if len(ends) > seen:
            seen, moved_at = len(ends), time.monotonic()
            if not done and len(set(ends)) == KILL_JOBS:
                done = {"done": moved_at - killed_at}
    lost, twice = count_ends(trial.ends(), KILL_JOBS)
    return {"lost": lost, "twice": twice} | done


def count_ends(ends: Iterable[int], jobs: int) -> tuple[int, int]:
    """Count the lost and the twice run among jobs 0 to `jobs` - 1."""
    runs = Counter(number for number in ends if 0 <= number < jobs)
    return jobs - len(runs), sum(1 for count in runs.values() if count > 1)


def read_ends(text: str) -> list[int]:
    """Read the numbers of all complete lines: a killed process may have left a piece of one."""
    complete, _, _ = text.rpartition("\n")
    return [int(line) for line in complete.split("\n") if line.isdigit()]


@asynccontextmanager
async def _fresh(
    peer: Peer, servers: embedded.Servers, *, concurrency: int | None = None, jobs: int = 0, recovery_s: int = 0
) -> AsyncIterator[Trial]:
    """Empty stores, the peer's schema in them, and the end of all its processes."""
    await asyncio.to_thread(environments.make_ready, peer)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what a killed worker leaves behind becomes our child
    administration = await asyncpg.connect(servers.database_url)
    await administration.execute(f"DROP DATABASE IF EXISTS {_DATABASE} WITH (FORCE)")
    await administration.execute(f"CREATE DATABASE {_DATABASE}")
    async with redis.asyncio.Redis.from_url(servers.redis_url) as client:
        await client.flushall()
    with tempfile.TemporaryDirectory(prefix="peers-") as directory:
        _clear_runs(Path(directory))
        database_url = servers.database_url.replace("/postgres?", f"/{_DATABASE}?")
        variables = environments.variables() | {
            "PYTHONPATH": str(environments.HERE),
            "PEERS_ENVIRONMENT": str(environments.directory_of(peer)),
            "PEERS_DIRECTORY": directory,
            "PEERS_DATABASE_URL": database_url,
            "PEERS_SOCKET": servers.redis_url.removeprefix("unix://"),
            "PEERS_CONCURRENCY": str(concurrency or peer.concurrency),
            "PEERS_RECOVERY_S": str(recovery_s),
            "PEERS_MODE": peer.mode,
            "PEERS_JOBS": str(jobs),
            "JOBQ_DATABASE_URL": database_url,
            "JOBQ_REDIS_URL": servers.redis_url,
        }
        trial = Trial(peer, Path(directory), variables)
        try:
            await trial.produce("setup")
            yield trial
        finally:
            for process in reversed(trial.processes):
                trial.end(process)
            await administration.execute(f"DROP DATABASE IF EXISTS {_DATABASE} WITH (FORCE)")
            await administration.close()


def _clear_runs(directory: Path) -> None:
    (directory / "runs").write_bytes(bytes(8 * marks.SLOTS))


def _times(text: str) -> dict[int, int]:
    """The first time noted for each number."""
    found: dict[int, int] = {}
    for line in text.splitlines():
        number, _, at = line.partition(" ")
        found.setdefault(int(number), int(at))
    return found
