"""PgQueuer. Settings: "Performance Tuning" of its documentation: batch size, autovacuum, default durability."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg
import marks
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

marks.use_uvloop()


async def setup() -> None:
    connection = await asyncpg.connect(marks.DATABASE_URL)
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    await queries.optimize_autovacuum()
    await connection.close()


@asynccontextmanager
async def producing() -> AsyncIterator[tuple[marks.One, marks.Many]]:
    connection = await asyncpg.connect(marks.DATABASE_URL)
    queries = Queries(AsyncpgDriver(connection))

    async def one(task: str, number: int) -> None:
        await queries.enqueue(task, _payload(number))

    async def many(task: str, numbers: range) -> None:
        count = len(numbers)
        await queries.enqueue([task] * count, [_payload(number) for number in numbers], [0] * count)

    yield one, many
    await connection.close()


@asynccontextmanager
async def writing() -> AsyncIterator[marks.Write]:
    connection = await asyncpg.connect(marks.DATABASE_URL)
    queries = Queries(AsyncpgDriver(connection))

    async def write(number: int) -> None:
        async with connection.transaction():
            await queries.enqueue("nothing", _payload(number))

    yield write
    await connection.close()


def _payload(number: int) -> bytes:
    return json.dumps({"number": number, "word": marks.WORD}).encode()


def _arguments(job: Job) -> tuple[int, str]:
    arguments = json.loads(job.payload or b"{}")
    return arguments["number"], arguments["word"]


async def work() -> None:
    connection = await asyncpg.connect(marks.DATABASE_URL)
    pgq = PgQueuer(AsyncpgDriver(connection))

    @pgq.entrypoint("nothing")
    async def nothing(job: Job) -> None:
        _arguments(job)
        marks.ran()

    @pgq.entrypoint("note_start")
    async def note_start(job: Job) -> None:
        number, _ = _arguments(job)
        marks.started(number)

    @pgq.entrypoint("sleep")
    async def sleep(job: Job) -> None:
        number, _ = _arguments(job)
        await asyncio.sleep(marks.SLEEP_S)
        marks.ended(number)

    await pgq.run(
        batch_size=marks.CONCURRENCY // 2,
        max_concurrent_tasks=marks.CONCURRENCY,
        heartbeat_timeout=timedelta(seconds=marks.RECOVERY_S or 30),
    )


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        asyncio.run(work())
    else:
        marks.main(producing, setup, writing)
