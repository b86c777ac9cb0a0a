"""docket (pydocket). Settings: "Docket in Production" of its documentation, with its fire-and-forget mode."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import marks
from docket import Docket, Worker

marks.use_uvloop()


async def nothing(number: int, word: str) -> None:
    marks.ran()


async def note_start(number: int, word: str) -> None:
    marks.started(number)


async def sleep(number: int, word: str) -> None:
    await asyncio.sleep(marks.SLEEP_S)
    marks.ended(number)


TASKS = {"nothing": nothing, "note_start": note_start, "sleep": sleep}


@asynccontextmanager
async def connected() -> AsyncIterator[Docket]:
    # As many connections as jobs at a time, and some: with redis-py's 100 the worker of 100 runs out of them.
    url = f"{marks.REDIS_URL}?max_connections={2 * marks.CONCURRENCY}"
    async with Docket(url=url, execution_ttl=timedelta(0)) as docket:
        for task in TASKS.values():
            docket.register(task)
        yield docket


@asynccontextmanager
async def producing() -> AsyncIterator[tuple[marks.One, marks.Many]]:
    async with connected() as docket:

        async def one(task: str, number: int) -> None:
            await docket.add(TASKS[task])(number, marks.WORD)

        async def many(task: str, numbers: range) -> None:
            await docket.add_many(docket.call(TASKS[task])(number, marks.WORD) for number in numbers)

        yield one, many


async def work() -> None:
    async with (
        connected() as docket,
        Worker(
            docket,
            concurrency=marks.CONCURRENCY,
            redelivery_timeout=timedelta(seconds=marks.RECOVERY_S or 300),
        ) as worker,
    ):
        await worker.run_forever()


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        asyncio.run(work())
    else:
        marks.main(producing)
