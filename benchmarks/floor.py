"""What this design could do at most: its SQL files and Lua scripts as straight code (straight.py), beside jobq itself.

Each run drains with the straight script and with jobq in turn, both with one relay and one worker process on uvloop.
Called by suite. Calls drain and stage.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from .drain import drain
from .figures import Measure, Samples
from .stage import RELAY, WORKER, Stage


def _floor(batch: int) -> Callable[[Stage], Awaitable[Samples]]:
    async def run(stage: Stage) -> Samples:
        await stage.fill(stage.jobs)
        with stage.module(RELAY, "straight", "push"), stage.module(WORKER, "straight", "work", str(batch)):
            floor = await stage.drain_rate()
        await stage.clear()
        jobq = await drain(concurrency=batch)(stage)
        return {"": floor, "jobq": jobq, "ratio": jobq / floor}

    return run


MEASURES = [
    Measure(
        f"floor/{batch}",
        "jobs/s",
        _floor(batch),
        f"batches of {batch}; and jobq with concurrency {batch} in the same run",
        is_slow=batch != 100,
        units={"ratio": "of the floor"},
    )
    for batch in (100, 500)
]
