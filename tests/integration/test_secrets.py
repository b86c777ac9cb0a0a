"""No argument and no password in a log line or in `last_error`, whatever becomes of a job.

conftest looks at every line of every test; here jobs with a planted argument end in every way there is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pydantic
import pytest
from sqlalchemy import text
from sqlalchemy.exc import StatementError
from sqlalchemy.ext.asyncio import create_async_engine

import jobq
from jobq import Context, InvalidArguments, JobQ, Reject, Retry, Snooze
from jobq.relay.leadership import Relay
from tests.builders import Bench, settled, started, turn
from tests.secrets import ARGUMENT, PLANTED, Watch, found_in, watched
from tests.waiting import until


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


@pytest.fixture(autouse=True)
def _everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "jobq")


class Secret(pydantic.BaseModel):
    number: int


def failing_statements(app: JobQ) -> list[Any]:
    """Tasks whose argument is a parameter of a statement that fails."""

    @app.task
    async def statement_fails(ctx: Context, value: str) -> None:
        async with ctx.complete() as session:
            await session.execute(text("INSERT INTO nowhere VALUES (:value)"), {"value": value})

    @app.task
    async def statement_fails_in_a_group(ctx: Context, value: str) -> None:
        try:
            async with app.database.sessions.begin() as session:
                await session.execute(text("SELECT 1 / 0, CAST(:value AS text)"), {"value": value})
        except StatementError as error:
            raise ExceptionGroup("several", [RuntimeError("other"), error]) from error

    return [statement_fails, statement_fails_in_a_group]


def other_ends(app: JobQ) -> list[Any]:
    """Tasks that end in every other way."""

    @app.task
    async def done(value: str) -> None: ...

    @app.task
    async def completes(ctx: Context, value: str) -> None:
        async with ctx.complete():
            await ctx.step("never", lambda: value)  # refused: it finishes the job

    @app.task
    async def rejects(value: str) -> None:
        raise Reject("no")

    @app.task
    async def retries(value: str) -> None:
        raise Retry(delay=60)

    @app.task
    async def snoozes(value: str) -> None:
        raise Snooze(60)

    @app.task
    def waits_in_a_thread(value: str) -> None: ...

    @app.task(timeout=0.001)
    async def is_late(ctx: Context, value: str) -> None:
        await ctx.step("slow", _sleep)

    @app.task
    async def keeps_what_does_not_fit(ctx: Context, value: str) -> None:
        async def wrong() -> int:
            return value  # type: ignore[return-value]

        await ctx.step("wrong", wrong)

    return [done, completes, rejects, retries, snoozes, waits_in_a_thread, is_late, keeps_what_does_not_fit]


async def _sleep() -> None:
    await asyncio.sleep(60)


async def _last_errors(bench: Bench) -> str:
    rows = await bench.db.fetch("SELECT last_error FROM jobq.outbox UNION ALL SELECT last_error FROM jobq.dead")
    return "\n".join(row["last_error"] or "" for row in rows)


async def test_no_end_of_a_job_tells_its_arguments(bench: Bench) -> None:
    tasks = failing_statements(bench.app) + other_ends(bench.app)
    worker = await bench.worker()

    @bench.app.on_dead
    async def fails(session: Any, dead: Any) -> None:
        await session.execute(text("INSERT INTO nowhere VALUES (:value)"), {"value": dead.args})

    with watched() as watch:
        for task in tasks:
            await bench.commit_and_relay(task, ARGUMENT)
            await turn(worker)
    told = await _last_errors(bench)

    assert watch.leaks == []
    assert found_in(told) == []
    assert "nowhere" in told, "the statement is told, and not its parameters"


async def test_what_no_worker_takes_or_knows_tells_no_arguments(bench: Bench) -> None:
    @bench.app.task(name="typed")
    async def typed(secret: Secret) -> None: ...

    rows = [
        ("typed", f'{{"secret": {{"number": "{ARGUMENT}"}}}}'),
        ("typed", f'{{"secret": "{ARGUMENT}"}}'),
        ("typed", f'{{"secret": {{"number": 1}}, "more": "{ARGUMENT}"}}'),
        ("nobody_knows", f'{{"value": "{ARGUMENT}"}}'),
    ]
    for task, args in rows:
        await bench.db.execute(
            "INSERT INTO jobq.outbox (id, queue, task, args) VALUES (gen_random_uuid(), 'default', $1, $2)", task, args
        )
    worker = await bench.worker()
    await bench.relay()
    await started(worker)
    await settled(worker)

    async def is_dead() -> bool:
        return await bench.db.fetchval("SELECT count(*) FROM jobq.dead WHERE reason = 'invalid'") == 3

    await until(is_dead, "what does not fit is dead")
    assert found_in(await _last_errors(bench)) == []


async def test_errors_at_enqueue_name_the_field_and_not_its_value(bench: Bench) -> None:
    @bench.app.task(name="typed")
    async def typed(secret: Secret, when: int = 0) -> None: ...

    for wrong in ({"secret": ARGUMENT}, {"secret": {"number": ARGUMENT}}, {"secret": {"number": 1}, "when": ARGUMENT}):
        with pytest.raises(InvalidArguments) as refused:
            typed.job(**wrong)  # type: ignore[arg-type]
        assert found_in(str(refused.value)) == []
        assert refused.value.__cause__ is None


async def test_an_outage_or_a_refusal_of_either_store_tells_no_password(
    shared_database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_async_engine(shared_database_url.replace("postgresql://", "postgresql+asyncpg://"))
    app = JobQ(database=engine, redis=f"redis://user:{PLANTED[0]}@localhost:1/0")
    relay = Relay(app.database, app.redis_url, "no_such_schema")
    for attempt in (relay.check, lambda: asyncpg.connect(shared_database_url, database="no_such_database")):
        with pytest.raises(Exception) as failed:  # noqa: PT011
            await attempt()
        assert found_in(str(failed.value)) == []
    assert found_in(repr(app)) == []
    await engine.dispose()


def test_a_line_with_a_secret_would_be_found() -> None:
    watch = Watch()
    for place in (jobq.__file__, __file__):
        record = logging.LogRecord("jobq.x", logging.INFO, place, 1, "phrase", (), None)
        record.fields = {"url": ARGUMENT}
        watch.emit(record)

    assert len(watch.leaks) == 1
