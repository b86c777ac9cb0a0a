"""taskiq-redis: ListQueueBroker by default, RedisStreamBroker for acknowledgement.

Settings: "taskiq-redis" (README) and "CLI" of taskiq's documentation. Without a result backend nothing is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import marks
from taskiq_redis import ListQueueBroker, RedisStreamBroker

broker: Any
if marks.MODE == "stream":
    recovery = {"idle_timeout": 1000 * marks.RECOVERY_S, "unacknowledged_lock_timeout": 5.0} if marks.RECOVERY_S else {}
    broker = RedisStreamBroker(marks.REDIS_URL, consumer_id="0", **recovery)
else:
    broker = ListQueueBroker(marks.REDIS_URL)


@broker.task("nothing")
async def nothing(number: int, word: str) -> None:
    marks.ran()


@broker.task("note_start")
async def note_start(number: int, word: str) -> None:
    marks.started(number)


@broker.task("sleep")
async def sleep(number: int, word: str) -> None:
    await asyncio.sleep(marks.SLEEP_S)
    marks.ended(number)


TASKS = {"nothing": nothing, "note_start": note_start, "sleep": sleep}


@asynccontextmanager
async def producing() -> AsyncIterator[tuple[marks.One, marks.Many]]:
    await broker.startup()

    async def one(task: str, number: int) -> None:
        await TASKS[task].kiq(number, marks.WORD)

    async def many(task: str, numbers: range) -> None:
        await marks.gather(one(task, number) for number in numbers)

    yield one, many
    await broker.shutdown()


if __name__ == "__main__":
    marks.main(producing)
