"""arq. Settings: "Reference > arq.worker" of its documentation; recovery: job_timeout + 10 s."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import marks
from arq import create_pool
from arq.connections import RedisSettings

marks.use_uvloop()

REDIS = RedisSettings(unix_socket_path=marks.SOCKET)
# Without it arq writes two lines about each job, which none of the others does.
LOGGING = {"version": 1, "loggers": {"arq": {"level": "WARNING"}}}


async def nothing(ctx: dict[str, Any], number: int, word: str) -> None:
    marks.ran()


async def note_start(ctx: dict[str, Any], number: int, word: str) -> None:
    marks.started(number)


async def sleep(ctx: dict[str, Any], number: int, word: str) -> None:
    await asyncio.sleep(marks.SLEEP_S)
    marks.ended(number)


class WorkerSettings:
    functions: ClassVar = [nothing, note_start, sleep]
    redis_settings = REDIS
    max_jobs = marks.CONCURRENCY
    poll_delay = 0.05
    keep_result = 0
    job_timeout = marks.RECOVERY_S or 300


@asynccontextmanager
async def producing() -> AsyncIterator[tuple[marks.One, marks.Many]]:
    pool = await create_pool(REDIS)

    async def one(task: str, number: int) -> None:
        await pool.enqueue_job(task, number, marks.WORD)

    async def many(task: str, numbers: range) -> None:
        await marks.gather(one(task, number) for number in numbers)

    yield one, many
    await pool.aclose()


if __name__ == "__main__":
    marks.main(producing)
