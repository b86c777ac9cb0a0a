"""jobq itself, run as its peers are: relay and worker are `jobq relay` and `jobq worker`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import marks

from jobq import JobQ
from jobq.migrate import upgrade

jobs = JobQ(database=marks.DATABASE_URL, redis=marks.REDIS_URL)


@jobs.task
async def nothing(number: int, word: str) -> None:
    marks.ran()


@jobs.task
async def note_start(number: int, word: str) -> None:
    marks.started(number)


@jobs.task
async def sleep(number: int, word: str) -> None:
    await asyncio.sleep(marks.SLEEP_S)
    marks.ended(number)


TASKS = {"nothing": nothing, "note_start": note_start, "sleep": sleep}


async def setup() -> None:
    await upgrade(jobs.database.engine)
    await jobs.database.close()


@asynccontextmanager
async def producing() -> AsyncIterator[tuple[marks.One, marks.Many]]:
    async def one(task: str, number: int) -> None:
        async with jobs.database.sessions.begin() as session:
            await TASKS[task].enqueue(session, number, marks.WORD)

    async def many(task: str, numbers: range) -> None:
        async with jobs.database.sessions.begin() as session:
            await jobs.enqueue_many(session, (TASKS[task].job(number, marks.WORD) for number in numbers))

    yield one, many
    await jobs.database.close()


@asynccontextmanager
async def writing() -> AsyncIterator[marks.Write]:
    connection = await asyncpg.connect(marks.DATABASE_URL)

    async def write(number: int) -> None:
        async with connection.transaction():
            await nothing.enqueue(connection, number, marks.WORD)

    yield write
    await connection.close()


if __name__ == "__main__":
    marks.use_uvloop()
    marks.main(producing, setup, writing)
