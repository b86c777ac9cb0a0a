"""docs/guarantees.md: its SQL says of every job in which state it is."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from jobq import JobQ
from tests.enqueuing import fetch
from tests.markdown import blocks

PAGE = Path(__file__).parents[2] / "docs" / "guarantees.md"


async def test_the_sql_of_the_page_tells_the_states(shared_database_url: str) -> None:
    jobs = JobQ(database=shared_database_url)

    @jobs.task
    async def work() -> None:
        pass

    async with jobs.database.sessions.begin() as session:
        due = await work.enqueue(session)
        later = await work.opts(delay=timedelta(hours=1)).enqueue(session)
        failed = await work.opts(delay=60).enqueue(session)
    await jobs.database.close()
    await fetch(shared_database_url, "UPDATE jobq.outbox SET attempts = 1 WHERE id = $1", failed.id)

    (query,) = blocks(PAGE, "sql")
    found = await fetch(shared_database_url, query.text)

    assert {row["id"]: row["state"] for row in found} == {
        due.id: "waiting or running",
        later.id: "scheduled",
        failed.id: "retrying",
    }
