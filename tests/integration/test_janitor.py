"""The janitor: deletes what has outlived its use, and nothing that is still of any."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest

from jobq.outbox import follow
from jobq.outbox.database import Database
from jobq.outbox.statement import _for_asyncpg
from jobq.relay.janitor import Janitor
from jobq.settings import RelaySettings
from tests.integration.test_leadership import leader_pids, running, until_pushed
from tests.integration.test_settle import nodes_of
from tests.relay_rows import SCHEMA, add, own_connection
from tests.waiting import until

YEAR_S = 365 * 86_400.0


@pytest.fixture
def database_url(shared_database_url: str) -> str:
    """These tests leave jobq's tables as they are, and share a database."""
    return shared_database_url


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    async with own_connection(database_url) as connection:
        yield connection


async def add_key(database: asyncpg.Connection, job_id: UUID, *, expires_in_s: float) -> None:
    await database.execute(
        "INSERT INTO jobq.idempotency_key (scope, key, job_id, expires_at) "
        "VALUES ('task', $1, $2, now() + make_interval(secs => CAST($3 AS float8)))",
        str(uuid4()),
        job_id,
        expires_in_s,
    )


async def add_step(database: asyncpg.Connection, job_id: UUID, *, age_s: float) -> None:
    await database.execute(
        "INSERT INTO jobq.step (job_id, name, result, created_at) "
        "VALUES ($1, 'step', '1', now() - make_interval(secs => CAST($2 AS float8)))",
        job_id,
        age_s,
    )


async def add_dead(database: asyncpg.Connection, *, age_s: float = 0.0) -> UUID:
    job_id = uuid4()
    await database.execute(
        """
        INSERT INTO jobq.dead
            (id, generation, queue, task, args, priority, attempts, crashes, created_at, reason, died_at)
        VALUES ($1, 1, 'default', 'task', '{}', 2, 1, 0, now(), 'exhausted',
            now() - make_interval(secs => CAST($2 AS float8)))
        """,
        job_id,
        age_s,
    )
    return job_id


async def tidy(database: asyncpg.Connection, limit: int = 500) -> int:
    return await follow.tidy(database, SCHEMA, dead_kept_s=180 * 86_400, limit=limit)


async def test_expired_keys_go_unless_their_job_is_waiting_or_dead(database: asyncpg.Connection) -> None:
    (waiting,) = await add(database)
    dead = await add_dead(database)
    gone, fresh = uuid4(), uuid4()
    for job_id, expires_in_s in ((waiting, -1), (dead, -1), (gone, -1), (fresh, 60)):
        await add_key(database, job_id, expires_in_s=expires_in_s)

    assert await tidy(database) == 1
    left = await database.fetch("SELECT job_id FROM jobq.idempotency_key")
    assert {UUID(bytes=row[0].bytes) for row in left} == {waiting, dead, fresh}


async def test_steps_go_an_hour_after_they_were_made_unless_their_job_is_waiting_or_dead(
    database: asyncpg.Connection,
) -> None:
    (waiting,) = await add(database)
    dead = await add_dead(database)
    gone, fresh = uuid4(), uuid4()
    for job_id, age_s in ((waiting, YEAR_S), (dead, YEAR_S), (gone, 4000), (fresh, 3000)):
        await add_step(database, job_id, age_s=age_s)

    assert await tidy(database) == 1
    left = await database.fetch("SELECT job_id FROM jobq.step")
    assert {UUID(bytes=row[0].bytes) for row in left} == {waiting, dead, fresh}


async def test_the_dead_go_when_nobody_came_for_them(database: asyncpg.Connection) -> None:
    await add_dead(database, age_s=YEAR_S)
    recent = await add_dead(database, age_s=YEAR_S / 4)

    assert await tidy(database) == 1
    assert [UUID(bytes=row[0].bytes) for row in await database.fetch("SELECT id FROM jobq.dead")] == [recent]


async def test_a_call_deletes_no_more_than_its_limit_of_each_kind(database: asyncpg.Connection) -> None:
    for _ in range(5):
        await add_dead(database, age_s=YEAR_S)
        await add_key(database, uuid4(), expires_in_s=-1)
    assert [await tidy(database, 2) for _ in range(4)] == [4, 4, 2, 0]


async def test_a_call_looks_no_further_than_its_limit_however_much_has_expired(
    database_url: str, database: asyncpg.Connection
) -> None:
    await database.execute(
        "INSERT INTO jobq.idempotency_key (scope, key, job_id, expires_at)"
        " SELECT 'task', gen_random_uuid(), gen_random_uuid(), now() + make_interval(days => 1 - 2 * (n % 2))"
        " FROM generate_series(1, 10_000) AS n"
    )
    await database.execute("ANALYZE jobq.idempotency_key")
    query, _ = _for_asyncpg("tidy_keys", SCHEMA)
    own = await Database.of(database_url).connect(schema=SCHEMA, name="test")

    plan = await own.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {query.replace('$1', '10')}")

    await own.close()
    looked_at = [node for node in nodes_of(plan[0]["Plan"]) if node.get("Alias") == "held"]
    assert [node["Actual Rows"] for node in looked_at] == [10]


async def test_a_key_that_somebody_holds_locked_is_passed_over(database: asyncpg.Connection, database_url: str) -> None:
    await add_key(database, uuid4(), expires_in_s=-1)
    async with own_connection(database_url) as other, other.transaction():
        await other.execute("SELECT FROM jobq.idempotency_key FOR UPDATE")
        assert await tidy(database) == 0
    assert await tidy(database) == 1


async def test_the_janitor_waits_its_interval_and_goes_on_soon_while_there_is_much(
    database: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobq.relay.janitor._ROWS_A_STEP", 2)
    for _ in range(3):
        await add_dead(database, age_s=YEAR_S)
    janitor = Janitor(Database.of(database_url), SCHEMA, RelaySettings(tidy_every=1000, dead_kept=timedelta(days=1)))

    await janitor.step()
    assert await database.fetchval("SELECT count(*) FROM jobq.dead") == 3
    janitor._next = 0.0
    await janitor.step()
    assert await database.fetchval("SELECT count(*) FROM jobq.dead") == 1
    janitor._next -= 0.2
    await janitor.step()
    assert await database.fetchval("SELECT count(*) FROM jobq.dead") == 0


async def test_jobs_are_pushed_while_the_janitor_waits_for_a_table_that_somebody_has_locked(
    database: asyncpg.Connection, database_url: str, redis_url: str
) -> None:
    async with running(database_url, redis_url, tidy_every=0.01) as relay:
        await until(lambda: relay.leads, "it leads")
        async with own_connection(database_url) as other, other.transaction():
            await other.execute("LOCK TABLE jobq.dead IN ACCESS EXCLUSIVE MODE")
            await until(lambda: waits(database), "the janitor waits for the lock")
            await until_pushed(redis_url, database, await add(database))


async def test_a_janitor_that_fails_tries_again_and_its_relay_leads_on(
    database: asyncpg.Connection,
    database_url: str,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(follow, "TIDY_LOCK_TIMEOUT_S", 0.02)
    await add_dead(database, age_s=YEAR_S)
    async with running(database_url, redis_url, tidy_every=0.01) as relay:
        async with own_connection(database_url) as other, other.transaction():
            await other.execute("LOCK TABLE jobq.dead IN ACCESS EXCLUSIVE MODE")
            await until(lambda: relay.leads, "it leads")
            leaders = await leader_pids(database)
            await until(lambda: "could not tidy, trying again later" in caplog.messages, "the janitor has failed")
        await until(lambda: is_empty(database, "jobq.dead"), "the janitor has tidied")
        assert await leader_pids(database) == leaders


async def waits(database: asyncpg.Connection) -> bool:
    query = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'jobq:janitor' AND wait_event_type = 'Lock'"
    return await database.fetch(query) != []


async def is_empty(database: asyncpg.Connection, table: str) -> bool:
    return await database.fetch(f"SELECT 1 FROM {table} LIMIT 1") == []
