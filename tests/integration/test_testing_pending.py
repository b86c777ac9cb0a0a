"""run_pending: jobs run in the test itself, as a worker would run them, without Redis and without waiting."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from jobq import Context, DeadJob, InvalidArguments, JobQ, Reject, Retry, RetryPolicy, Snooze
from jobq.testing import enqueued, run_pending
from tests.enqueuing import engine_for

NOTHING_LISTENS_THERE = "redis://127.0.0.1:1"


class Shop:
    """An application, its sessions, and a note of what its tasks did."""

    def __init__(self, engine: AsyncEngine):
        self.Session = async_sessionmaker(engine, expire_on_commit=False)
        self.jobs = JobQ(database=self.Session, redis=NOTHING_LISTENS_THERE)
        self.seen: list[Any] = []

    async def enqueue(self, task: Any, *args: Any, **options: Any) -> Any:
        async with self.Session.begin() as session:
            return (await task.opts(**options).enqueue(session, *args)).id

    async def left(self) -> list[str]:
        async with self.Session() as session:
            return [job.task for job in await enqueued(session)]

    async def one(self, query: str) -> Any:
        async with self.Session() as session:
            return (await session.execute(text(query))).scalar_one()


@pytest.fixture
async def shop(shared_database_url: str) -> AsyncIterator[Shop]:
    async with engine_for(shared_database_url) as engine:
        yield Shop(engine)


async def test_committed_jobs_run_as_a_worker_takes_them_and_are_done(shop: Shop) -> None:
    @shop.jobs.task
    async def note(number: int) -> None:
        shop.seen.append(number)

    for number in (1, 2):
        await shop.enqueue(note, number)
    await shop.enqueue(note, 3, priority=1)
    await shop.enqueue(note, 4, queue="another", priority=4)

    attempts = await run_pending(shop.jobs)

    assert shop.seen == [3, 1, 2, 4]
    assert [(a.task, a.outcome, a.number, a.error, a.delay_s) for a in attempts] == [
        ("note", "done", 1, None, None)
    ] * 4
    assert all(a.duration_s >= 0 for a in attempts)
    assert await shop.left() == []


async def test_what_is_not_committed_does_not_run(shop: Shop) -> None:
    @shop.jobs.task
    async def note() -> None: ...

    async with shop.Session() as session:
        await note.enqueue(session)
        assert await run_pending(shop.jobs) == []


async def test_it_runs_in_the_calling_task_with_arguments_that_went_through_the_table(shop: Shop) -> None:
    @shop.jobs.task
    async def note(day: timedelta, names: set[str]) -> None:
        shop.seen.append((asyncio.current_task(), day, names))

    await shop.enqueue(note, timedelta(days=1), {"a"})
    await run_pending(shop.jobs)

    assert shop.seen == [(asyncio.current_task(), timedelta(days=1), {"a"})]


async def test_arguments_that_the_task_takes_no_more_bury_the_job(shop: Shop) -> None:
    @shop.jobs.task
    async def note(number: int) -> None:
        shop.seen.append(number)

    await shop.enqueue(note, 1)
    async with shop.Session.begin() as session:
        await session.execute(text("""UPDATE jobq.outbox SET args = '{"number": "x"}'"""))

    with pytest.raises(InvalidArguments, match="number"):
        await run_pending(shop.jobs)

    assert shop.seen == []
    assert await shop.one("SELECT reason FROM jobq.dead") == "invalid"


async def test_children_run_too_and_complete_commits_effects_and_end_together(shop: Shop) -> None:
    @shop.jobs.task
    async def child(number: int) -> None:
        shop.seen.append(number)

    @shop.jobs.task
    async def parent(ctx: Context) -> None:
        async with ctx.complete() as session:
            await child.enqueue(session, 1)
            shop.seen.append(await session.scalar(text("SELECT count(*) FROM jobq.outbox WHERE task = 'parent'")))

    await shop.enqueue(parent)

    assert [a.task for a in await run_pending(shop.jobs)] == ["parent", "child"]
    assert shop.seen == [0, 1]
    assert await shop.left() == []


async def test_synchronous_tasks_run_too(shop: Shop) -> None:
    @shop.jobs.task
    def note(number: int) -> None:
        shop.seen.append(number)

    await shop.enqueue(note, 1)

    assert [a.outcome for a in await run_pending(shop.jobs)] == ["done"]
    assert shop.seen == [1]


async def test_the_lifespan_gives_the_state_unless_the_test_does(shop: Shop) -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[str]:
        shop.seen.append("entered")
        yield "real"
        shop.seen.append("left")

    jobs = JobQ(database=shop.Session, lifespan=lifespan)

    @jobs.task
    async def note(ctx: Context[str]) -> None:
        shop.seen.append(ctx.state)

    await shop.enqueue(note)
    await run_pending(jobs)
    await shop.enqueue(note)
    await run_pending(jobs, state=None)

    assert shop.seen == ["entered", "real", "left", None]


# --- errors and retries ----------------------------------------------------------------------------------------------


def failing(shop: Shop, error: BaseException, **options: Any) -> Any:
    @shop.jobs.task(**options)
    async def fail() -> None:
        raise error

    return fail


async def test_an_error_of_a_task_is_raised_once_its_attempt_is_written(shop: Shop) -> None:
    error = LookupError("no such order")
    await shop.enqueue(failing(shop, error))

    with pytest.raises(LookupError) as raised:
        await run_pending(shop.jobs)

    assert raised.value is error
    assert raised.value.__notes__ == [
        "raised by fail, attempt 1, which ended as 'retried'; run_pending(raises=False) returns such attempts instead"
    ]
    assert await shop.one("SELECT attempts FROM jobq.outbox") == 1


async def test_errors_are_returned_where_the_test_asks_for_that(shop: Shop) -> None:
    error = LookupError("no such order")
    await shop.enqueue(failing(shop, error, retry=RetryPolicy(delay=lambda attempt, error: 60 * attempt)))

    attempts = await run_pending(shop.jobs, raises=False)

    assert [(a.outcome, a.error, a.delay_s) for a in attempts] == [("retried", error, 60)]


@pytest.mark.parametrize(
    ("steered", "outcome", "delay_s"),
    [(Retry(delay=5), "retried", 5), (Snooze(7), "snoozed", 7), (Reject("no"), "dead", None)],
    ids=["Retry", "Snooze", "Reject"],
)
async def test_what_a_task_raises_to_steer_its_end_is_no_error(
    shop: Shop, steered: Exception, outcome: str, delay_s: float | None
) -> None:
    await shop.enqueue(failing(shop, steered))

    attempts = await run_pending(shop.jobs)

    assert [(a.outcome, a.error, a.delay_s) for a in attempts] == [(outcome, steered, delay_s)]


async def test_what_is_no_exception_goes_through_also_where_errors_are_returned(shop: Shop) -> None:
    await shop.enqueue(failing(shop, KeyboardInterrupt()))

    with pytest.raises(KeyboardInterrupt):
        await run_pending(shop.jobs, raises=False)


async def test_a_timeout_ends_an_attempt(shop: Shop) -> None:
    @shop.jobs.task(timeout=0.01)
    async def hang() -> None:
        await asyncio.Event().wait()

    await shop.enqueue(hang)

    assert [type(a.error) for a in await run_pending(shop.jobs, raises=False)] == [TimeoutError]


async def test_on_dead_is_called_in_the_transaction_of_the_burial(shop: Shop) -> None:
    @shop.jobs.task
    async def alert(task: str) -> None:
        shop.seen.append(task)

    @shop.jobs.on_dead
    async def tell(session: AsyncSession, job: DeadJob) -> None:
        await alert.enqueue(session, job.task)

    await shop.enqueue(failing(shop, Reject("no")))

    assert [a.outcome for a in await run_pending(shop.jobs)] == ["dead", "done"]
    assert shop.seen == ["fail"]


async def test_a_job_that_was_cancelled_while_it_ran_is_already_done(shop: Shop) -> None:
    @shop.jobs.task
    async def book(ctx: Context) -> None:
        async with shop.Session.begin() as session:
            await shop.jobs.cancel(session, ctx.id)
        async with ctx.complete():
            shop.seen.append("booked")

    await shop.enqueue(book)

    assert [a.outcome for a in await run_pending(shop.jobs)] == ["already done"]
    assert shop.seen == []


# --- time ------------------------------------------------------------------------------------------------------------


async def test_a_delayed_job_runs_when_its_time_has_passed_and_time_adds_up(shop: Shop) -> None:
    @shop.jobs.task
    async def note() -> None: ...

    await shop.enqueue(note, delay=timedelta(hours=2))

    assert await run_pending(shop.jobs) == []
    assert await run_pending(shop.jobs, advance=timedelta(hours=1)) == []
    assert [a.task for a in await run_pending(shop.jobs, advance=3600)] == ["note"]


async def test_retries_happen_at_their_moments_within_the_time_that_passes(shop: Shop) -> None:
    policy = RetryPolicy(max_attempts=5, delay=lambda attempt, error: 60.0 * attempt)
    await shop.enqueue(failing(shop, LookupError("gone"), retry=policy))

    first = await run_pending(shop.jobs, advance=190, raises=False)
    second = await run_pending(shop.jobs, advance=timedelta(days=1), raises=False)

    assert [(a.number, a.delay_s) for a in first] == [(1, 60), (2, 120), (3, 180)]
    assert [(a.number, a.outcome) for a in second] == [(4, "retried"), (5, "dead")]


async def test_a_job_enqueued_on_the_way_has_its_own_time(shop: Shop) -> None:
    @shop.jobs.task
    async def later(name: str) -> None:
        shop.seen.append(name)
        if name == "at 10":
            async with shop.Session.begin() as session:
                await later.opts(delay=10).enqueue(session, "at 20")

    await shop.enqueue(later, "at 10", delay=10)
    await shop.enqueue(later, "at 15", delay=15)
    await shop.enqueue(later, "at 30", delay=30)

    await run_pending(shop.jobs, advance=25)

    assert shop.seen == ["at 10", "at 15", "at 20"]


async def test_the_time_of_idempotency_keys_passes_too(shop: Shop) -> None:
    @shop.jobs.task
    async def note() -> None: ...

    first = await shop.enqueue(note, idempotency_key="k")
    await run_pending(shop.jobs, advance=timedelta(hours=23))
    again = await shop.enqueue(note, idempotency_key="k")
    await run_pending(shop.jobs, advance=timedelta(hours=2))
    another = await shop.enqueue(note, idempotency_key="k")

    assert first == again
    assert another != first


# --- what would go wrong ---------------------------------------------------------------------------------------------


async def test_jobs_without_end_are_noticed(shop: Shop) -> None:
    @shop.jobs.task
    async def again(ctx: Context) -> None:
        async with ctx.complete() as session:
            await again.enqueue(session)

    await shop.enqueue(again)

    with pytest.raises(AssertionError, match=r"after 20 attempts .* \(again 20 times\): does a task enqueue itself"):
        await run_pending(shop.jobs, limit=20)


async def test_a_row_that_the_test_itself_keeps_locked_is_named(shop: Shop) -> None:
    @shop.jobs.task
    async def note() -> None: ...

    await shop.enqueue(note)
    async with shop.Session() as session:
        await session.execute(text("SELECT FROM jobq.outbox FOR UPDATE"))
        with pytest.raises(AssertionError, match=r"the end of note could not be written: another transaction"):
            await run_pending(shop.jobs)


async def test_jobs_of_another_application_stay_where_they_are(shop: Shop) -> None:
    other = JobQ(database=shop.Session)

    @other.task
    async def theirs() -> None: ...

    @shop.jobs.task
    async def ours() -> None: ...

    await shop.enqueue(theirs)
    await shop.enqueue(ours)

    assert [a.task for a in await run_pending(shop.jobs)] == ["ours"]
    assert await shop.left() == ["theirs"]


async def test_a_database_is_asked_for_where_there_is_none() -> None:
    with pytest.raises(Exception, match="give database="):
        await run_pending(JobQ())


# --- where it runs ---------------------------------------------------------------------------------------------------


async def test_everything_stays_in_a_transaction_that_the_test_rolls_back(shop: Shop, shared_database_url: str) -> None:
    watcher = await asyncpg.connect(shared_database_url)
    await watcher.execute("CREATE TABLE effect (number int)")

    @shop.jobs.task
    async def child() -> None:
        shop.seen.append("child")

    @shop.jobs.task
    async def parent(ctx: Context) -> None:
        async with ctx.complete() as session:
            await session.execute(text("INSERT INTO effect VALUES (1)"))
            await child.enqueue(session)

    @shop.jobs.task
    async def fail(ctx: Context) -> None:
        async with ctx.complete() as session:
            await session.execute(text("INSERT INTO effect VALUES (9)"))
            raise Reject("this block is rolled back, and only this")

    @shop.jobs.on_dead
    async def tell(session: AsyncSession, job: DeadJob) -> None:
        await session.execute(text("INSERT INTO effect VALUES (2)"))

    engine = shop.Session.kw["bind"]
    async with engine.connect() as connection, connection.begin() as transaction:
        session = AsyncSession(connection, join_transaction_mode="create_savepoint")
        await parent.enqueue(session)
        await fail.enqueue(session)
        await session.commit()

        attempts = await run_pending(shop.jobs, database=connection)

        assert [(a.task, a.outcome) for a in attempts] == [("parent", "done"), ("fail", "dead"), ("child", "done")]
        assert list(await session.scalars(text("SELECT number FROM effect ORDER BY 1"))) == [1, 2]
        assert await enqueued(session) == []
        await session.close()
        await transaction.rollback()

    counts = (
        "SELECT (SELECT count(*) FROM effect) + (SELECT count(*) FROM jobq.outbox) + (SELECT count(*) FROM jobq.dead)"
    )
    assert await watcher.fetchval(counts) == 0
    await watcher.close()


async def test_a_sessionmaker_may_be_bound_to_another_database_for_each_test(shop: Shop, database_url: str) -> None:
    @shop.jobs.task
    async def note(ctx: Context) -> None:
        async with ctx.complete() as session:
            shop.seen.append(await session.scalar(text("SELECT current_database()")))

    async with engine_for(database_url) as engine:
        before = shop.jobs.database
        shop.Session.configure(bind=engine)
        await shop.enqueue(note)
        await run_pending(shop.jobs)
        assert shop.seen == [engine.url.database]
        assert shop.jobs.database is before


async def test_a_url_or_an_engine_may_be_given(shop: Shop, shared_database_url: str) -> None:
    jobs = JobQ()

    @jobs.task
    async def note(ctx: Context) -> None:
        async with ctx.complete():
            shop.seen.append(ctx.id)

    for database in (shared_database_url, shop.Session.kw["bind"], shop.Session):
        job_id = await shop.enqueue(note)
        await run_pending(jobs, database=database)
        assert shop.seen.pop() == job_id
    assert jobs.given_database is None


async def test_steps_side_by_side_stay_in_that_transaction_too(shop: Shop) -> None:
    async def call(number: int) -> int:
        shop.seen.append(number)
        await asyncio.sleep(0)
        return number

    @shop.jobs.task
    async def work(ctx: Context) -> None:
        assert await asyncio.gather(*(ctx.step(f"step {n}", call, n) for n in range(4))) == [0, 1, 2, 3]
        if ctx.attempt == 1:
            raise Retry(delay=60)

    async with shop.Session.kw["bind"].connect() as connection, connection.begin() as transaction:
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            await work.enqueue(session)
            await session.commit()

        attempts = await run_pending(shop.jobs, advance=60, database=connection)

        await transaction.rollback()
    assert [a.outcome for a in attempts] == ["retried", "done"]
    assert sorted(shop.seen) == [0, 1, 2, 3]
    assert await shop.one("SELECT count(*) FROM jobq.step") == 0


@pytest.mark.parametrize("has_opentelemetry", [True, False])
async def test_the_trace_of_a_job_is_neither_that_of_the_next_one_nor_of_the_test(
    shop: Shop, has_opentelemetry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import opentelemetry.trace  # noqa: F401

    if not has_opentelemetry:
        monkeypatch.delitem(sys.modules, "opentelemetry.trace")

    @shop.jobs.task
    async def child() -> None: ...

    @shop.jobs.task
    async def traced() -> None:
        async with shop.Session.begin() as session:
            await child.opts(delay=60).enqueue(session)

    @shop.jobs.task
    async def untraced() -> None:
        async with shop.Session.begin() as session:
            await child.opts(delay=60).enqueue(session)

    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    await shop.enqueue(traced, headers=headers)
    await shop.enqueue(untraced)
    await run_pending(shop.jobs)

    async with shop.Session.begin() as session:
        await child.enqueue(session)
        assert [job.headers for job in await enqueued(session, child)] == [headers, {}, {}]
