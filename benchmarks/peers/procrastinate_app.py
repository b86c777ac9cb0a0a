"""procrastinate.

Settings: "Launch a worker", "Defer multiple jobs", "Delete finished jobs", "Retry stalled jobs" and "Using an external
database connection" of its documentation.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import marks
import psycopg
from procrastinate import App, PsycopgConnector

marks.use_uvloop()

app = App(connector=PsycopgConnector(conninfo=marks.DATABASE_URL, max_size=20))


@app.task(name="nothing")
async def nothing(number: int, word: str) -> None:
    marks.ran()


@app.task(name="note_start")
async def note_start(number: int, word: str) -> None:
    marks.started(number)


@app.task(name="sleep")
async def sleep(number: int, word: str) -> None:
    await asyncio.sleep(marks.SLEEP_S)
    marks.ended(number)


TASKS = {"nothing": nothing, "note_start": note_start, "sleep": sleep}

if marks.MODE == "reliable":
    # The documented periodic task; every second instead of every tenth minute when the recovery is measured.
    @app.periodic(cron="* * * * * *" if marks.RECOVERY_S else "*/10 * * * *")
    @app.task(queueing_lock="retry_stalled_jobs", pass_context=True)
    async def retry_stalled_jobs(context: Any, timestamp: int) -> None:
        for job in await app.job_manager.get_stalled_jobs(seconds_since_heartbeat=marks.RECOVERY_S or 30):
            await app.job_manager.retry_job(job)


async def setup() -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


@asynccontextmanager
async def producing() -> AsyncIterator[tuple[marks.One, marks.Many]]:
    async with app.open_async():

        async def one(task: str, number: int) -> None:
            await TASKS[task].defer_async(number=number, word=marks.WORD)

        async def many(task: str, numbers: range) -> None:
            await TASKS[task].batch_defer_async(*({"number": number, "word": marks.WORD} for number in numbers))

        yield one, many


@asynccontextmanager
async def writing() -> AsyncIterator[marks.Write]:
    connection = await psycopg.AsyncConnection.connect(marks.DATABASE_URL)

    async def write(number: int) -> None:
        async with connection.transaction():
            await nothing.configure(connection=connection).defer_async(number=number, word=marks.WORD)

    async with connection:
        yield write


async def work() -> None:
    beats = {"update_heartbeat_interval": 1.0, "stalled_worker_timeout": float(marks.RECOVERY_S)}
    async with app.open_async():
        await app.run_worker_async(
            concurrency=marks.CONCURRENCY,
            delete_jobs="successful",
            **(beats if marks.RECOVERY_S else {}),
        )


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        asyncio.run(work())
    else:
        marks.main(producing, setup, writing)
