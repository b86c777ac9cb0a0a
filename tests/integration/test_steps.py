"""`ctx.step()`: what a step has returned is kept, whatever becomes of the run that took it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
import pytest
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from jobq import Context, Retry, Snooze, TransactionUsed, context
from jobq.outbox import browse, steps
from jobq.worker.worker import Worker
from tests.builders import Bench, Gate, settled, started, turn, write_effect
from tests.faults.proxy import postgres_proxy
from tests.waiting import until

if TYPE_CHECKING:
    from decimal import Context as NeverImported


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


class Gateway:
    """The world outside, which counts how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    async def charge(self, invoice: int) -> str:
        self.calls += 1
        return f"paid-{invoice}-{self.calls}"


def step_task(bench: Bench, gateway: Gateway, *, until_call: int = 99) -> tuple[Any, list[str]]:
    """A task that takes a step and fails, up to its run of this number; and what each run got."""
    got: list[str] = []

    @bench.app.task
    async def charge(ctx: Context) -> None:
        got.append(await ctx.step("charge", gateway.charge, 7))
        if len(got) < until_call:
            raise LookupError

    return charge, got


async def make_due(bench: Bench) -> None:
    await bench.db.execute("UPDATE jobq.outbox SET run_at = NULL")
    await bench.relay()


async def run_twice(bench: Bench, body: Callable[[Context], Awaitable[None]]) -> tuple[Worker, UUID]:
    """Run one job whose task is `body` and then fails, and run it once more, to its end."""
    runs: list[int] = []

    @bench.app.task(name="twice")
    async def task(ctx: Context) -> None:
        runs.append(1)
        await body(ctx)
        if len(runs) == 1:
            raise Retry(delay=60)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(task)
    await turn(worker)
    await make_due(bench)
    await turn(worker)
    assert len(worker.owned) == 0
    return worker, job_id


async def run_once(bench: Bench, body: Callable[[Context], Awaitable[None]]) -> tuple[UUID, Any]:
    """Run one job whose task is `body`; returns its row."""

    @bench.app.task(name="once")
    async def task(ctx: Context) -> None:
        await body(ctx)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(task)
    await turn(worker)
    assert len(worker.owned) == 0
    return job_id, await bench.row(job_id)


async def kept(bench: Bench) -> dict[str, str]:
    return {row["name"]: row["result"] for row in await bench.db.fetch("SELECT name, result FROM jobq.step")}


def outcomes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "jobq.worker.attempt"]


# --- a result outlives its run ---------------------------------------------------------------------------------------


async def test_a_step_is_taken_once_and_every_later_run_gets_its_result(bench: Bench) -> None:
    gateway = Gateway()
    charge, got = step_task(bench, gateway, until_call=3)
    worker = await bench.worker()
    await bench.commit_and_relay(charge)

    for _ in range(3):
        await turn(worker)
        await make_due(bench)

    assert got == ["paid-7-1"] * 3
    assert gateway.calls == 1
    await bench.assert_drained()


async def test_a_step_survives_the_death_of_its_worker(bench: Bench) -> None:
    gateway, gate, got = Gateway(), Gate(), []

    @bench.app.task
    async def charge(ctx: Context) -> None:
        got.append(await ctx.step("charge", gateway.charge, 7))
        if len(got) == 1:
            await gate.wait()

    dying, living = await bench.worker(), await bench.worker()
    await bench.commit_and_relay(charge)
    await started(dying)
    await gate.arrived.wait()

    dying.heartbeat.stop()
    for run in list(dying.turns.runs):
        run.cancel()
    await until(lambda: not dying.turns.runs, "nothing of it runs")
    await living.sweeper.sweep("default", dying.name, (await bench.broker.beats("default"))[dying.name])
    await turn(living)

    assert got == ["paid-7-1"] * 2
    assert gateway.calls == 1
    await bench.assert_drained()


async def test_a_step_survives_a_snooze_and_a_shutdown(bench: Bench) -> None:
    gateway, gate, got = Gateway(), Gate(), []

    @bench.app.task
    async def charge(ctx: Context) -> None:
        got.append(await ctx.step("charge", gateway.charge, 7))
        if len(got) == 1:
            raise Snooze(60)
        if len(got) == 2:
            await gate.wait()

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(charge)
    await turn(worker)
    await make_due(bench)
    await started(worker)
    await gate.arrived.wait()
    worker.shutdown.cancel_runs()
    await until(lambda: not worker.turns.runs, "the run was interrupted")
    await settled(worker)
    row = await bench.row(job_id)
    await bench.relay()
    await turn(worker)

    assert row is not None
    assert (row["generation"], row["attempts"]) == (3, 0)
    assert got == ["paid-7-1"] * 3
    assert gateway.calls == 1
    await bench.assert_drained()


async def test_a_step_survives_the_death_of_its_job_and_its_return(bench: Bench) -> None:
    gateway = Gateway()
    charge, got = step_task(bench, gateway, until_call=2)
    worker = await bench.worker()
    job_id = await bench.commit_and_relay(charge, max_attempts=1)
    await turn(worker)
    dead = await bench.dead(job_id)

    await browse.retry_dead(bench.db, "jobq", [job_id])
    await bench.relay()
    await turn(worker)

    assert dead is not None
    assert dead["reason"] == "exhausted"
    assert got == ["paid-7-1"] * 2
    assert gateway.calls == 1
    await bench.assert_drained()


async def test_a_step_that_failed_is_not_kept_and_is_taken_again(bench: Bench) -> None:
    calls: list[int] = []

    async def refuse_first() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("the gateway is away")
        return len(calls)

    got: list[int] = []

    async def body(ctx: Context) -> None:
        got.append(await ctx.step("charge", refuse_first))

    @bench.app.task
    async def task(ctx: Context) -> None:
        await body(ctx)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(task)
    await turn(worker)
    row, after_failure = await bench.row(job_id), await kept(bench)
    await make_due(bench)
    await turn(worker)

    assert row is not None
    assert (row["attempts"], row["error_type"]) == (1, "ConnectionError")
    assert after_failure == {}
    assert got == [2]
    await bench.assert_drained()


async def test_the_steps_of_a_job_are_its_own_and_have_each_a_name(bench: Bench) -> None:
    gateway, got = Gateway(), []

    @bench.app.task
    async def charge(ctx: Context, invoice: int) -> None:
        got.append(await ctx.step("charge", gateway.charge, invoice))
        got.append(await ctx.step("fee", gateway.charge, invoice=invoice))

    worker = await bench.worker(concurrency=1)
    await bench.commit_and_relay(charge, 1)
    await turn(worker)
    await bench.commit_and_relay(charge, 2)
    await turn(worker)

    assert got == ["paid-1-1", "paid-1-2", "paid-2-3", "paid-2-4"]


async def test_nothing_is_held_open_while_a_step_runs(shared_database_url: str, redis_url: str) -> None:
    engine = create_async_engine(
        make_url(shared_database_url).set(drivername="postgresql+asyncpg"), pool_size=1, max_overflow=0, pool_timeout=5
    )
    async with Bench.open(shared_database_url, redis_url, database=engine) as bench:
        got: list[str] = []

        async def ask_the_pool() -> str:
            async with engine.connect() as connection:
                found = await connection.execute(
                    text("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'")
                )
                return f"{found.scalar()} idle in a transaction"

        async def body(ctx: Context) -> None:
            got.append(await ctx.step("ask", ask_the_pool))

        await run_once(bench, body)

        assert got == ["0 idle in a transaction"]
        await bench.assert_drained()
    await engine.dispose()


# --- two runs at once ------------------------------------------------------------------------------------------------


async def copy_to(bench: Bench, worker: Worker, entry: bytes) -> None:
    """Give a worker the same entry too, as a Redis that went back in time would."""
    await bench.redis.rpush(bench.broker.keys("default").working(worker.name), entry)
    await worker.turns.adopt("default", [entry])


async def test_two_runs_at_once_go_on_with_one_result(bench: Bench) -> None:
    gate, calls, got = Gate(), 0, []

    async def charge() -> str:
        nonlocal calls
        calls += 1
        mine = f"paid-{calls}"
        if calls == 1:
            await gate.wait()
        return mine

    @bench.app.task
    async def book(ctx: Context) -> None:
        got.append(await ctx.step("charge", charge))
        async with ctx.complete() as session:
            await write_effect(session, ctx, got[-1])

    first, second = await bench.worker(), await bench.worker()
    job_id = await bench.commit_and_relay(book)
    await started(first)
    await gate.arrived.wait()
    await copy_to(bench, second, first.owned.listed("default")[0])
    await turn(second)
    gate.open.set()
    await until(lambda: not first.turns.runs, "the first run ended")
    await settled(first)

    assert calls == 2
    assert got == ["paid-2"] * 2, "the first run's call ended last, and its result was not the first to be kept"
    assert await bench.effects(job_id) == 1
    assert await bench.db.fetchval("SELECT note FROM effect") == "paid-2"
    await bench.assert_drained()


async def test_two_results_written_at_the_same_moment_become_one(shared_database_url: str, redis_url: str) -> None:
    """The other one commits between our statement's snapshot and its row, which a stricter isolation calls an error."""
    strict = {"server_settings": {"default_transaction_isolation": "repeatable read"}}
    engine = create_async_engine(
        make_url(shared_database_url).set(drivername="postgresql+asyncpg"), connect_args=strict
    )
    async with Bench.open(shared_database_url, redis_url, database=engine) as bench:
        gateway, got = Gateway(), []

        @bench.app.task
        async def charge(ctx: Context) -> None:
            got.append(await ctx.step("charge", gateway.charge, 7))

        worker = await bench.worker()
        job_id = await bench.commit_and_relay(charge)
        async with bench.db.transaction():
            await bench.db.execute("INSERT INTO jobq.step VALUES ($1, 'charge', '\"theirs\"')", job_id)
            await started(worker)
            await until(lambda: is_waiting_for_a_lock(bench), "the run's result waits for the other one")
        await until(lambda: not worker.turns.runs, "the run ended")
        await settled(worker)

        assert got == ["theirs"]
        await bench.assert_drained()
    await engine.dispose()


async def is_waiting_for_a_lock(bench: Bench) -> bool:
    return bool(
        await bench.db.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
    )


@pytest.mark.parametrize("has_result", [False, True])
async def test_a_run_whose_job_has_moved_on_takes_no_step(
    bench: Bench, caplog: pytest.LogCaptureFixture, has_result: bool
) -> None:
    caplog.set_level(logging.INFO)
    gateway, gate = Gateway(), Gate()
    swallowed: list[BaseException] = []

    @bench.app.task
    async def charge(ctx: Context) -> None:
        await gate.wait()
        try:
            await ctx.step("charge", gateway.charge, 7)
        except Exception as error:
            swallowed.append(error)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(charge)
    await started(worker)
    await gate.arrived.wait()
    if has_result:
        await bench.db.execute("INSERT INTO jobq.step VALUES ($1, 'charge', '\"paid\"')", job_id)
    await bench.db.execute("UPDATE jobq.outbox SET generation = 2, crashes = 1 WHERE id = $1", job_id)
    gate.open.set()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert (row["generation"], row["attempts"], gateway.calls) == (2, 0, 0)
    assert swallowed == []
    assert outcomes(caplog) == ["job already done"]


async def test_a_cancelled_job_stops_at_its_next_step(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    gateway, gate = Gateway(), Gate()

    @bench.app.task
    async def charge(ctx: Context) -> None:
        await ctx.step("first", gateway.charge, 1)
        await gate.wait()
        await ctx.step("second", gateway.charge, 2)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(charge)
    await started(worker)
    await gate.arrived.wait()
    async with bench.app.database.sessions.begin() as session:
        assert await bench.app.cancel(session, job_id)
    gate.open.set()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)

    assert gateway.calls == 1
    assert outcomes(caplog) == ["job already done"]
    await bench.assert_drained()


async def test_steps_side_by_side_that_stop_the_run_together_stop_it_as_one(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gateway, gate = Gateway(), Gate()

    @bench.app.task
    async def charge(ctx: Context) -> None:
        await gate.wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(ctx.step("one", gateway.charge, 1))
            group.create_task(ctx.step("two", gateway.charge, 2))

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(charge)
    await started(worker)
    await gate.arrived.wait()
    await bench.db.execute("UPDATE jobq.outbox SET generation = 2 WHERE id = $1", job_id)
    gate.open.set()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)

    assert outcomes(caplog) == ["job already done"]
    assert gateway.calls == 0


# --- what a step may be and return -----------------------------------------------------------------------------------


@dataclass
class Payment:
    id: UUID
    amount: Decimal
    at: datetime


class Receipt(BaseModel):
    payment: Payment
    days: tuple[date, ...]


PAYMENT = Payment(UUID(int=7), Decimal("9.90"), datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC))


def pay() -> Payment:
    return PAYMENT


async def pay_later() -> Payment:
    return PAYMENT


def make_receipt() -> Receipt:
    return Receipt(payment=PAYMENT, days=(date(2026, 1, 2),))


def nothing() -> None:
    return None


def plain() -> dict[str, Any]:
    return {"a": [1, 2.5, None, True, "ä"]}


def promised() -> Awaitable[Payment]:
    return pay_later()


def unannotated():
    return (1, "two", datetime(2026, 1, 2, tzinfo=UTC))


def span(days: int) -> timedelta:
    return timedelta(days=days)


class Callable_:
    async def __call__(self) -> UUID:
        return UUID(int=7)

    def method(self) -> UUID:
        return UUID(int=8)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (pay, PAYMENT),
        (pay_later, PAYMENT),
        (promised, PAYMENT),
        (lambda: pay_later(), {"id": str(PAYMENT.id), "amount": "9.90", "at": "2026-01-02T03:04:05.000006Z"}),
        (make_receipt, Receipt(payment=PAYMENT, days=(date(2026, 1, 2),))),
        (nothing, None),
        (plain, {"a": [1, 2.5, None, True, "ä"]}),
        (unannotated, [1, "two", "2026-01-02T00:00:00Z"]),
        (partial(span, 3), timedelta(days=3)),
        (Callable_(), UUID(int=7)),
        (Callable_().method, UUID(int=8)),
        (Callable_().__call__, UUID(int=7)),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
async def test_a_result_comes_back_as_annotated_and_the_first_run_gets_the_same(
    bench: Bench, function: Any, expected: Any
) -> None:
    got: list[Any] = []

    async def body(ctx: Context) -> None:
        got.append(await ctx.step("call", function))

    await run_twice(bench, body)

    assert got == [expected, expected]
    assert [type(result) for result in got] == [type(expected)] * 2


async def test_a_task_can_be_a_step_of_another(bench: Bench) -> None:
    got: list[Any] = []

    @bench.app.task
    async def load(number: int) -> Payment:
        return Payment(UUID(int=number), Decimal(1), PAYMENT.at)

    async def body(ctx: Context) -> None:
        got.append(await ctx.step("load", load, 5))

    await run_twice(bench, body)

    assert [payment.id for payment in got] == [UUID(int=5)] * 2


async def test_a_plain_function_runs_in_a_thread_and_an_async_one_does_not(bench: Bench) -> None:
    threads: list[str] = []

    def sync() -> None:
        threads.append(threading.current_thread().name)

    async def loop() -> None:
        sync()

    async def body(ctx: Context) -> None:
        await ctx.step("sync", sync)
        await ctx.step("loop", loop)

    await run_once(bench, body)

    main = threading.main_thread().name
    assert [name == main for name in threads] == [False, True]


@dataclass
class Opaque:
    handle: Any


def opaque() -> Opaque:
    return Opaque(object())


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda: object(), "result: Unable to serialize unknown type"),
        (lambda: float("nan"), "result: is not a finite number"),
        (lambda: {"a": ["\0"]}, "result.a.0: holds a NUL character"),
        (lambda: 2**63, "result: is an integer beyond 64 bits"),
        (lambda: "x" * (1024 * 1024), "result: takes 1,048,578 bytes of JSON, the limit is 1,048,576"),
        (opaque, "result: Unable to serialize unknown type"),
    ],
    ids=["object", "nan", "nul", "int", "size", "dataclass"],
)
async def test_a_result_that_cannot_be_kept_ends_the_job_at_once_and_says_why(
    bench: Bench, function: Any, said: str
) -> None:
    calls: list[int] = []

    def call() -> Any:
        calls.append(1)
        return function()

    async def body(ctx: Context) -> None:
        await ctx.step("charge", call)

    job_id, row = await run_once(bench, body)

    dead = await bench.dead(job_id)
    assert row is None, "a retry would call again, up to 25 times"
    assert dead is not None
    assert (dead["reason"], dead["attempts"], dead["error_type"]) == ("invalid", 1, "InvalidResult")
    assert f"task 'once', ctx.step('charge'): {said}" in dead["last_error"]
    assert calls == [1]
    assert await kept(bench) == {}


async def test_a_result_of_another_type_than_annotated_ends_the_job_at_once_too(bench: Bench) -> None:
    def lie() -> Payment:
        return {"id": "none"}  # type: ignore[return-value]

    async def body(ctx: Context) -> None:
        await ctx.step("charge", lie)

    job_id, _ = await run_once(bench, body)

    error = (await bench.dead(job_id))["last_error"]  # type: ignore[index]
    assert "result: is not of its annotated type (id: Input should be a valid UUID" in error
    assert "none" not in error


def unknown_type() -> NeverImported:
    raise AssertionError


def never_json() -> asyncio.Event:
    raise AssertionError


@pytest.mark.parametrize("function", [unknown_type, never_json])
async def test_a_return_type_that_json_cannot_hold_is_refused_before_the_call(bench: Bench, function: Any) -> None:
    async def body(ctx: Context) -> None:
        await ctx.step("charge", function)

    _, row = await run_once(bench, body)

    assert (row["error_type"], row["attempts"]) == ("ConfigurationError", 1)
    assert "ctx.step('charge'): " in row["last_error"]
    assert "Nothing has been called; wrap the call in a function of your own" in row["last_error"]


async def test_a_kept_result_that_no_longer_fits_ends_the_job_and_repeats_nothing(bench: Bench) -> None:
    calls: list[int] = []

    async def charge() -> Payment:
        calls.append(1)
        return PAYMENT

    async def body(ctx: Context) -> None:
        await bench.db.execute("INSERT INTO jobq.step VALUES ($1, 'charge', $2)", ctx.id, '{"id": 7}')
        await ctx.step("charge", charge)

    job_id, _ = await run_once(bench, body)

    dead = await bench.dead(job_id)
    assert dead is not None
    assert dead["reason"] == "invalid"
    assert "result: what an earlier run has kept does not fit its annotated type (" in dead["last_error"]
    assert calls == []


# --- where a step may stand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "x" * 129, "a\0b", "a\nb", 7], ids=["empty", "long", "nul", "newline", "number"])
async def test_a_name_that_cannot_be_kept_is_refused_before_the_call(bench: Bench, name: Any) -> None:
    gateway = Gateway()

    async def body(ctx: Context) -> None:
        await ctx.step(name, gateway.charge, 7)

    _, row = await run_once(bench, body)

    assert row["error_type"] == "ConfigurationError"
    assert "ctx.step(): the name of a step is 1 to 128 printable characters" in row["last_error"]
    assert gateway.calls == 0


async def test_a_name_of_128_characters_of_four_bytes_is_kept(bench: Bench) -> None:
    gateway = Gateway()

    async def body(ctx: Context) -> None:
        await ctx.step("\U0001f600" * 128, gateway.charge, 7)

    await run_twice(bench, body)

    assert gateway.calls == 1
    await bench.assert_drained()


async def test_a_name_used_twice_in_a_run_is_refused_since_it_would_skip_the_second_call(bench: Bench) -> None:
    gateway = Gateway()

    async def body(ctx: Context) -> None:
        for invoice in (1, 2):
            await ctx.step("charge", gateway.charge, invoice)

    _, row = await run_once(bench, body)

    assert row["error_type"] == "ConfigurationError"
    assert "this run has taken a step of that name" in row["last_error"]
    assert gateway.calls == 1


async def test_a_step_that_failed_may_be_tried_again_in_the_same_run(bench: Bench) -> None:
    calls: list[int] = []

    async def refuse_first() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError
        return 7

    async def body(ctx: Context) -> None:
        try:
            await ctx.step("charge", refuse_first)
        except ConnectionError:
            assert await ctx.step("charge", refuse_first) == 7

    _, row = await run_once(bench, body)

    assert row is None
    assert len(calls) == 2


@pytest.mark.parametrize("where", ["inside", "after"])
async def test_a_step_inside_or_after_complete_is_refused(
    bench: Bench, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    gateway = Gateway()
    refused: list[BaseException] = []

    async def body(ctx: Context) -> None:
        async with ctx.complete():
            if where == "inside":
                try:
                    await ctx.step("charge", gateway.charge, 7)
                except TransactionUsed as error:
                    refused.append(error)
        if where == "after":
            with pytest.raises(TransactionUsed, match="take the step before it"):
                await ctx.step("charge", gateway.charge, 7)
            refused.append(TransactionUsed())

    _, row = await run_once(bench, body)

    assert row is None
    assert len(refused) == 1
    assert gateway.calls == 0


async def test_a_synchronous_task_is_told_that_it_has_no_steps(bench: Bench) -> None:
    @bench.app.task
    def book(ctx: Context) -> None:
        asyncio.run(ctx.step("charge", plain))

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(book)
    await turn(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert row["error_type"] == "ConfigurationError"
    assert "'book' is a plain function, and ctx.step() needs `async def`" in row["last_error"]


async def test_sessions_bound_to_one_connection_keep_steps_in_its_transaction(bench: Bench) -> None:
    """As the fixtures of an application have it that rolls everything back after each test."""
    job_id = UUID(int=7)
    async with bench.app.database.engine.connect() as connection:
        await connection.begin()
        sessions: async_sessionmaker[AsyncSession] = async_sessionmaker(
            bind=connection, join_transaction_mode="create_savepoint"
        )
        kept_first = await steps.record(sessions, "jobq", job_id, "charge", "1")
        kept_second = await steps.record(sessions, "jobq", job_id, "charge", "2")
        recalled = await steps.recall(sessions, "jobq", (job_id, 1), "charge")
        await connection.rollback()

    assert (kept_first, kept_second, recalled) == ("1", "1", (False, "1"))
    assert await kept(bench) == {}


# --- PostgreSQL away, the pool exhausted, a cancellation -------------------------------------------------------------


async def test_an_exhausted_pool_before_the_call_hands_the_job_back(
    shared_database_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = create_async_engine(
        make_url(shared_database_url).set(drivername="postgresql+asyncpg"),
        pool_size=1,
        max_overflow=0,
        pool_timeout=0.05,
    )
    async with Bench.open(shared_database_url, redis_url, database=engine) as bench:
        gateway = Gateway()
        charge, _ = step_task(bench, gateway, until_call=1)
        worker = await bench.worker()
        job_id = await bench.commit_and_relay(charge)
        async with engine.connect():
            await turn(worker)

        row = await bench.row(job_id)
        assert row is not None
        assert (row["attempts"], row["generation"], gateway.calls) == (0, 1, 0)
        assert outcomes(caplog) == ["job handed back"]
        await turn(worker)
        assert gateway.calls == 1
        await bench.assert_drained()
    await engine.dispose()


async def test_an_exhausted_pool_after_the_call_throws_no_result_away(
    shared_database_url: str, redis_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "_PAUSE_S", 0.01)
    engine = create_async_engine(
        make_url(shared_database_url).set(drivername="postgresql+asyncpg"),
        pool_size=1,
        max_overflow=0,
        pool_timeout=0.05,
    )
    async with Bench.open(shared_database_url, redis_url, database=engine) as bench:
        blocking: list[Any] = []

        async def charge() -> str:
            blocking.append(await engine.connect())
            return "paid"

        got: list[str] = []
        tries: list[int] = []

        async def counted(*args: Any) -> str:
            tries.append(1)
            return await record(*args)

        record = steps.record
        monkeypatch.setattr(steps, "record", counted)

        @bench.app.task
        async def task(ctx: Context) -> None:
            got.append(await ctx.step("charge", charge))

        worker = await bench.worker()
        await bench.commit_and_relay(task)
        await started(worker)
        await until(lambda: len(tries) > 2, "it tries again and again")
        await blocking[0].close()
        await until(lambda: not worker.turns.runs, "the run ended")
        await settled(worker)

        assert got == ["paid"]
        assert caplog.messages.count("cannot keep the result of a step yet, trying again") == 1
        await bench.assert_drained()
    await engine.dispose()


async def test_a_primary_that_takes_no_writes_just_after_the_call_throws_no_result_away(
    shared_database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that was demoted is, before its clients are cut off."""
    monkeypatch.setattr(context, "_PAUSE_S", 0.01)
    engine = create_async_engine(
        make_url(shared_database_url).set(drivername="postgresql+asyncpg"), pool_size=1, max_overflow=0
    )
    async with Bench.open(shared_database_url, redis_url, database=engine) as bench:
        pids: list[int] = []

        async def charge() -> str:
            async with engine.begin() as connection:
                await connection.execute(text("SET default_transaction_read_only = on"))
                pids.append((await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one())
            return "paid"

        got: list[str] = []

        @bench.app.task
        async def task(ctx: Context) -> None:
            got.append(await ctx.step("charge", charge))

        worker = await bench.worker()
        await bench.commit_and_relay(task)
        await started(worker)
        await until(lambda: "cannot keep the result of a step yet, trying again" in caplog.messages, "it waits")
        await bench.db.execute("SELECT pg_terminate_backend($1, 5000)", pids[0])
        await until(lambda: not worker.turns.runs, "the run ended")
        await settled(worker)

        assert (got, len(pids)) == (["paid"], 1)
        await bench.assert_drained()
    await engine.dispose()


async def test_a_connection_that_was_cut_before_the_call_hands_the_job_back(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobq.run._PAUSE_S", 0.01)
    caplog.set_level(logging.INFO)
    gateway = Gateway()
    charge, _ = step_task(bench, gateway, until_call=1)
    worker = await bench.worker()
    job_id = await bench.commit_and_relay(charge)
    await bench.db.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name NOT LIKE 'jobq:%' AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    await turn(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert (row["attempts"], row["generation"], gateway.calls) == (0, 1, 0)
    assert outcomes(caplog) == ["job handed back"]
    await turn(worker)
    assert gateway.calls == 1
    await bench.assert_drained()


@pytest.mark.parametrize("lose", ["lose_request", "lose_reply"])
async def test_a_result_whose_write_gets_lost_is_written_again(
    shared_database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, lose: str
) -> None:
    monkeypatch.setattr(context, "_PAUSE_S", 0.01)
    async with (
        postgres_proxy(shared_database_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, database=through) as bench,
    ):
        gateway = Gateway()
        charge, got = step_task(bench, gateway, until_call=1)
        worker = await bench.worker()
        await bench.commit_and_relay(charge)
        getattr(proxy, lose)(b"paid-7-1")

        await turn(worker)

        assert proxy.losses == 1
        assert got == ["paid-7-1"]
        assert await kept(bench) == {"charge": '"paid-7-1"'}
        await bench.assert_drained()


async def hold_back_results(bench: Bench, job_id: UUID) -> asyncpg.Connection:
    """Make the write of this job's step wait, until the connection is closed."""
    holder = await bench.app.database.connect(schema="jobq", name="holder")
    await holder.execute("BEGIN")
    await holder.execute("INSERT INTO jobq.step VALUES ($1, 'charge', '\"never committed\"')", job_id)
    return holder


async def test_a_cancellation_while_the_result_is_written_waits_for_it(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gateway = Gateway()
    charge, got = step_task(bench, gateway, until_call=1)
    worker = await bench.worker()
    job_id = await bench.commit_and_relay(charge)
    holder = await hold_back_results(bench, job_id)
    await started(worker)
    await until(lambda: is_waiting_for_a_lock(bench), "the result is being written")

    for _ in range(10):
        worker.shutdown.cancel_runs()
        assert await is_waiting_for_a_lock(bench)
    await holder.close()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)
    after_cancel = (await kept(bench), list(got))
    await bench.relay()
    await turn(worker)

    assert after_cancel == ({"charge": '"paid-7-1"'}, [])
    assert got == ["paid-7-1"]
    assert gateway.calls == 1
    assert outcomes(caplog) == ["job interrupted", "job done"]
    await bench.assert_drained()


async def test_a_worker_that_stops_waits_for_a_result_no_longer_than_it_can(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "_PATIENCE_S", 0.05)
    caplog.set_level(logging.INFO)
    gateway = Gateway()
    charge, got = step_task(bench, gateway, until_call=1)
    worker = await bench.worker()
    job_id = await bench.commit_and_relay(charge)
    holder = await hold_back_results(bench, job_id)
    await started(worker)
    await until(lambda: is_waiting_for_a_lock(bench), "the result is being written")

    worker.orders.stopping.set()
    worker.shutdown.cancel_runs()
    await until(lambda: not worker.turns.runs, "the run gave up")
    await holder.close()
    await settled(worker)

    assert got == []
    assert outcomes(caplog) == ["job interrupted"]
    assert (await bench.row(job_id))["generation"] == 2  # type: ignore[index]


async def test_a_cancelled_run_waits_for_its_thread_and_keeps_the_result(bench: Bench) -> None:
    begun, go_on = asyncio.Event(), threading.Event()
    loop, calls = asyncio.get_running_loop(), []

    def charge() -> str:
        calls.append(1)
        loop.call_soon_threadsafe(begun.set)
        assert go_on.wait(20)
        return "paid"

    @bench.app.task
    async def task(ctx: Context) -> None:
        assert await ctx.step("charge", charge) == "paid"

    worker = await bench.worker()
    await bench.commit_and_relay(task)
    await started(worker)
    await begun.wait()
    worker.shutdown.cancel_runs()
    await asyncio.sleep(0)
    still_runs = len(worker.turns.runs)
    go_on.set()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)
    after_cancel = await kept(bench)
    await bench.relay()
    await turn(worker)

    assert still_runs == 1
    assert after_cancel == {"charge": '"paid"'}
    assert calls == [1]
    await bench.assert_drained()


async def test_a_step_that_takes_too_long_has_failed_and_is_not_kept(bench: Bench) -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    @bench.app.task(timeout=0.05)
    async def task(ctx: Context) -> None:
        await ctx.step("hang", hang)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(task)
    await turn(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert (row["attempts"], row["error_type"]) == (1, "TimeoutError")
    assert await kept(bench) == {}
