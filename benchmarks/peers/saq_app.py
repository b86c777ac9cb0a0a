"""SAQ, on Redis or PostgreSQL. Settings: its README and the docstrings of `saq.worker.Worker` and `saq.job.Job`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import marks
from saq import Queue

marks.use_uvloop()

IS_RELIABLE = marks.MODE.endswith("reliable")
OPTIONS: dict[str, Any] = {"retries": 5} if IS_RELIABLE else {}
if marks.RECOVERY_S:
    OPTIONS["timeout"] = marks.RECOVERY_S


def make_queue() -> Queue:
    if marks.MODE.startswith("postgresql"):
        from saq.queue.postgres import PostgresQueue

        return PostgresQueue.from_url(marks.DATABASE_URL)
    from saq.queue.redis import RedisQueue

    return RedisQueue.from_url(marks.REDIS_URL)


async def nothing(ctx: dict[str, Any], *, number: int, word: str) -> None:
    marks.ran()


async def note_start(ctx: dict[str, Any], *, number: int, word: str) -> None:
    marks.started(number)


async def sleep(ctx: dict[str, Any], *, number: int, word: str) -> None:
    await asyncio.sleep(marks.SLEEP_S)
    marks.ended(number)


def settings() -> dict[str, Any]:
    return {
        "queue": make_queue(),
        "functions": [nothing, note_start, sleep],
        "concurrency": marks.CONCURRENCY,
        "timers": {"sweep": 1} if marks.RECOVERY_S else {},
    }


async def setup() -> None:
    queue = make_queue()
    await queue.connect()
    await queue.disconnect()


@asynccontextmanager
async def producing() -> AsyncIterator[tuple[marks.One, marks.Many]]:
    queue = make_queue()
    await queue.connect()

    async def one(task: str, number: int) -> None:
        await queue.enqueue(task, number=number, word=marks.WORD, **OPTIONS)

    async def many(task: str, numbers: range) -> None:
        await marks.gather(one(task, number) for number in numbers)

    yield one, many
    await queue.disconnect()


if __name__ == "__main__":
    marks.main(producing, setup)
