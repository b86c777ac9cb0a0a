"""Real processes with the rights of docs/roles.md and no others, through everything that can become of a job."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import asyncpg
import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from jobq.broker.client import connect_sync
from jobq.outbox import follow
from tests import roles_app as app
from tests.commands import Commands, Process
from tests.commands import started as command
from tests.enqueuing import engine_for
from tests.markdown import blocks
from tests.roles import Names, roles_of, users_of
from tests.waiting import until

ROOT = Path(__file__).parents[2]
PLAIN_SQL = ROOT / "docs" / "plain-sql.md"


class Shop:
    """A database and a Redis with their roles and users, and the processes of one application on them."""

    def __init__(self, stack: ExitStack, folder: Path, db: asyncpg.Connection, roles: Names, users: Names):
        self._stack = stack
        self._folder = folder
        self.db = db
        """The owner's connection, to look with."""
        self.roles = roles
        self.users = users

    async def start(self, name: str, *options: str, ready: str) -> Process:
        process = self._stack.enter_context(
            command(
                *(name, "tests.roles_app:jobs", *options),
                folder=self._folder,
                PYTHONPATH=str(ROOT),
                JOBQ_DATABASE_URL=self.roles.urls[name],
                JOBQ_REDIS_URL=self.users.urls[name],
            )
        )
        await process.says(ready)
        return process

    async def worker(self, *options: str) -> Process:
        return await self.start("worker", "-q", "default,mail", "--beat", "0.1", *options, ready="worker ready")

    async def notes(self) -> Counter[str]:
        return Counter(row["note"] for row in await self.db.fetch("SELECT note FROM effect"))

    async def drained(self) -> None:
        async def is_drained() -> bool:
            return await self.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0

        await until(is_drained, "all jobs are done")


@pytest.fixture
async def shop(database_url: str, redis_url: str, tmp_path: Path) -> AsyncIterator[Shop]:
    db = await asyncpg.connect(database_url)
    await db.execute(app.TABLES)
    if db.get_server_version() < (18,):
        await db.execute(next(block.text for block in blocks(PLAIN_SQL, "sql") if "FUNCTION" in block.text))
    with users_of(redis_url) as users, ExitStack() as stack:
        async with roles_of(database_url) as roles:
            worker = roles.names["worker"]
            await db.execute(
                f"GRANT SELECT, INSERT ON effect, gate TO {worker}; GRANT USAGE ON effect_id_seq TO {worker}"
            )
            yield Shop(stack, tmp_path, db, roles, users)
            stack.close()
    await db.close()


@pytest.fixture
def commands(shop: Shop) -> Iterator[Commands]:
    return Commands(shop.roles.urls["worker"], shop.users.urls["status"])


async def enqueue_in_every_way(url: str) -> int:
    """As the web application: each way in, each with and without an idempotency key. Returns how many jobs."""
    async with engine_for(url) as engine:
        async with AsyncSession(engine) as session, session.begin():
            await app.plain.enqueue(session, "session")
            await app.plain.opts(idempotency_key="session").enqueue(session, "session")
            keyed = [app.plain.opts(idempotency_key=f"key {n}").job("many keyed") for n in range(3)]
            await app.jobs.enqueue_many(session, [*keyed, *(app.plain.job("many plain") for _ in range(3))])
        async with engine.begin() as connection:
            await app.plain.enqueue(connection, "connection")
            await app.plain.opts(delay=0.2).enqueue(connection, "delayed")
    connection = await asyncpg.connect(url)
    async with connection.transaction():
        await app.plain.opts(headers={"request": "1"}, priority=1).enqueue(connection, "asyncpg")
        await app.plain.opts(idempotency_key="session").enqueue(connection, "is there already")
    inserts = [block.text for block in blocks(PLAIN_SQL, "sql") if "INSERT" in block.text][:-1]
    for insert in inserts:
        await connection.execute(insert)
    await connection.close()
    await asyncio.to_thread(_enqueue_without_asyncio, url)
    return 2 + 6 + 2 + 1 + 6 + 4


def _enqueue_without_asyncio(url: str) -> None:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.execute(app.plain.insert("insert"))
        connection.execute(app.plain.opts(idempotency_key="insert").insert("insert"))
    engine.dispose()
    with psycopg.connect(url) as connection:
        connection.execute(*app.plain.sql("sql"))
        connection.execute(*app.plain.opts(idempotency_key="sql").sql("sql"))


async def test_jobs_of_every_way_in_come_to_their_end_under_least_privilege(shop: Shop, commands: Commands) -> None:
    relay = await shop.start("relay", ready="relay leads")
    worker = await shop.worker()

    enqueued = await enqueue_in_every_way(shop.roles.urls["web"])
    web = await asyncpg.connect(shop.roles.urls["web"])
    async with web.transaction():
        await app.flaky.enqueue(web, "flaky")
        await app.parent.enqueue(web)
        await app.refuse.enqueue(web)
        await web.execute(
            "INSERT INTO jobq.outbox (id, queue, task, args) VALUES (gen_random_uuid(), 'mail', 'send_receipt', '{}')"
        )
    await web.close()
    await shop.drained()

    expected = Counter(
        {"session": 2, "many keyed": 3, "many plain": 3, "connection": 1, "delayed": 1, "asyncpg": 1, "insert": 2}
        | {"sql": 2, **{f"receipt {number}": 1 for number in range(7, 13)}}
        | {"flaky": 1, "parent": 1, "child": 1, "many": 2, "dead rejected": 1, "dead invalid": 1}
    )
    assert await shop.notes() == expected
    assert sum(expected.values()) == enqueued + 7
    dead = {row["reason"]: row["id"] for row in await shop.db.fetch("SELECT id, reason FROM jobq.dead")}
    assert set(dead) == {"rejected", "invalid"}

    await commands.json("status")
    doctor = await commands.run("doctor")
    assert "cannot be looked at" not in doctor.output
    assert (await commands.run("dead", "retry", dead["rejected"])).exit_code == 0
    await until(lambda: worker.said.count("job dead") == 3, "the dead one died again")
    assert (await commands.run("dead", "discard", dead["invalid"], "--yes")).exit_code == 0
    for process in (worker, relay):
        process.signal(signal.SIGTERM)
        assert await process.ends() == 0
    for said in (worker.said, relay.said):
        for trouble in ("permission", "NOPERM", "could not", "store away", "trying again", "broke off"):
            assert trouble not in said, said


async def test_a_worker_that_hangs_in_its_transaction_is_swept_by_another_with_the_same_role(shop: Shop) -> None:
    await shop.start("relay", ready="relay leads")
    stopped = await shop.worker("--lease", "1")
    web = await asyncpg.connect(shop.roles.urls["web"])
    async with web.transaction():
        await app.hold.enqueue(web)
    await web.close()

    async def arrived(times: int) -> bool:
        return await shop.db.fetchval("SELECT count(*) FROM gate") == times

    await until(lambda: arrived(1), "the first run holds the lock of its job")
    stopped.signal(signal.SIGSTOP)
    other = await shop.worker("--lease", "1")
    await until(lambda: arrived(2), "the sweeper ended the session that held the lock, and the job runs again")
    await shop.db.execute("INSERT INTO gate VALUES ('open')")
    await shop.drained()

    assert await shop.notes() == Counter(held=1)
    assert "swept a dead worker" in other.said


async def test_relays_of_one_role_wake_and_succeed_each_other(shop: Shop) -> None:
    leader, standby = [await asyncpg.connect(shop.roles.urls["relay"]) for _ in range(2)]
    web = await asyncpg.connect(shop.roles.urls["web"])
    woken = asyncio.Event()
    await follow.keep_alive(leader, "jobq")
    await follow.listen(leader, "jobq", woken.set)
    assert await follow.try_lead(leader, "jobq")
    assert await follow.try_sleep(leader, "jobq")

    async with web.transaction():
        await app.plain.enqueue(web, "wakes")
    await until(woken.is_set, "the commit woke the relay")
    assert not await follow.try_lead(standby, "jobq")
    assert await follow.end_leader(standby, "jobq") == 1
    await until(lambda: follow.try_lead(standby, "jobq"), "the standby leads")
    for connection in (leader, standby, web):
        connection.terminate()


async def test_a_run_in_one_process_needs_both_roles_and_the_commands_of_both_users(shop: Shop, redis_url: str) -> None:
    roles, users = shop.roles, shop.users
    await shop.db.execute(f"GRANT {roles.names['relay']} TO {roles.names['worker']}")
    with connect_sync(redis_url) as admin:
        admin.execute_command("ACL", "SETUSER", users.names["worker"], "+get", "+set")
    roles.urls["run"], users.urls["run"] = roles.urls["worker"], users.urls["worker"]
    run = await shop.start("run", ready="worker ready")
    web = await asyncpg.connect(roles.urls["web"])
    async with web.transaction():
        await app.plain.enqueue(web, "run")
    await web.close()
    await shop.drained()
    run.signal(signal.SIGTERM)

    assert await run.ends() == 0
    assert await shop.notes() == Counter(run=1)
