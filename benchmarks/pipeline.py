"""Everything at once: producers, relay and worker as processes in a steady state, and what each takes of the CPU.

Producers enqueue as fast as the rest keeps up: they pause while BACKLOG jobs wait. The rate is what was acked in
WINDOW_S, WARM_UP_S after the first thousand. Called by suite and latency. Calls stage.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager

from .figures import Measure, Samples
from .stage import APP, PRODUCERS, ROLES, Stage, counted

WARM_UP_S = 2.0
WINDOW_S = 10.0
BACKLOG = 5_000
PROCESSES = 2
WRITERS = 8
"""Of each producer process."""


@asynccontextmanager
async def producing(stage: Stage, *options: str, processes: int = PROCESSES) -> AsyncIterator[None]:
    """Producers that run while the block does."""
    words = ("--processes", str(processes), "--writers", str(WRITERS), "--limit", str(BACKLOG), *options)
    with ExitStack() as stack:
        for _ in range(processes):
            stack.enter_context(stage.module(PRODUCERS, "producer", *words))
        yield


async def warmed_up(stage: Stage) -> None:
    """Wait until jobs have flowed for a while."""
    keys = await stage.keys()
    async with stage.redis() as client:
        wanted = await counted(client, keys, "acked") + 1_000
        while await counted(client, keys, "acked") < wanted:
            await stage.breathe()
    await asyncio.sleep(WARM_UP_S)


async def acked_rate(stage: Stage, seconds: float) -> tuple[float, dict[str, float]]:
    """Jobs a second over the next `seconds`, and CPU seconds of each role for 1,000 of them."""
    keys = await stage.keys()
    async with stage.redis() as client:
        acked, before = await counted(client, keys, "acked"), stage.cpu()
        await asyncio.sleep(seconds)
        acked, used = await counted(client, keys, "acked") - acked, stage.cpu().since(before)
    await stage.breathe()
    return acked / used.elapsed_s, {role: 1_000 * used.seconds[role] / max(acked, 1) for role in ROLES}


def _pipeline(batch: int) -> Callable[[Stage], Awaitable[Samples]]:
    async def run(stage: Stage) -> Samples:
        with stage.process("relay"), stage.process("worker", APP, "-q", "default"):
            async with producing(stage, "--batch", str(batch)):
                await warmed_up(stage)
                rate, cpu_s = await acked_rate(stage, WINDOW_S)
        return {"": rate, **{role.lower(): seconds for role, seconds in cpu_s.items()}}

    return run


MEASURES = [
    Measure(
        f"pipeline/{name}",
        "jobs/s",
        _pipeline(batch),
        f"{PROCESSES} producer processes with {WRITERS} writers each, {about}; 1 relay, 1 worker",
        units={role.lower(): "CPU s per 1,000 jobs" for role in ROLES},
    )
    for name, batch, about in (
        ("single", 1, "one enqueue a transaction"),
        ("batches", 50, "`enqueue_many` of 50 a transaction"),
    )
]
