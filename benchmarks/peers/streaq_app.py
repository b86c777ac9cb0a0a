"""streaQ. Settings: "Worker" and "Task" of its documentation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import marks
from streaq import Worker

marks.use_uvloop()

worker = Worker(
    redis_url=marks.REDIS_URL,
    concurrency=marks.CONCURRENCY,
    idle_timeout=marks.RECOVERY_S or 60,
    anyio_kwargs={"use_uvloop": True},
)


@worker.task(silent=True, ttl=0)
async def nothing(number: int, word: str) -> None:
    marks.ran()


@worker.task(silent=True, ttl=0)
async def note_start(number: int, word: str) -> None:
    marks.started(number)


@worker.task(silent=True, ttl=0)
async def sleep(number: int, word: str) -> None:
    await asyncio.sleep(marks.SLEEP_S)
    marks.ended(number)


TASKS = {"nothing": nothing, "note_start": note_start, "sleep": sleep}


@asynccontextmanager
async def producing() -> AsyncIterator[tuple[marks.One, marks.Many]]:
    async def one(task: str, number: int) -> None:
        await TASKS[task].enqueue(number, marks.WORD)

    async def many(task: str, numbers: range) -> None:
        await worker.enqueue_many([TASKS[task].enqueue(number, marks.WORD) for number in numbers])

    async with worker:
        yield one, many


if __name__ == "__main__":
    marks.main(producing)
