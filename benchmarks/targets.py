"""The targets, and what the figures say of them. Data, and one comparison.

Called by __main__. Calls nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One figure is to be at least, or at most, `bound`: itself, or divided by the largest of other figures."""

    what: str
    figure: str
    bound: float
    unit: str = ""
    is_most: bool = False
    statistic: str = "median"
    """`median`, `p50`, `p99`, `p99.9`, `min` or `max` of the figure."""
    over: tuple[str, ...] = ()
    """Those others."""


@dataclass(frozen=True)
class Verdict:
    target: Target
    found: float
    is_met: bool


ASYNCIO_REDIS_PEERS = tuple(
    f"peers/{name}" for name in ("arq", "saq", "streaq", "taskiq-list", "taskiq-stream", "docket")
)
OTHER_PEERS = tuple(
    f"peers/{name}"
    for name in (
        "saq-postgresql",
        "dramatiq",
        "celery",
        "celery-late",
        "procrastinate",
        "pgqueuer",
        "bullmq",
        "graphile-worker",
        "graphile-worker-batch",
    )
)

TARGETS = (
    Target("drain, one worker process", "drain/uvloop-100", 30_000, "jobs/s"),
    Target("drain, of the fastest peer", "peers/jobq", 1.4, over=(*ASYNCIO_REDIS_PEERS, *OTHER_PEERS)),
    Target("drain, of the fastest asyncio peer on Redis", "peers/jobq", 7, over=ASYNCIO_REDIS_PEERS),
    Target("drain, of the floor", "floor/100/ratio", 0.6),
    Target("relay", "relay/waiting", 60_000, "entries/s"),
    Target(
        "enqueue, 16 writers, of the same transaction with a plain INSERT of the same shape",
        "enqueue/16-writers/of-plain",
        0.85,
    ),
    Target(
        "enqueue, 16 writers, of the larger of PgQueuer's and procrastinate's",
        "peers/jobq-enqueue",
        2,
        over=("peers/pgqueuer-enqueue", "peers/procrastinate-enqueue"),
    ),
    Target("enqueue_many of 10,000", "enqueue/many", 60_000, "jobs/s"),
    Target("commit to start, idle, p50", "latency/idle/start", 2.0, "ms", is_most=True, statistic="p50"),
    Target("commit to start, idle, p99", "latency/idle/start", 5.0, "ms", is_most=True, statistic="p99"),
    Target("drain with 1,000,000 waiting, of the rate with 10,000", "growth/waiting/1m-of-10k", 0.9),
    Target("drain of the last 50,000 of 300,000 under a held snapshot, of the first", "growth/snapshot/ratio", 0.8),
    Target("Redis for a waiting job", "growth/redis/job", 150, "bytes", is_most=True),
    Target("Redis with 1,000,000 waiting, of 100,000", "growth/redis/beyond-cap", 1.1, is_most=True),
    Target("WAL for a small job, its whole life", "growth/wal/single", 700, "bytes", is_most=True),
)


def verdicts(figures: Mapping[str, Mapping[str, float]]) -> list[Verdict]:
    """Of the targets whose figures there are, given as name -> statistic -> value."""
    found = []
    for target in TARGETS:
        others = [figures[name]["median"] for name in target.over if name in figures]
        if target.figure in figures and (others or not target.over):
            value = figures[target.figure][target.statistic] / max(others, default=1.0)
            is_met = value <= target.bound if target.is_most else value >= target.bound
            found.append(Verdict(target, value, is_met))
    return found
