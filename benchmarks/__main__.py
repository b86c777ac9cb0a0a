"""`python -m benchmarks`: throughput and latency of jobq on this machine, on private servers with fsync on.

Each figure is the median of --repeat runs, with the smallest and the largest. Absolute figures belong to one
machine and one moment; compare only what one run printed.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import statistics
from collections.abc import Awaitable, Callable

from jobq import embedded

from . import measures, recovery

Measure = Callable[[measures.Stage], Awaitable[float | list[float]]]
"""One figure a run, or many: then those of all runs are one distribution."""

MEASURES: dict[str, tuple[str, Measure]] = {
    "enqueue": ("transactions/s, 16 writers, one enqueue each", measures.enqueue),
    "enqueue-ratio": ("of the same transactions with a plain INSERT of the same shape", measures.enqueue_ratio),
    "enqueue-many": ("jobs/s, enqueue_many of 10,000 jobs in one transaction", measures.enqueue_many),
    "relay": ("entries/s from PostgreSQL into Redis", measures.relay),
    "drain": ("jobs/s, one worker process and one relay process, no-op jobs", measures.drain),
    "bounded": (
        "of Redis's memory for 100,000 waiting jobs, at its highest while 1,000,000 are drained",
        measures.bounded,
    ),
    "latency-p50": ("ms from commit to start, idle system", measures.latency_p50),
    "latency-p99": ("ms from commit to start, idle system", measures.latency_p99),
    "orphans": ("s from SIGKILL of a worker to the next run of each of its 25 jobs, lease 15 s", recovery.orphans),
    "orphans-5s": ("s, the same with a lease of 5 s", recovery.orphans_of_short_lease),
    "redis-loss": ("s from FLUSHALL until all of 10,000 waiting jobs are in Redis again", recovery.redis_loss),
}
SLOW = ("bounded", "orphans", "orphans-5s", "redis-loss")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 dev.py bench", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"one or more of: {', '.join(MEASURES)}; if none all but {', '.join(SLOW)}",
    )
    parser.add_argument("--jobs", type=int, default=100_000, help="jobs to drain (default 100000)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each measure (default 3)")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in MEASURES]
    if unknown:
        parser.error(f"no measure is called {unknown[0]!r}; there are {', '.join(MEASURES)}")
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, fsync on, appendonly on")
    logging.getLogger("jobq").setLevel(logging.ERROR)
    with embedded.start(durable=True) as servers:
        stage = measures.Stage(servers, jobs=options.jobs)
        for name in options.names or [name for name in MEASURES if name not in SLOW]:
            unit, measure = MEASURES[name]
            figures = sorted(figure for _ in range(options.repeat) for figure in _run(stage, measure))
            median = statistics.median(figures)
            print(f"{name:14} {median:>12,.2f}  ({figures[0]:,.2f} to {figures[-1]:,.2f})  {unit}", flush=True)


def _run(stage: measures.Stage, measure: Measure) -> list[float]:
    found = asyncio.run(stage.fresh(measure))
    return found if isinstance(found, list) else [found]


main()
