"""How fast waiting jobs are run: no-op jobs with two small arguments, one relay process, one worker process or more.

The rate counts from the first completions until the outbox is empty: every job has been fetched, read, run, deleted
and acked, and no start-up is in it. Called by suite. Calls stage.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from .figures import Measure
from .stage import APP, Stage

COMPLETED = 0.05
"""Of the jobs: those that run through ctx.complete(), a transaction each."""
SLEEPERS = 0.5
"""Of the jobs: those that sleep 20 ms."""


def drain(
    *options: str, task: str = "nothing", share: float = 1.0, loop: str = "uvloop", concurrency: int = 100
) -> Callable[[Stage], Awaitable[float]]:
    async def run(stage: Stage) -> float:
        await stage.fill(round(share * stage.jobs), task)
        words = ("-q", "default", "-c", str(concurrency), "--loop", loop, *options)
        with stage.process("relay"), stage.process("worker", APP, *words):
            return await stage.drain_rate()

    return run


MEASURES = [
    *(
        Measure(
            f"drain/{loop}-{concurrency}",
            "jobs/s",
            drain(loop=loop, concurrency=concurrency),
            f"1 worker process, {loop}, concurrency {concurrency}",
            is_slow=loop == "asyncio" and concurrency != 100,
        )
        for loop in ("uvloop", "asyncio")
        for concurrency in (10, 100, 500)
    ),
    Measure(
        "drain/complete",
        "jobs/s",
        drain(task="complete", share=COMPLETED),
        "1 worker process, uvloop, concurrency 100, each job through `ctx.complete()`; a twentieth of the jobs",
    ),
    Measure(
        "drain/sleep-1ms",
        "jobs/s",
        drain(task="sleep_1ms", concurrency=500),
        "1 worker process, uvloop, concurrency 500, each job awaits 1 ms of sleep",
    ),
    Measure(
        "drain/sleep-20ms",
        "jobs/s",
        drain(task="sleep_20ms", concurrency=500, share=SLEEPERS),
        "the same with 20 ms, half of the jobs; 25,000 is the most there can be",
        is_slow=True,
    ),
    *(
        Measure(
            f"drain/processes-{count}",
            "jobs/s",
            drain("--processes", str(count)),
            f"{count} worker processes, uvloop, concurrency 100 each",
            is_slow=count == 4,
        )
        for count in (2, 4)
    ),
]
