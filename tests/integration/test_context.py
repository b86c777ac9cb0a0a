"""`ctx.complete()`: a job's effects and its completion are one COMMIT, whatever happens around it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from jobq import AlreadyDone, Context, TransactionUsed
from jobq.outbox import settle
from jobq.worker.worker import Worker
from tests.builders import Bench, Gate, settled, started, turn, write_effect
from tests.faults.proxy import postgres_proxy
from tests.waiting import until


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


def own_engine(database_url: str, **options: Any) -> AsyncEngine:
    """An engine as an application makes it."""
    return create_async_engine(make_url(database_url).set(drivername="postgresql+asyncpg"), **options)


def outcomes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "jobq.worker.attempt"]


async def copy_to(bench: Bench, worker: Worker, entry: bytes) -> None:
    """Give a worker the same entry too, as a Redis that went back in time would."""
    await bench.redis.rpush(bench.broker.keys("default").working(worker.name), entry)
    await worker.turns.adopt("default", [entry])


async def is_waiting_for_a_lock(bench: Bench) -> bool:
    return bool(
        await bench.db.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
    )


async def test_effects_children_and_completion_are_one_commit(bench: Bench) -> None:
    @bench.app.task
    async def child() -> None: ...

    @bench.app.task
    async def book(ctx: Context) -> None:
        async with ctx.complete() as session:
            await write_effect(session, ctx)
            await child.enqueue(session)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(book)

    await turn(worker)

    assert await bench.effects(job_id) == 1
    assert await bench.row(job_id) is None
    assert await bench.db.fetchval("SELECT array_agg(task) FROM jobq.outbox") == ["child"]
    await bench.relay()
    await turn(worker)
    await bench.assert_drained()


async def test_an_exception_in_the_block_undoes_effects_children_and_completion(bench: Bench) -> None:
    @bench.app.task
    async def child() -> None: ...

    @bench.app.task
    async def book(ctx: Context) -> None:
        async with ctx.complete() as session:
            await write_effect(session, ctx)
            await child.enqueue(session)
            raise LookupError("no such order")

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(book)

    await turn(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert (row["attempts"], row["generation"]) == (1, 2)
    assert await bench.effects() == 0
    assert await bench.db.fetchval("SELECT count(*) FROM jobq.outbox WHERE task = 'child'") == 0


async def test_the_row_is_deleted_before_the_first_statement_of_the_block(bench: Bench) -> None:
    statements: list[str] = []
    event.listen(
        bench.app.database.engine.sync_engine,
        "before_cursor_execute",
        lambda conn, cursor, statement, *rest: statements.append(statement),
    )

    @bench.app.task
    async def book(ctx: Context) -> None:
        async with ctx.complete() as session:
            await write_effect(session, ctx)

    worker = await bench.worker()
    await bench.commit_and_relay(book)
    statements.clear()

    await turn(worker)

    writes = [re.findall(r"\b(?:DELETE|INSERT|UPDATE)\b", statement) for statement in statements]
    assert writes == [["DELETE"], ["INSERT"]]


async def test_a_second_run_waits_for_the_first_and_its_block_does_not_run(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gate = Gate()
    entered: list[str] = []
    swallowed: list[BaseException] = []

    @bench.app.task
    async def book(ctx: Context) -> None:
        try:
            async with ctx.complete() as session:
                entered.append("entered")
                await write_effect(session, ctx)
                await gate.wait()
        except Exception as error:
            swallowed.append(error)

    first, second = await bench.worker(), await bench.worker()
    job_id = await bench.commit_and_relay(book)
    await started(first)
    await gate.arrived.wait()
    await copy_to(bench, second, first.owned.listed("default")[0])
    await started(second)
    await until(lambda: is_waiting_for_a_lock(bench), "the second run stands at its DELETE")

    gate.open.set()
    await until(lambda: not first.turns.runs and not second.turns.runs, "both runs ended")
    await settled(first)
    await settled(second)

    assert entered == ["entered"]
    assert swallowed == []
    assert await bench.effects(job_id) == 1
    assert sorted(outcomes(caplog)) == ["job already done", "job done"]
    assert len(second.owned) == 0
    await bench.assert_drained()


async def test_a_second_run_goes_on_when_the_first_rolls_back(bench: Bench) -> None:
    gate = Gate()
    entered: list[int] = []

    @bench.app.task
    async def book(ctx: Context) -> None:
        async with ctx.complete() as session:
            entered.append(1)
            await write_effect(session, ctx)
            if len(entered) == 1:
                await gate.wait()
                raise LookupError

    first, second = await bench.worker(), await bench.worker()
    job_id = await bench.commit_and_relay(book)
    await started(first)
    await gate.arrived.wait()
    await copy_to(bench, second, first.owned.listed("default")[0])
    await started(second)
    await until(lambda: is_waiting_for_a_lock(bench), "the second run stands at its DELETE")

    gate.open.set()
    await until(lambda: not first.turns.runs and not second.turns.runs, "both runs ended")
    await settled(second)
    await settled(first)

    assert await bench.effects(job_id) == 1
    await bench.assert_drained()


async def test_a_run_whose_job_has_moved_on_has_no_effect(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    gate = Gate()

    @bench.app.task
    async def book(ctx: Context) -> None:
        await gate.wait()
        async with ctx.complete() as session:
            await write_effect(session, ctx)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(book)
    await started(worker)
    await gate.arrived.wait()
    await bench.db.execute("UPDATE jobq.outbox SET generation = 2, crashes = 1 WHERE id = $1", job_id)
    gate.open.set()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert (row["generation"], row["attempts"]) == (2, 0)
    assert await bench.effects() == 0
    assert outcomes(caplog) == ["job already done"]


def test_already_done_is_no_exception_that_a_task_may_catch() -> None:
    assert not issubclass(AlreadyDone, Exception)


# --- what cannot begin goes back, and uses no attempt -----------------------------------------------------------------


async def test_a_row_locked_by_somebody_else_hands_the_job_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(settle, "LOCK_TIMEOUT_MS", 50)

    @bench.app.task
    async def book(ctx: Context) -> None:
        async with ctx.complete() as session:
            await write_effect(session, ctx)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(book)
    async with bench.db.transaction():
        await bench.db.execute("SELECT FROM jobq.outbox WHERE id = $1 FOR UPDATE", job_id)
        await turn(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert (row["attempts"], row["generation"]) == (0, 1)
    assert len(await bench.ready()) == 1
    assert outcomes(caplog) == ["job handed back"]
    await turn(worker)
    assert await bench.effects(job_id) == 1
    await bench.assert_drained()


async def test_an_exhausted_pool_hands_the_job_back(
    shared_database_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = own_engine(shared_database_url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    async with Bench.open(shared_database_url, redis_url, database=engine) as bench:

        @bench.app.task
        async def book(ctx: Context) -> None:
            async with ctx.complete() as session:
                await write_effect(session, ctx)

        worker = await bench.worker()
        job_id = await bench.commit_and_relay(book)
        async with engine.connect():
            await turn(worker)

        row = await bench.row(job_id)
        assert row is not None
        assert (row["attempts"], row["generation"]) == (0, 1)
        assert outcomes(caplog) == ["job handed back"]
        assert "more slots than database connections for ctx.complete()" in caplog.messages
        await turn(worker)
        assert await bench.effects(job_id) == 1
        await bench.assert_drained()
    await engine.dispose()


async def test_connections_of_the_pool_that_died_with_their_server_cost_no_attempt(
    shared_database_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = own_engine(shared_database_url, pool_size=2)
    async with Bench.open(shared_database_url, redis_url, database=engine) as bench:

        @bench.app.task
        async def book(ctx: Context) -> None:
            async with ctx.complete() as session:
                await write_effect(session, ctx)

        worker = await bench.worker()
        async with engine.connect() as one, engine.connect() as other:
            pooled = [await connection.scalar(text("SELECT pg_backend_pid()")) for connection in (one, other)]
        job_id = await bench.commit_and_relay(book)
        await bench.db.execute("SELECT pg_terminate_backend(pid, 5000) FROM unnest($1::int[]) AS t (pid)", pooled)
        await turn(worker)

        assert outcomes(caplog) == ["job done"]
        assert await bench.effects(job_id) == 1
        await bench.assert_drained()
    await engine.dispose()


async def test_a_server_that_is_away_when_a_job_would_be_completed_costs_no_attempt(
    shared_database_url: str, redis_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("jobq.run._PAUSE_S", 0.01)
    async with (
        postgres_proxy(shared_database_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, database=through) as bench,
    ):

        @bench.app.task
        async def book(ctx: Context) -> None:
            proxy.is_refusing = True
            proxy.cut()
            try:
                async with ctx.complete() as session:
                    await write_effect(session, ctx)
            finally:
                proxy.is_refusing = False

        worker = await bench.worker()
        job_id = await bench.commit_and_relay(book)
        await turn(worker)

        row = await bench.row(job_id)
        assert row is not None
        assert (row["attempts"], row["generation"]) == (0, 1)
        assert outcomes(caplog) == ["job handed back"]


async def with_context(ctx: Context) -> None: ...


async def without_context() -> None: ...


def in_a_thread(ctx: Context) -> None: ...


@pytest.mark.parametrize(
    ("task", "is_own", "warns"),
    [
        (with_context, False, True),
        (without_context, False, False),
        (in_a_thread, False, False),
        (with_context, True, False),
    ],
    ids=["may complete", "no context", "in a thread", "engine made from a URL"],
)
async def test_a_small_pool_is_warned_of_where_jobs_may_wait_for_it_and_it_can_be_raised(
    shared_database_url: str,
    redis_url: str,
    caplog: pytest.LogCaptureFixture,
    task: Callable[..., Any],
    is_own: bool,
    warns: bool,
) -> None:
    engine = own_engine(shared_database_url)
    database = shared_database_url if is_own else engine
    async with Bench.open(shared_database_url, redis_url, database=database) as bench:
        bench.app.task(task)

        await bench.worker(concurrency=100)

    warned = [record for record in caplog.records if "more slots" in record.getMessage()]
    assert bool(warned) is warns
    assert all("pool_size" in record.__dict__["fields"]["remedy"] for record in warned)
    await engine.dispose()


async def test_a_serialization_failure_at_the_beginning_is_tried_again(
    shared_database_url: str, redis_url: str
) -> None:
    engine = own_engine(shared_database_url, isolation_level="REPEATABLE READ")
    async with Bench.open(shared_database_url, redis_url, database=engine) as bench:
        runs: list[int] = []

        @bench.app.task
        async def book(ctx: Context) -> None:
            runs.append(1)
            async with ctx.complete() as session:
                await write_effect(session, ctx)

        worker = await bench.worker()
        job_id = await bench.commit_and_relay(book)
        holder = await bench.app.database.connect(schema="jobq", name="holder")
        await holder.execute("BEGIN")
        await holder.execute("UPDATE jobq.outbox SET headers = '{}' WHERE id = $1", job_id)
        await started(worker)
        await until(lambda: is_waiting_for_a_lock(bench), "the run stands at its DELETE, with an old snapshot")
        await holder.execute("COMMIT")
        await holder.close()
        await until(lambda: not worker.turns.runs, "the run ended")
        await settled(worker)

        assert runs == [1]
        assert await bench.effects(job_id) == 1
        await bench.assert_drained()
    await engine.dispose()


async def test_an_engine_that_commits_by_itself_is_refused_before_anything_is_deleted(
    shared_database_url: str, redis_url: str
) -> None:
    engine = own_engine(shared_database_url, isolation_level="AUTOCOMMIT")
    async with Bench.open(shared_database_url, redis_url) as bench:
        app = await bench.second_app(database=engine)

        @app.task
        async def book(ctx: Context) -> None:
            async with ctx.complete() as session:
                await write_effect(session, ctx)
                raise LookupError("and the job would be gone")

        @bench.app.task(name="book")
        async def enqueue_book() -> None: ...

        worker = await bench.worker(app=app)
        job_id = await bench.commit_and_relay(enqueue_book)

        await turn(worker)

        row = await bench.row(job_id)
        assert row is not None
        assert row["error_type"] == "NotInTransaction"
        assert await bench.effects() == 0
    await engine.dispose()


# --- the transaction is the block's ------------------------------------------------------------------------------


async def run_once(bench: Bench, block: Any) -> tuple[Any, Worker]:
    """Run a job whose complete() block is `block(session, ctx)`; returns its row."""

    @bench.app.task
    async def book(ctx: Context) -> None:
        async with ctx.complete() as session:
            await write_effect(session, ctx)
            await block(session, ctx)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(book)
    await turn(worker)
    assert len(worker.owned) == 0
    return await bench.row(job_id), worker


async def test_an_inner_rollback_fails_loudly(bench: Bench) -> None:
    async def block(session: Any, ctx: Any) -> None:
        await session.rollback()

    row, _ = await run_once(bench, block)

    assert (row["attempts"], row["error_type"]) == (1, "TransactionUsed")
    assert await bench.effects() == 0


async def test_an_inner_commit_fails_loudly_and_the_effects_stay_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async def block(session: Any, ctx: Any) -> None:
        await session.commit()

    row, _ = await run_once(bench, block)

    assert row is None, "that commit completed the job"
    assert await bench.effects() == 1
    assert "TransactionUsed" in caplog.text
    await bench.assert_drained()


async def test_statements_after_an_inner_commit_are_refused(bench: Bench) -> None:
    async def block(session: Any, ctx: Any) -> None:
        await session.commit()
        await write_effect(session, ctx, "a second one")

    row, _ = await run_once(bench, block)

    assert row is None
    assert await bench.effects() == 1


@pytest.mark.parametrize("statement", ["ROLLBACK", "COMMIT"])
async def test_an_end_of_the_transaction_sent_as_sql_text_fails_loudly(bench: Bench, statement: str) -> None:
    async def block(session: Any, ctx: Any) -> None:
        await session.execute(text(statement))

    row, _ = await run_once(bench, block)

    if statement == "ROLLBACK":
        assert (row["attempts"], row["error_type"]) == (1, "TransactionUsed")
        assert await bench.effects() == 0
    else:
        assert row is None
        assert await bench.effects() == 1


async def test_a_database_error_that_the_block_swallows_is_a_failure_and_not_silence(bench: Bench) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK then, and no error: the job would run again and again, uncounted."""

    async def block(session: Any, ctx: Any) -> None:
        with contextlib.suppress(Exception):
            await session.execute(text("SELECT 1 / 0"))

    row, _ = await run_once(bench, block)

    assert row["attempts"] == 1
    assert await bench.effects() == 0


async def test_a_savepoint_that_fails_leaves_the_rest_of_the_block_whole(bench: Bench) -> None:
    async def block(session: Any, ctx: Any) -> None:
        try:
            async with session.begin_nested():
                await session.execute(text("SELECT 1 / 0"))
        except Exception:
            pass

    row, _ = await run_once(bench, block)

    assert row is None
    assert await bench.effects() == 1


async def test_a_second_block_is_refused_and_the_first_stays(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    @bench.app.task
    async def book(ctx: Context) -> None:
        async with ctx.complete() as session:
            await write_effect(session, ctx)
        async with ctx.complete() as session:
            await write_effect(session, ctx, "a second one")

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(book)

    await turn(worker)

    assert await bench.effects(job_id) == 1
    assert outcomes(caplog) == ["job failed after completion"]
    await bench.assert_drained()


async def test_a_second_block_is_refused_also_after_a_first_that_failed(bench: Bench) -> None:
    raised: list[BaseException] = []

    @bench.app.task
    async def book(ctx: Context) -> None:
        try:
            async with ctx.complete() as session:
                await write_effect(session, ctx)
                raise LookupError
        except LookupError:
            pass
        try:
            async with ctx.complete() as session:
                await write_effect(session, ctx, "a second one")
        except TransactionUsed as error:
            raised.append(error)
            raise

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(book)

    await turn(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert (row["attempts"], row["error_type"]) == (1, "TransactionUsed")
    assert len(raised) == 1
    assert await bench.effects() == 0


async def test_an_exception_after_the_commit_is_told_and_never_retried(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[int] = []

    @bench.app.task
    async def book(ctx: Context) -> None:
        runs.append(1)
        async with ctx.complete() as session:
            await write_effect(session, ctx)
        raise LookupError("too late")

    worker = await bench.worker()
    await bench.commit_and_relay(book)

    await turn(worker)
    await bench.relay()

    assert runs == [1]
    assert outcomes(caplog) == ["job failed after completion"]
    assert await bench.effects() == 1
    await bench.assert_drained()


async def test_a_synchronous_task_is_told_that_it_has_no_such_block(bench: Bench) -> None:
    @bench.app.task
    def book(ctx: Context) -> None:
        async def body() -> None:
            async with ctx.complete():
                pass

        asyncio.run(body())

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(book)

    await turn(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert row["error_type"] == "ConfigurationError"


# --- COMMIT ------------------------------------------------------------------------------------------------------


async def hold_commits(bench: Bench) -> None:
    """Make every COMMIT that wrote an effect wait for an advisory lock, which `bench.db` takes."""
    await bench.db.execute("""
        CREATE FUNCTION wait_at_commit() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_advisory_xact_lock_shared(42); RETURN NULL; END'
    """)
    await bench.db.execute("""
        CREATE CONSTRAINT TRIGGER wait_at_commit AFTER INSERT ON effect
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait_at_commit()
    """)
    await bench.db.execute("SELECT pg_advisory_lock(42)")


async def is_committing(bench: Bench) -> bool:
    return bool(
        await bench.db.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory' AND query LIKE 'COMMIT%'"
        )
    )


async def test_a_cancellation_during_commit_waits_for_its_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(settle, "LOCK_TIMEOUT_MS", 60_000)
    await hold_commits(bench)
    runs: list[int] = []

    @bench.app.task
    async def book(ctx: Context) -> None:
        runs.append(1)
        async with ctx.complete() as session:
            await write_effect(session, ctx)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(book)
    await started(worker)
    await until(lambda: is_committing(bench), "the run is inside COMMIT")

    # Again and again, while PostgreSQL has time enough to act on a request to cancel.
    for _ in range(30):
        worker.shutdown.cancel_runs()
        assert await is_committing(bench)
    assert len(worker.turns.runs) == 1
    await bench.db.execute("SELECT pg_advisory_unlock(42)")
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)

    assert runs == [1]
    assert await bench.effects(job_id) == 1
    assert await bench.row(job_id) is None
    assert outcomes(caplog) == ["job done"]
    assert await bench.db.fetchval("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'") == 0
    await bench.assert_drained()


async def test_a_commit_that_fails_is_a_failed_attempt(bench: Bench) -> None:
    await bench.db.execute("CREATE TABLE parent (id int PRIMARY KEY)")
    await bench.db.execute("ALTER TABLE effect ADD parent_id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED")

    async def block(session: Any, ctx: Any) -> None:
        await session.execute(text("INSERT INTO effect (job_id, parent_id) VALUES (NULL, 1)"))

    row, _ = await run_once(bench, block)

    assert (row["attempts"], row["generation"]) == (1, 2)
    assert await bench.effects() == 0


async def test_a_lost_connection_in_the_block_undoes_everything(bench: Bench) -> None:
    async def block(session: Any, ctx: Any) -> None:
        await bench.db.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = $1",
            f"jobq:{ctx._run.worker}",
        )

    row, _ = await run_once(bench, block)

    assert (row["attempts"], row["generation"]) == (1, 2)
    assert await bench.effects() == 0


async def test_the_session_is_named_after_its_worker_until_the_commit(bench: Bench) -> None:
    names: list[str] = []

    async def name(session: Any) -> str:
        return str((await session.execute(text("SELECT current_setting('application_name')"))).scalar())

    @bench.app.task
    async def book(ctx: Context) -> None:
        async with ctx.complete() as session:
            names.append(await name(session))

    worker = await bench.worker()
    await bench.commit_and_relay(book)

    await turn(worker)
    async with bench.app.database.sessions() as session:
        names.append(await name(session))

    assert names[0] == f"jobq:{worker.name}"
    assert names[1] != names[0]


# --- what else a context tells -----------------------------------------------------------------------------------


async def test_a_context_tells_who_the_job_is(bench: Bench) -> None:
    seen: dict[str, Any] = {}

    @bench.app.task(queue="mail")
    async def look(ctx: Context) -> None:
        seen.update(
            id=ctx.id,
            task=ctx.task,
            queue=ctx.queue,
            attempt=ctx.attempt,
            max_attempts=ctx.max_attempts,
            headers=ctx.headers,
            stopping=ctx.stopping,
            keys=[ctx.idempotency_key("a"), ctx.idempotency_key("b")],
        )
        worker.orders.stopping.set()
        seen["stopping later"] = ctx.stopping

    worker = await bench.worker(queues=("mail",))
    job_id = await bench.commit_and_relay(look, headers={"request": "7"}, max_attempts=3)

    await turn(worker)

    assert seen.pop("keys")[0] != seen["id"]
    assert seen == {
        "id": job_id,
        "task": "look",
        "queue": "mail",
        "attempt": 1,
        "max_attempts": 3,
        "headers": {"request": "7"},
        "stopping": False,
        "stopping later": True,
    }


async def test_an_idempotency_key_is_the_same_at_every_attempt_and_differs_by_name(bench: Bench) -> None:
    keys: list[tuple[str, str]] = []

    @bench.app.task
    async def call_outside(ctx: Context) -> None:
        keys.append((ctx.idempotency_key("mail"), ctx.idempotency_key("charge")))
        raise LookupError

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(call_outside)
    await turn(worker)
    await bench.db.execute("UPDATE jobq.outbox SET run_at = NULL WHERE id = $1", job_id)
    await bench.relay()
    await turn(worker)

    assert keys[0] == keys[1]
    assert keys[0][0] != keys[0][1]
