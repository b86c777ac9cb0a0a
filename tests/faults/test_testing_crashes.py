"""Crash points of jobq.testing: each is where it says, and finds the task that its invariant does not survive."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import redis.asyncio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from jobq import Context, JobQ, Reject, Retry, RetryPolicy
from jobq.testing import CRASH_POINTS, Crashes, CrashPoint
from tests.enqueuing import engine_for

BEFORE_COMMIT, BEFORE_STEP_IS_KEPT, AFTER_COMMIT, EMPTY_REDIS, RELAY = CRASH_POINTS


class Bank:
    """An application whose tasks move money: here, and at somebody else's who may honour keys."""

    def __init__(self, engine: AsyncEngine, db: asyncpg.Connection):
        self.Session = async_sessionmaker(engine)
        self.jobs = JobQ(database=self.Session)
        self.db = db
        self.runs: list[str] = []
        self.charges: list[str] = []
        """What the card company was asked to do."""
        self.cleaned_up: list[str] = []

        @self.jobs.task
        async def charge() -> None:
            self.charges.append("charge")

        @self.jobs.task
        async def charge_by_key(ctx: Context) -> None:
            if (key := ctx.idempotency_key("card")) not in self.charges:
                self.charges.append(key)

        @self.jobs.task(queue="ledger")
        async def book(ctx: Context) -> None:
            self.runs.append("book")
            try:
                async with ctx.complete() as session:
                    await session.execute(text("INSERT INTO ledger DEFAULT VALUES"))
            finally:
                self.cleaned_up.append("book")

        @self.jobs.task
        def charge_in_thread() -> None:
            self.charges.append("charge")

        self.charge, self.charge_by_key, self.book, self.charge_in_thread = (
            charge,
            charge_by_key,
            book,
            charge_in_thread,
        )

    async def enqueue(self, *tasks: Any, **options: Any) -> list[UUID]:
        async with self.Session.begin() as session:
            return [(await task.opts(**options).enqueue(session)).id for task in tasks]

    async def booked(self) -> int:
        return int(await self.db.fetchval("SELECT count(*) FROM ledger"))

    async def row(self, job_id: UUID) -> asyncpg.Record | None:
        return await self.db.fetchrow("SELECT * FROM jobq.outbox WHERE id = $1", job_id)

    async def rows(self) -> int:
        return int(await self.db.fetchval("SELECT count(*) FROM jobq.outbox"))


@pytest.fixture
async def bank(shared_database_url: str) -> AsyncIterator[Bank]:
    db = await asyncpg.connect(shared_database_url)
    await db.execute("CREATE TABLE ledger (id bigserial PRIMARY KEY)")
    async with engine_for(shared_database_url) as engine:
        yield Bank(engine, db)
    await db.close()


@pytest.fixture
def crashes(bank: Bank, redis_url: str) -> Crashes:
    return Crashes(bank.jobs, redis=redis_url)


class Redis:
    """What Redis holds of a queue."""

    def __init__(self, url: str):
        self.url = url

    async def lists(self, queue: str = "default") -> Counter[str]:
        """How many entries there are, by kind of list."""
        async with redis.asyncio.Redis.from_url(self.url) as client:
            names = [name.decode() for name in await client.keys(f"*{{{queue}}}:*")]
            kinds = {name: name.partition("}:")[2].partition(":")[0] for name in names}
            found: Counter[str] = Counter()
            for name, kind in kinds.items():
                if kind in ("ready", "working"):
                    found[kind] += await client.llen(name)
            return +found

    async def losses(self, queue: str) -> int:
        """How often the relay found that Redis had lost what it had pushed."""
        async with redis.asyncio.Redis.from_url(self.url) as client:
            (name,) = await client.keys(f"*{{{queue}}}:stats")
            return int(await client.hget(name, "losses") or 0)

    async def is_empty(self) -> bool:
        async with redis.asyncio.Redis.from_url(self.url) as client:
            return bool(await client.dbsize() == 0)


@pytest.fixture
def store(redis_url: str) -> Redis:
    return Redis(redis_url)


# --- each point is where it says -------------------------------------------------------------------------------------


async def test_before_commit_the_effects_of_complete_are_written_and_nothing_is_committed(
    bank: Bank, crashes: Crashes, store: Redis
) -> None:
    async with crashes:
        (job_id,) = await bank.enqueue(bank.book)

        assert await crashes.before_commit() == job_id

        row = await bank.row(job_id)
        assert row is not None
        assert (row["generation"], row["crashes"], await bank.booked(), bank.runs) == (1, 0, 0, ["book"])
        # It had written: a sequence does not go back.
        assert await bank.db.fetchval("SELECT is_called FROM ledger_id_seq")
        assert await store.lists("ledger") == {"working": 1}
        assert bank.cleaned_up == [], "nothing of a killed process runs on"
        locks = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in tr%'"
        assert await bank.db.fetchval(locks) == 0, "its transaction ended with it"

        await crashes.recover()

        assert (await bank.booked(), bank.runs, await bank.rows()) == (1, ["book", "book"], 0)
        assert await store.lists("ledger") == {}


@pytest.mark.parametrize("name", ["charge", "charge_in_thread"])
async def test_before_commit_a_plain_task_has_returned_and_its_row_is_there(
    bank: Bank, crashes: Crashes, store: Redis, name: str
) -> None:
    async with crashes:
        (job_id,) = await bank.enqueue(getattr(bank, name))

        await crashes.before_commit()

        assert bank.charges == ["charge"]
        assert await bank.row(job_id) is not None
        assert await store.lists() == {"working": 1}
        await crashes.recover()
        assert bank.charges == ["charge", "charge"]


@pytest.mark.parametrize("name", ["charge", "book"])
async def test_after_commit_the_row_is_gone_and_the_entry_still_in_the_working_list(
    bank: Bank, crashes: Crashes, store: Redis, name: str
) -> None:
    task = getattr(bank, name)
    async with crashes:
        (job_id,) = await bank.enqueue(task)

        assert await crashes.after_commit(task) == job_id

        assert await bank.row(job_id) is None
        assert await store.lists(task.queue) == {"working": 1}
        await crashes.recover()
        assert (len(bank.charges), await bank.booked()) == ((1, 0) if name == "charge" else (0, 1))
        await bank.enqueue(task)
        await crashes.recover()  # the next worker takes back what the dead one held
        assert await store.lists(task.queue) == {}


def task_of_steps(bank: Bank, *names: str) -> Any:
    """A task that notes the call of each step as a run of it, and books at its end."""

    async def call(name: str) -> None:
        bank.runs.append(name)

    @bank.jobs.task
    async def work(ctx: Context) -> None:
        for name in names:
            await ctx.step(name, call, name)
        async with ctx.complete() as session:
            await session.execute(text("INSERT INTO ledger DEFAULT VALUES"))

    return work


async def test_before_a_step_is_kept_its_call_has_been_made(bank: Bank, crashes: Crashes, store: Redis) -> None:
    work = task_of_steps(bank, "reserve", "pay")
    async with crashes:
        first, job_id = await bank.enqueue(bank.charge, work)

        assert await crashes.before_step_is_kept() == job_id

        assert (bank.runs, await bank.row(first)) == (["reserve"], None)
        assert await bank.db.fetchval("SELECT count(*) FROM jobq.step") == 0
        assert await store.lists() == {"working": 1}

        assert await crashes.before_step_is_kept(work, step="pay") == job_id

        assert bank.runs == ["reserve", "reserve", "pay"]
        assert await bank.db.fetch("SELECT name FROM jobq.step") == [("reserve",)]
        await crashes.recover()
        assert bank.runs == ["reserve", "reserve", "pay", "pay"]
        assert (await bank.booked(), await bank.rows()) == (1, 0)


async def test_of_a_run_that_died_at_a_step_no_other_step_is_kept(bank: Bank, crashes: Crashes) -> None:
    may_end = asyncio.Event()

    async def call(name: str) -> None:
        bank.runs.append(name)
        if name == "slow":
            await may_end.wait()

    @bank.jobs.task
    async def work(ctx: Context) -> None:
        await asyncio.gather(*(ctx.step(name, call, name) for name in ("slow", "quick")))

    async with crashes:
        await bank.enqueue(work)
        await crashes.before_step_is_kept(step="quick")
        may_end.set()
        await crashes.recover()

        assert Counter(bank.runs) == {"slow": 2, "quick": 2}


async def test_the_engine_of_the_application_is_left_alone(bank: Bank, crashes: Crashes) -> None:
    work = task_of_steps(bank, "reserve")
    async with crashes:
        await bank.enqueue(work)
        await crashes.before_step_is_kept(work)
        async with bank.Session.begin() as session:
            await session.execute(
                text("INSERT INTO jobq.step (job_id, name, result) SELECT gen_random_uuid(), 'x', '1'")
            )
        await crashes.recover()
    assert await bank.booked() == 1


async def test_empty_redis_loses_what_was_pushed(bank: Bank, crashes: Crashes, store: Redis) -> None:
    async with crashes:
        (job_id,) = await bank.enqueue(bank.book)

        await crashes.empty_redis()

        assert await store.is_empty()
        assert await bank.row(job_id) is not None
        await crashes.recover()
        assert (await bank.booked(), bank.runs) == (1, ["book"])
        assert await store.losses("ledger") == 1, "it had been pushed to before"


async def test_a_living_worker_goes_on_after_redis_lost_everything(bank: Bank, crashes: Crashes) -> None:
    async with crashes:
        await bank.enqueue(bank.book)
        await crashes.recover()
        await bank.enqueue(bank.book)
        await crashes.empty_redis()
        await crashes.recover()
        assert (await bank.booked(), bank.runs) == (2, ["book", "book"])


@pytest.mark.parametrize("when", ["before the relay began", "after it"])
async def test_between_poll_and_push_redis_has_not_heard_of_the_job(
    bank: Bank, crashes: Crashes, store: Redis, when: str
) -> None:
    ids = await bank.enqueue(bank.book) if when == "before the relay began" else []
    async with crashes:
        ids = ids or await bank.enqueue(bank.book)

        await crashes.relay_between_poll_and_push()

        assert await bank.row(ids[0]) is not None
        assert await store.lists("ledger") == {}
        await crashes.recover()
        assert (await bank.booked(), bank.runs) == (1, ["book"])


async def test_the_job_of_the_named_task_is_the_one_that_dies(bank: Bank, crashes: Crashes) -> None:
    async with crashes:
        first, named = await bank.enqueue(bank.charge, bank.charge_by_key)

        assert await crashes.before_commit(bank.charge_by_key) == named

        assert await bank.row(first) is None, "the one before it was run to its end"
        assert await bank.row(named) is not None
        await crashes.recover()
        assert bank.charges.count("charge") == 1


async def test_a_crash_is_counted_and_three_in_a_row_are_poison(bank: Bank, crashes: Crashes) -> None:
    async with crashes:
        (job_id,) = await bank.enqueue(bank.book)
        await crashes.before_commit()
        await crashes.before_commit()
        row = await bank.row(job_id)
        assert row is not None
        assert (row["generation"], row["crashes"]) == (2, 1), "the second is counted when a worker sweeps it"
        await crashes.before_commit()
        with pytest.raises(AssertionError, match=r"a job of book is dead \(poison\)"):
            await crashes.recover()
    assert await bank.booked() == 0


async def test_savepoints_and_the_tasks_own_transactions_are_not_the_commit(bank: Bank, crashes: Crashes) -> None:
    reached: list[str] = []

    @bank.jobs.task
    async def work(ctx: Context) -> None:
        async with bank.Session.begin() as own:
            await own.execute(text("INSERT INTO ledger DEFAULT VALUES"))
        reached.append("own")
        async with ctx.complete() as session:
            async with session.begin_nested():
                await session.execute(text("INSERT INTO ledger DEFAULT VALUES"))
            reached.append("savepoint")

    async with crashes:
        await bank.enqueue(work)
        await crashes.before_commit()
        assert reached == ["own", "savepoint"]
        assert await bank.booked() == 1
        await crashes.recover()
        assert await bank.booked() == 3, "the task's own transaction was committed twice"


async def test_what_a_killed_run_had_open_is_closed_when_the_block_ends(bank: Bank, crashes: Crashes) -> None:
    async with crashes:
        await bank.enqueue(bank.book)
        await crashes.before_commit()
    assert bank.cleaned_up == ["book"]
    assert await bank.booked() == 0
    assert await bank.rows() == 1


# --- recovery --------------------------------------------------------------------------------------------------------


async def test_recovery_runs_retries_and_delayed_jobs_and_children_to_their_end(bank: Bank, crashes: Crashes) -> None:
    tries: list[int] = []

    @bank.jobs.task(queue="far")
    async def parent(ctx: Context) -> None:
        tries.append(ctx.attempt)
        if ctx.attempt < 3:
            raise Retry(delay=86_400)
        async with ctx.complete() as session:
            await bank.book.opts(delay=86_400, queue="unheard-of").enqueue(session)

    async with crashes:
        await bank.enqueue(parent, delay=86_400)
        await crashes.recover()
    assert (tries, await bank.booked(), await bank.rows()) == ([1, 2, 3], 1, 0)


async def test_recovery_tells_of_a_job_that_died_unless_its_task_rejected_it(bank: Bank, crashes: Crashes) -> None:
    @bank.jobs.task(retry=RetryPolicy(max_attempts=2))
    async def fail() -> None:
        raise LookupError("no such invoice")

    @bank.jobs.task
    async def reject() -> None:
        raise Reject("no")

    async with crashes:
        await bank.enqueue(reject)
        await crashes.recover()
        await bank.enqueue(fail)
        with pytest.raises(AssertionError, match=r"fail is dead \(exhausted\) after 2 attempts: LookupError: no such"):
            await crashes.recover()


@pytest.mark.parametrize("how", ["before_commit", "before_step_is_kept", "after_commit", "relay_between_poll_and_push"])
async def test_a_crash_that_cannot_happen_is_an_error(bank: Bank, crashes: Crashes, how: str) -> None:
    async with crashes:
        with pytest.raises(AssertionError, match="enqueue"):
            await getattr(crashes, how)()


# --- the tool finds bugs: invariants under every point ---------------------------------------------------------------


@pytest.mark.parametrize("point", CRASH_POINTS)
async def test_only_the_effect_that_nothing_protects_happens_twice(
    bank: Bank, crashes: Crashes, point: CrashPoint
) -> None:
    async with crashes:
        await bank.enqueue(bank.book, bank.book, bank.charge_by_key, bank.charge)

        await crashes.at(point)

        assert (await bank.booked(), await bank.rows()) == (2, 0)
        assert len(bank.runs) == (4 if point is BEFORE_COMMIT else 2), "each job was struck once"
        by_key = [key for key in bank.charges if key != "charge"]
        assert (len(by_key), bank.charges.count("charge")) == (1, 2 if point is BEFORE_COMMIT else 1)


@pytest.mark.parametrize("point", CRASH_POINTS)
async def test_children_are_struck_too_and_are_enqueued_once(bank: Bank, crashes: Crashes, point: CrashPoint) -> None:
    @bank.jobs.task
    async def parent(ctx: Context) -> None:
        async with ctx.complete() as session:
            await bank.book.opts(delay=60).enqueue(session)

    async with crashes:
        await bank.enqueue(parent)
        await crashes.at(point)
        assert (await bank.booked(), await bank.rows()) == (1, 0)
        assert len(bank.runs) == (2 if point is BEFORE_COMMIT else 1)


@pytest.mark.parametrize("point", CRASH_POINTS)
async def test_only_the_step_that_was_not_kept_is_taken_again(bank: Bank, crashes: Crashes, point: CrashPoint) -> None:
    async with crashes:
        await bank.enqueue(task_of_steps(bank, "reserve", "pay"))

        await crashes.at(point)

        assert bank.runs == (["reserve"] if point is BEFORE_STEP_IS_KEPT else []) + ["reserve", "pay"]
        assert (await bank.booked(), await bank.rows()) == (1, 0)


async def test_a_point_may_be_given_by_its_name_and_is_a_readable_id(bank: Bank, crashes: Crashes) -> None:
    assert list(CRASH_POINTS) == [
        "before_commit",
        "before_step_is_kept",
        "after_commit",
        "empty_redis",
        "relay_between_poll_and_push",
    ]
    async with crashes:
        with pytest.raises(ValueError, match="at_lunch"):
            await crashes.at("at_lunch")  # type: ignore[arg-type]


async def test_the_fixture_gives_crashes_on_the_redis_of_the_test(
    bank: Bank, jobq_crashes: Callable[..., Crashes]
) -> None:
    async with jobq_crashes(bank.jobs) as crashes:
        await bank.enqueue(bank.book)
        await crashes.at(BEFORE_COMMIT)
        assert await bank.booked() == 1
