"""How long a job takes from the end of its COMMIT to its first line, and where the time goes on the way.

Relay and worker are processes of their own (traced.py); this one commits one job at a time, through asyncpg. Idle:
nothing else happens, and the relay sleeps. At half load: producers enqueue half of what the pipeline was just seen to
do at most, beside the jobs that are timed. Samples of all runs are one distribution. Called by suite. Calls stage,
pipeline and traced.
"""

from __future__ import annotations

import asyncio
import random
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from uuid import UUID

from jobq import JobQ

from . import app
from .figures import Measure, Samples
from .pipeline import PROCESSES, acked_rate, producing, warmed_up
from .stage import APP, RELAY, WORKER, Stage
from .traced import FETCHED, PUSHED, READ, STAMP, STARTED

IDLE_SAMPLES = 220
BUSY_SAMPLES = 400
IDLE_PAUSE_S = (0.020, 0.060)
"""Between two samples, so that each meets an idle system, and in step with nothing."""
BUSY_PAUSE_S = (0.0, 0.020)
BATCH = 10
"""Jobs in a transaction of the producers at half load."""
FULL_LOAD_S = 3.0
_STAMPS_BUFFER = 4 * 1024 * 1024
_LOST_AFTER_S = 20.0


class Stamps:
    """What the traced processes have told: letter -> id -> nanoseconds."""

    def __init__(self, there: socket.socket):
        self._there = there
        self.at: dict[bytes, dict[bytes, int]] = defaultdict(dict)

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[tuple[Stamps, str]]:
        with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
            path = Path(directory) / "stamps"
            there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _STAMPS_BUFFER)
            there.bind(str(path))
            there.setblocking(False)
            stamps = cls(there)
            asyncio.get_running_loop().add_reader(there, stamps._hear)
            try:
                yield stamps, str(path)
            finally:
                asyncio.get_running_loop().remove_reader(there)

    def _hear(self) -> None:
        told = self._there.recv(1 << 20)
        self.at[told[:1]].update(STAMP.iter_unpack(told[1:]))


async def idle(stage: Stage) -> Samples:
    async with _traced(stage) as stamps, stage.application() as application:
        await _probe(stage, application, stamps, 20, IDLE_PAUSE_S)  # what is opened on the way is open then
        return await _probe(stage, application, stamps, min(IDLE_SAMPLES, stage.jobs), IDLE_PAUSE_S)


async def half_load(stage: Stage) -> Samples:
    async with _traced(stage) as stamps, stage.application() as application:
        async with producing(stage, "--batch", str(BATCH)):
            await warmed_up(stage)
            most, _ = await acked_rate(stage, FULL_LOAD_S)
        async with stage.database() as connection:
            await stage.until_empty(connection)
        rate = most / 2 / PROCESSES / BATCH
        async with producing(stage, "--batch", str(BATCH), "--rate", f"{rate:.3f}"):
            await warmed_up(stage)
            found = await _probe(stage, application, stamps, min(BUSY_SAMPLES, stage.jobs), BUSY_PAUSE_S)
            done, _ = await acked_rate(stage, 1.0)
    return found | {"full-load": most, "load": done}


@asynccontextmanager
async def _traced(stage: Stage) -> AsyncIterator[Stamps]:
    command = [sys.executable, "-m", "benchmarks.traced"]
    with Stamps.open() as (stamps, path):
        relay = [*command, "relay", "--log-level", "error"]
        worker = [*command, "worker", APP, "-q", "default", "--log-level", "error"]
        with stage.command(RELAY, relay, BENCH_STAMPS=path), stage.command(WORKER, worker, BENCH_STAMPS=path):
            yield stamps


async def _probe(
    stage: Stage, application: JobQ, stamps: Stamps, count: int, pause_s: tuple[float, float]
) -> dict[str, float | list[float]]:
    """Commit jobs one by one, each after the start of the one before."""
    committed: dict[bytes, int] = {}
    async with stage.database() as connection:
        for _ in range(count):
            async with connection.transaction():
                job = await app.probe.enqueue(connection)
            committed[job.id.bytes] = time.monotonic_ns()
            await _until_heard(stage, stamps, job.id)
            await asyncio.sleep(random.uniform(*pause_s))
    marks = [committed, *(stamps.at[letter] for letter in (PUSHED, FETCHED, READ, STARTED))]
    ms = [[mark[id_] / 1e6 for mark in marks] for id_ in committed]
    return {
        "start": [max(0.0, row[4] - row[0]) for row in ms],
        # A relay may be faster than the answer to COMMIT.
        "committed-pushed": [max(0.0, row[1] - row[0]) for row in ms],
        "pushed-fetched": [row[2] - row[1] for row in ms],
        "fetched-read": [row[3] - row[2] for row in ms],
        "read-started": [row[4] - row[3] for row in ms],
    }


async def _until_heard(stage: Stage, stamps: Stamps, job_id: UUID) -> None:
    async with asyncio.timeout(_LOST_AFTER_S):
        while not all(job_id.bytes in stamps.at[letter] for letter in (PUSHED, FETCHED, READ, STARTED)):
            await stage.breathe()


MEASURES = [
    Measure("latency/idle", "ms", idle, "from the end of COMMIT to the first line, one job at a time"),
    Measure(
        "latency/half-load",
        "ms",
        half_load,
        "the same beside producers that enqueue half of what the system was just seen to do",
        units={"full-load": "jobs/s", "load": "jobs/s"},
    ),
]
