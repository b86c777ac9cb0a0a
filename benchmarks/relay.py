"""How fast a relay process brings waiting rows from PostgreSQL into Redis, while nobody fetches.

Called by suite. Calls stage.
"""

from __future__ import annotations

import time

from jobq.settings import RelaySettings

from .figures import Measure
from .stage import Stage


async def waiting(stage: Stage) -> float:
    """Entries a second, from the first ones in Redis until all are there."""
    count = min(stage.jobs, RelaySettings().ready_limit)
    await stage.fill(count)
    known = (await stage.keys()).known
    async with stage.redis() as client:
        with stage.process("relay"):
            while not (first := await client.hlen(known)):
                await stage.breathe()
            started_at, there = time.perf_counter(), first
            while there < count:
                await stage.breathe()
                there = await client.hlen(known)
            return (count - first) / (time.perf_counter() - started_at)


MEASURES = [Measure("relay/waiting", "entries/s", waiting, "one relay process, rows that wait in the outbox")]
