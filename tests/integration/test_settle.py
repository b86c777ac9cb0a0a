"""The statements that end jobs in PostgreSQL: each names the generation that ran, and passes over locked rows."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from jobq.outbox import settle
from jobq.outbox.database import Database
from jobq.outbox.settle import Burial, Reschedule
from jobq.outbox.statement import _for_asyncpg

SCHEMA = "jobq"


@pytest.fixture
async def db(shared_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(shared_database_url)
    yield connection
    await connection.close()


@asynccontextmanager
async def other_connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    try:
        yield connection
    finally:
        await connection.close()


async def insert(db: asyncpg.Connection, count: int = 1, **columns: object) -> list[UUID]:
    """Jobs in ascending order of id."""
    ids = [UUID(int=uuid.uuid4().int) for _ in range(count)]
    names = "".join(f", {name}" for name in columns)
    marks = "".join(f", ${at}" for at in range(2, 2 + len(columns)))
    for job_id in ids:
        await db.execute(
            f"INSERT INTO jobq.outbox (id, queue, task, args{names}) VALUES ($1, 'default', 'note', '{{}}'{marks})",
            job_id,
            *columns.values(),
        )
    return sorted(ids)


async def ids_left(db: asyncpg.Connection) -> set[UUID]:
    return {UUID(bytes=row["id"].bytes) for row in await db.fetch("SELECT id FROM jobq.outbox")}


async def row_of(db: asyncpg.Connection, job_id: UUID) -> asyncpg.Record:
    row = await db.fetchrow("SELECT *, run_at - now() AS due_in FROM jobq.outbox WHERE id = $1", job_id)
    assert row is not None
    return row


async def test_read_returns_the_rows_that_exist(db: asyncpg.Connection) -> None:
    (job_id,) = await insert(db, generation=3, crashes=2)

    jobs = await settle.read(db, SCHEMA, [job_id, uuid.uuid4()])

    assert list(jobs) == [job_id]
    assert (jobs[job_id].generation, jobs[job_id].crashes, jobs[job_id].args) == (3, 2, "{}")


async def test_complete_deletes_only_the_generation_that_ran(db: asyncpg.Connection) -> None:
    (mine,), (newer,), (older,) = await insert(db), await insert(db, generation=2), await insert(db, generation=1)

    ended = await settle.complete(db, SCHEMA, [(mine, 1), (newer, 1), (older, 2)])

    assert ended == {mine}
    assert await ids_left(db) == {newer, older}


async def test_a_locked_row_does_not_block_the_batch_and_is_completed_later(
    db: asyncpg.Connection, shared_database_url: str
) -> None:
    first, locked, last = await insert(db, 3)
    runs = [(job_id, 1) for job_id in (first, locked, last)]

    async with other_connection(shared_database_url) as other, other.transaction():
        await other.execute("SELECT FROM jobq.outbox WHERE id = $1 FOR UPDATE", locked)
        ended = await asyncio.wait_for(settle.complete(db, SCHEMA, runs), 5)

    assert ended == {first, last}
    assert await settle.complete(db, SCHEMA, runs) == {locked}


async def end(tx: asyncpg.Connection, statement: str, ids: Sequence[UUID]) -> set[UUID]:
    """Run one of the four statements on jobs of generation 1."""
    match statement:
        case "complete":
            return await settle.complete(tx, SCHEMA, [(job_id, 1) for job_id in ids])
        case "reschedule":
            return await settle.reschedule(tx, SCHEMA, [Reschedule(job_id, 1) for job_id in ids])
        case "bury":
            return {job.id for job in await settle.bury(tx, SCHEMA, [Burial(job_id, 1, "rejected") for job_id in ids])}
        case _:
            return await settle.crash(tx, SCHEMA, [(job_id, 1) for job_id in ids])


STATEMENTS = ["complete", "reschedule", "bury", "crash"]


@pytest.mark.parametrize("statement", STATEMENTS)
async def test_every_end_passes_over_a_locked_row(
    db: asyncpg.Connection, shared_database_url: str, statement: str
) -> None:
    free, locked = await insert(db, 2)

    async with other_connection(shared_database_url) as other, other.transaction():
        await other.execute("SELECT FROM jobq.outbox WHERE id = $1 FOR UPDATE", locked)
        ended = await asyncio.wait_for(end(db, statement, [free, locked]), 5)

    assert ended == {free}


@pytest.mark.parametrize("statement", STATEMENTS)
async def test_two_batches_in_opposite_order_do_not_deadlock(
    db: asyncpg.Connection, shared_database_url: str, statement: str
) -> None:
    first, second = await insert(db, 2)

    async with other_connection(shared_database_url) as other, db.transaction(), other.transaction():
        mine = await end(db, statement, [first])
        theirs = await end(other, statement, [second])
        async with asyncio.timeout(5):
            rest = await asyncio.gather(end(db, statement, [second]), end(other, statement, [first]))

    assert (mine, theirs) == ({first}, {second})
    assert rest == [set(), set()], "neither waited for the other"


OF_THE_RELAY = ["poll", "timers", "page", "reread", "tidy_keys", "tidy_steps"]


@pytest.mark.parametrize("statement", [*STATEMENTS, "read", "generations", *OF_THE_RELAY])
async def test_rows_are_found_by_an_index_though_statistics_say_that_the_table_is_empty(
    database_url: str, statement: str
) -> None:
    """They do when a vacuum came while a large transaction was filling it, until the next one comes."""
    database = Database.of(database_url)
    name = "jobq:relay" if statement in OF_THE_RELAY else "jobq:worker"
    connection = await database.connect(schema=SCHEMA, name=name, repeats=True)
    async with other_connection(database_url) as owner, other_connection(database_url) as other, other.transaction():
        await insert_many(other, 5_000)
        await owner.execute("VACUUM ANALYZE jobq.outbox")
    told = await connection.fetchrow("SELECT relpages, reltuples FROM pg_class WHERE oid = 'jobq.outbox'::regclass")
    query, names = _for_asyncpg(statement, SCHEMA)
    await connection.execute(f"PREPARE asked AS {query}")

    plan = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE asked ({', '.join(['NULL'] * len(names))})")

    await connection.close()
    assert told["relpages"] > 10
    assert told["reltuples"] == 0
    scans = [node for node in nodes_of(plan[0]["Plan"]) if node.get("Relation Name") == "outbox"]
    scans = [node for node in scans if node["Node Type"] != "ModifyTable"]
    assert scans
    by_index = {"Index Cond", "TID Cond"} | ({"Recheck Cond"} if statement == "poll" else set())
    assert [node for node in scans if not node.keys() & by_index] == []


async def insert_many(db: asyncpg.Connection, count: int) -> None:
    await db.execute(
        "INSERT INTO jobq.outbox (id, queue, task, args)"
        f" SELECT gen_random_uuid(), 'default', 'note', '{{}}' FROM generate_series(1, {count})"
    )


def nodes_of(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for below in node.get("Plans", []):
        yield from nodes_of(below)


async def test_reschedule_after_a_failure_moves_the_job_on_by_the_clock_of_the_database(
    db: asyncpg.Connection,
) -> None:
    (job_id,) = await insert(db, attempts=2, crashes=2)
    before = await row_of(db, job_id)

    ended = await settle.reschedule(
        db, SCHEMA, [Reschedule(job_id, 1, 60.0, failed=True, error_type="Boom", error="Boom: it broke")]
    )

    row = await row_of(db, job_id)
    assert ended == {job_id}
    assert (row["generation"], row["attempts"], row["crashes"]) == (2, 3, 0)
    assert (row["error_type"], row["last_error"]) == ("Boom", "Boom: it broke")
    assert timedelta(seconds=50) < row["due_in"] <= timedelta(seconds=60)
    assert row["xid"] > before["xid"]


async def test_reschedule_of_an_interrupted_run_is_due_at_once_and_uses_no_attempt(db: asyncpg.Connection) -> None:
    (job_id,) = await insert(db, attempts=2, crashes=1, last_error="an older one")

    await settle.reschedule(db, SCHEMA, [Reschedule(job_id, 1)])

    row = await row_of(db, job_id)
    assert (row["generation"], row["attempts"], row["crashes"], row["run_at"]) == (2, 2, 0, None)
    assert row["last_error"] == "an older one"


async def test_reschedule_of_a_run_that_is_no_longer_the_jobs_changes_nothing(db: asyncpg.Connection) -> None:
    (job_id,) = await insert(db, generation=2)

    ended = await settle.reschedule(db, SCHEMA, [Reschedule(job_id, 1, failed=True)])

    row = await row_of(db, job_id)
    assert ended == set()
    assert (row["generation"], row["attempts"]) == (2, 0)


async def test_bury_moves_the_row_to_the_dead_in_one_statement(db: asyncpg.Connection) -> None:
    (job_id,) = await insert(db, attempts=4, generation=5)

    (dead,) = await settle.bury(db, SCHEMA, [Burial(job_id, 5, "exhausted", error_type="Boom", error="Boom: it broke")])

    row = await db.fetchrow("SELECT * FROM jobq.dead")
    assert row is not None
    assert (dead.id, dead.reason, dead.attempts, dead.error) == (job_id, "exhausted", 5, "Boom: it broke")
    assert (row["attempts"], row["generation"], row["reason"]) == (5, 5, "exhausted")
    assert await ids_left(db) == set()


async def test_bury_of_a_run_that_is_no_longer_the_jobs_changes_nothing(db: asyncpg.Connection) -> None:
    (job_id,) = await insert(db, generation=2)

    assert await settle.bury(db, SCHEMA, [Burial(job_id, 1, "exhausted")]) == []

    assert await ids_left(db) == {job_id}
    assert await db.fetchval("SELECT count(*) FROM jobq.dead") == 0


async def test_a_job_that_died_before_is_buried_over_its_old_grave(db: asyncpg.Connection) -> None:
    (job_id,) = await insert(db)
    await settle.bury(db, SCHEMA, [Burial(job_id, 1, "exhausted", error="first")])
    await db.execute(
        "INSERT INTO jobq.outbox (id, queue, task, args, generation) VALUES ($1, 'q', 't', '{}', 2)", job_id
    )

    await settle.bury(db, SCHEMA, [Burial(job_id, 2, "rejected", error="second")])

    assert [tuple(row) for row in await db.fetch("SELECT generation, reason, last_error FROM jobq.dead")] == [
        (2, "rejected", "second")
    ]


async def test_a_crash_is_counted_once_however_often_it_is_reported(db: asyncpg.Connection) -> None:
    (job_id,) = await insert(db, attempts=1)
    before = await row_of(db, job_id)

    first = await settle.crash(db, SCHEMA, [(job_id, 1)])
    again = await settle.crash(db, SCHEMA, [(job_id, 1)])

    row = await row_of(db, job_id)
    assert (first, again) == ({job_id}, set())
    assert (row["generation"], row["crashes"], row["attempts"]) == (2, 1, 1)
    assert row["xid"] == before["xid"]


async def test_standings_tell_what_is_due(db: asyncpg.Connection) -> None:
    (now,) = await insert(db)
    (later,) = await insert(db, generation=4)
    await db.execute("UPDATE jobq.outbox SET run_at = now() + interval '1 hour' WHERE id = $1", later)

    standings = await settle.standings(db, SCHEMA, [now, later, uuid.uuid4()])

    assert standings == {now: (1, 0, True), later: (4, 0, False)}


async def test_end_backends_ends_the_sessions_of_that_worker_and_waits_until_they_are_gone(
    db: asyncpg.Connection, shared_database_url: str
) -> None:
    ids = await insert(db, 20)
    async with AsyncExitStack() as stack:
        for job_id in ids:
            dead = await stack.enter_async_context(other_connection(shared_database_url))
            await dead.execute("SET application_name = 'jobq:w-dead'")
            await dead.execute("BEGIN")
            await dead.fetch("DELETE FROM jobq.outbox WHERE id = $1", job_id)
        alive = await stack.enter_async_context(other_connection(shared_database_url))
        await alive.execute("SET application_name = 'jobq:w-dead:read'")

        ended = await settle.end_backends(db, SCHEMA, "w-dead")
        left = await db.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'jobq:w-dead'")
        crashed = await settle.crash(db, SCHEMA, [(job_id, 1) for job_id in ids])

        assert (ended, left) == (20, 0)
        assert crashed == set(ids), "the locks of the dead worker's sessions were gone with them"
        assert await alive.fetchval("SELECT 1") == 1
