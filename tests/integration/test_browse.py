"""outbox.browse: counts, lists, and what people do to waiting and dead jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import UUID

import asyncpg
import pytest

from jobq.model import new_job_id
from jobq.outbox import browse
from jobq.outbox.browse import DeadFilter
from jobq.outbox.follow import try_lead
from tests.builders import any_id

SCHEMA = "jobq"


@pytest.fixture
def database_url(shared_database_url: str) -> str:
    """These tests leave jobq's tables as they are, and share a database."""
    return shared_database_url


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def add_job(
    db: asyncpg.Connection,
    *,
    task: str = "send",
    queue: str = "mail",
    due_in_s: float | None = None,
    attempts: int = 0,
    error: str | None = None,
) -> UUID:
    job_id = new_job_id()
    await db.execute(
        "INSERT INTO jobq.outbox (id, queue, task, args, run_at, attempts, error_type, last_error)"
        " VALUES ($1, $2, $3, '{\"a\": 1}', now() + make_interval(secs => $4), $5, $6, $6)",
        job_id,
        queue,
        task,
        due_in_s,
        attempts,
        error,
    )
    return job_id


async def add_dead(
    db: asyncpg.Connection,
    *,
    task: str = "send",
    queue: str = "mail",
    reason: str = "exhausted",
    error: str = "ValueError",
    generation: int = 7,
    died_ago_s: float = 0,
) -> UUID:
    job_id = new_job_id()
    await db.execute(
        "INSERT INTO jobq.dead (id, generation, queue, task, args, priority, run_at, attempts, crashes, max_attempts,"
        " timeout_s, created_at, headers, error_type, last_error, reason, died_at)"
        " VALUES ($1, $2, $3, $4, '{\"a\": 1}', 3, now(), 5, 2, 5, 9.5, now() - interval '1 day',"
        ' \'{"h": "x"}\', $5, $5, $6, now() - make_interval(secs => $7))',
        job_id,
        generation,
        queue,
        task,
        error,
        reason,
        died_ago_s,
    )
    return job_id


# --- counts


async def test_count_tells_waiting_from_scheduled_retrying_and_held(db):
    held, *_ = [await add_job(db) for _ in range(3)]
    await add_job(db, due_in_s=-100)
    await add_job(db, due_in_s=100)
    await add_job(db, due_in_s=100, attempts=2)
    await add_job(db, due_in_s=-1, attempts=2)
    await add_job(db, task="charge", queue="billing")
    await add_dead(db)

    counts = await browse.count(db, SCHEMA, held=[held, any_id()])

    assert [count[:5] for count in counts.jobs] == [("billing", "charge", 1, 0, 0), ("mail", "send", 4, 1, 1)]
    assert 100 <= (counts.jobs[1].oldest_waiting_s or 0) < 110
    assert counts.dead == {"mail": 1}
    assert not counts.is_estimate


async def test_a_job_in_a_workers_hands_is_not_the_oldest_that_waits(db):
    running = await add_job(db, due_in_s=-500)

    counts = await browse.count(db, SCHEMA, held=[running])

    assert (counts.jobs[0].waiting, counts.jobs[0].oldest_waiting_s) == (0, None)


async def test_a_table_of_many_pages_is_sampled(db):
    await db.execute(
        "INSERT INTO jobq.outbox (id, queue, task, args)"
        " SELECT gen_random_uuid(), 'mail', 'send', '{}' FROM generate_series(1, 30000)"
    )

    exact = await browse.count(db, SCHEMA)
    sampled = await browse.count(db, SCHEMA, pages=100)

    assert (exact.jobs[0].waiting, exact.is_estimate) == (30_000, False)
    assert sampled.is_estimate
    assert 15_000 < sampled.jobs[0].waiting < 45_000


async def test_leader_is_the_session_that_holds_the_lock_of_this_schema(db, database_url):
    nobody = await browse.leader(db, SCHEMA)
    relay = await asyncpg.connect(database_url)
    await try_lead(relay, "another")
    other_schema = await browse.leader(db, SCHEMA)
    await try_lead(relay, SCHEMA)
    leader = await browse.leader(db, SCHEMA)

    assert (nobody, other_schema) == (None, None)
    assert leader is not None
    assert leader.pid == relay.get_server_pid()
    await relay.close()


# --- jobs


async def test_jobs_lists_each_state_in_its_order(db):
    later = await add_job(db, due_in_s=300)
    soon = await add_job(db, due_in_s=200)
    failed = await add_job(db, due_in_s=100, attempts=1, error="ValueError")
    due = await add_job(db)
    overdue = await add_job(db, due_in_s=-5, attempts=1)

    async def ids(state=None):
        return [(row.id, row.state) for row in await browse.jobs(db, SCHEMA, state=state, limit=10)]

    assert await ids("scheduled") == [(soon, "scheduled"), (later, "scheduled")]
    assert await ids("retrying") == [(failed, "retrying")]
    assert await ids("waiting") == [(due, "waiting"), (overdue, "waiting")]
    assert [found[0] for found in await ids()] == [later, soon, failed, due, overdue]


@pytest.mark.parametrize("state", [None, "waiting", "scheduled"])
async def test_jobs_takes_filters_and_a_limit(db, state):
    due_in_s = 50 if state == "scheduled" else None
    first = await add_job(db, due_in_s=due_in_s)
    await add_job(db, due_in_s=due_in_s)
    await add_job(db, due_in_s=due_in_s, queue="bulk")
    await add_job(db, due_in_s=due_in_s, task="charge")

    found = await browse.jobs(db, SCHEMA, state=state, task="send", queue="mail", limit=1)

    assert [row.id for row in found] == [first]


async def test_a_list_leaves_arguments_out_and_one_job_has_them(db):
    job_id = await add_job(db, error="x" * 4000)

    (listed,) = await browse.jobs(db, SCHEMA, limit=5)
    shown = await browse.job(db, SCHEMA, job_id)

    assert (listed.args, len(listed.last_error or "")) == (None, 200)
    assert shown is not None
    assert (shown.args, len(shown.last_error or "")) == ('{"a": 1}', 4000)
    assert await browse.job(db, SCHEMA, any_id()) is None


async def test_run_now_gives_a_job_that_is_not_due_a_new_generation_that_the_relay_sees(db):
    later, due = await add_job(db, due_in_s=300, attempts=3), await add_job(db)
    before = await db.fetchval("SELECT xid FROM jobq.outbox WHERE id = $1", later)

    changed = await browse.run_now(db, SCHEMA, [later, due, any_id()])

    row = await db.fetchrow(
        "SELECT generation, run_at, attempts, xid > $2 AS is_new FROM jobq.outbox WHERE id = $1", later, before
    )
    assert changed == {later}
    assert tuple(row) == (2, None, 3, True)
    assert await db.fetchval("SELECT generation FROM jobq.outbox WHERE id = $1", due) == 1


async def test_find_says_where_jobs_are(db):
    due, later, dead = await add_job(db), await add_job(db, due_in_s=9), await add_dead(db)

    found = await browse.find(db, SCHEMA, [due, later, dead, any_id()])

    assert found == {due: "waiting", later: "later", dead: "dead"}


# --- the dead


@pytest.mark.parametrize(
    "which",
    [
        {"task": "charge"},
        {"queue": "billing"},
        {"reason": "poison"},
        {"error": "time_out 5%"},
    ],
)
async def test_each_filter_of_the_dead_finds_what_it_names(db, which):
    await add_dead(db)
    await add_dead(db, error="timeXout 500")
    odd = await add_dead(db, task="charge", queue="billing", reason="poison", error="Time_Out 5% of all")

    assert [row.id for row in await browse.dead(db, SCHEMA, DeadFilter(**which))] == [odd]


async def test_the_dead_are_listed_latest_first_up_to_a_limit(db):
    ids = [await add_dead(db, died_ago_s=ago) for ago in (30, 10, 20)]

    assert [row.id for row in await browse.dead(db, SCHEMA, limit=2)] == [ids[1], ids[2]]
    assert len(await browse.dead(db, SCHEMA)) == 3
    assert [row.id for row in await browse.dead(db, SCHEMA, DeadFilter(ids=[ids[0]], task="send"))] == [ids[0]]


async def test_retry_dead_moves_the_job_back_as_if_never_attempted_and_keeps_its_steps(db):
    dead, other = await add_dead(db), await add_dead(db)
    await db.execute("INSERT INTO jobq.step (job_id, name, result) VALUES ($1, 'charge', '1')", dead)
    before = await db.fetchrow("SELECT * FROM jobq.dead WHERE id = $1", dead)

    changed = await browse.retry_dead(db, SCHEMA, [dead, any_id()])

    row = await db.fetchrow("SELECT * FROM jobq.outbox WHERE id = $1", dead)
    assert changed == {dead}
    assert (row["generation"], row["attempts"], row["crashes"], row["run_at"]) == (8, 0, 0, None)
    kept = ("queue", "task", "args", "priority", "max_attempts", "timeout_s", "created_at", "headers", "last_error")
    assert [row[name] for name in kept] == [before[name] for name in kept]
    assert await db.fetchval("SELECT count(*) FROM jobq.step WHERE job_id = $1", dead) == 1
    assert [left.id for left in await browse.dead(db, SCHEMA)] == [other]


async def test_two_who_retry_the_same_dead_job_bring_it_back_once(db, database_url):
    dead = await add_dead(db)
    other = await asyncpg.connect(database_url)
    async with db.transaction():
        first = await browse.retry_dead(db, SCHEMA, [dead])
        await other.execute("SET lock_timeout = '50ms'")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await browse.retry_dead(other, SCHEMA, [dead])
    second = await browse.retry_dead(other, SCHEMA, [dead])

    assert (first, second) == ({dead}, set())
    assert await db.fetchval("SELECT count(*) FROM jobq.outbox") == 1
    await other.close()


async def test_discard_dead_forgets_the_jobs_named_and_no_other(db):
    dead, other = await add_dead(db), await add_dead(db)

    assert await browse.discard_dead(db, SCHEMA, [dead, any_id()]) == {dead}
    assert [left.id for left in await browse.dead(db, SCHEMA)] == [other]
    assert await db.fetchval("SELECT count(*) FROM jobq.outbox") == 0
