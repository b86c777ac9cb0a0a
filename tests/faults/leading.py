"""A relay of a bench that takes turn after turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from jobq.relay.leadership import pause
from tests.builders import Bench


@asynccontextmanager
async def leading(bench: Bench) -> AsyncIterator[None]:
    """A relay that takes turn after turn."""
    stopping = asyncio.Event()
    leader = await bench.leader(detect_loss_every=0.1, scrub_every=0.2)

    async def lead() -> None:
        while not stopping.is_set():
            await pause(await leader.step(), leader.woken)

    async with asyncio.TaskGroup() as group:
        group.create_task(lead())
        try:
            yield
        finally:
            stopping.set()
            leader.woken.set()
