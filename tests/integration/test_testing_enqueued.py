"""enqueued: the jobs that the caller's transaction sees, compared with the calls that would have made them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from jobq import InvalidArguments, JobQ
from jobq.testing import EnqueuedJob, enqueued, run_pending
from tests.enqueuing import OPENERS, Opener, session, session_of_maker

jobs = JobQ()
ORDER = UUID(int=7)


@jobs.task(queue="mail", aliases=["old_receipt"])
async def send_receipt(order_id: int, *, locale: str = "en") -> None: ...


@jobs.task
async def reserve(order: UUID, days: timedelta = timedelta(days=1)) -> None: ...


@pytest.mark.parametrize("opener", OPENERS, ids=lambda opener: opener.__name__)
async def test_every_kind_of_transaction_sees_its_own_jobs_in_the_order_of_their_enqueue(
    shared_database_url: str, opener: Opener
) -> None:
    async with opener(shared_database_url) as tx:
        await send_receipt.enqueue(tx, 7, locale="sv")
        await jobs.enqueue_many(tx, [reserve.job(ORDER), send_receipt.job(8)])

        assert await enqueued(tx, send_receipt) == [send_receipt.job(7, locale="sv"), send_receipt.job(8)]
        assert await enqueued(tx) == [send_receipt.job(7, locale="sv"), reserve.job(ORDER), send_receipt.job(8)]


async def test_jobs_of_others_are_seen_once_committed_and_until_they_are_done(shared_database_url: str) -> None:
    async with session(shared_database_url) as mine:
        async with session(shared_database_url) as theirs:
            await send_receipt.enqueue(theirs, 7)
            assert await enqueued(mine, send_receipt) == []
        assert await enqueued(mine, send_receipt) == [send_receipt.job(7)]

    await run_pending(jobs, database=shared_database_url)

    async with session(shared_database_url) as mine:
        assert await enqueued(mine) == []


async def test_arguments_are_read_as_the_task_gets_them_and_as_json_where_no_task_is_named(
    shared_database_url: str,
) -> None:
    async with session(shared_database_url) as tx:
        await reserve.enqueue(tx, ORDER, timedelta(days=2))

        assert [job.args for job in await enqueued(tx, reserve)] == [{"order": ORDER, "days": timedelta(days=2)}]
        assert [job.args for job in await enqueued(tx)] == [{"order": str(ORDER), "days": "P2D"}]


async def test_options_can_be_read(shared_database_url: str) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    urgent = send_receipt.opts(
        run_at=at, priority=1, queue="fast", max_attempts=3, timeout=9, headers={"a": "b"}, idempotency_key="k"
    )
    async with session(shared_database_url) as tx:
        answer = await urgent.enqueue(tx, 7)
        (job,) = await enqueued(tx, send_receipt)

        assert isinstance(job, EnqueuedJob)
        assert (job.id, job.task, job.run_at, job.attempts) == (answer.id, "send_receipt", at, 0)
        assert (job.priority, job.queue, job.max_attempts, job.timeout_s) == (1, "fast", 3, 9)
        assert job.headers == {"a": "b"}
        assert job.delay_s == pytest.approx(3600, abs=60)
        assert job == urgent.job(7)


def different(task: Any) -> list[Any]:
    return [
        task.job(8),
        task.job(7, locale="en"),
        task.opts(priority=1).job(7),
        task.opts(queue="fast").job(7),
        task.opts(max_attempts=3).job(7),
        task.opts(timeout=3).job(7),
        task.opts(headers={"a": "b"}).job(7),
        task.opts(delay=60).job(7),
        task.opts(run_at=datetime.now(UTC) + timedelta(hours=1)).job(7),
        reserve.job(ORDER),
        7,
    ]


async def test_a_job_equals_the_call_that_made_it_with_its_options_and_no_other(shared_database_url: str) -> None:
    async with session(shared_database_url) as tx:
        await send_receipt.enqueue(tx, 7)
        await send_receipt.opts(run_at=datetime.now(UTC) - timedelta(hours=1)).enqueue(tx, 7)
        now, past = await enqueued(tx, send_receipt)

        assert now == send_receipt.job(7)
        assert send_receipt.job(7) == now
        assert past == send_receipt.opts(run_at=datetime.now(UTC)).job(7), "what is due has no run_at"
        assert [other for other in different(send_receipt) if now == other] == []
        assert now != past
        assert now in {*(await enqueued(tx))}


async def test_a_delay_is_compared_within_seconds_also_late_in_a_transaction(shared_database_url: str) -> None:
    async with session(shared_database_url) as tx:
        await tx.execute(text("SELECT pg_sleep(0.02)"))
        await send_receipt.opts(delay=60).enqueue(tx, 7)
        (job,) = await enqueued(tx, send_receipt)

        assert job == send_receipt.opts(delay=60).job(7)
        assert job == send_receipt.opts(delay=timedelta(minutes=1)).job(7)
        assert job not in [send_receipt.job(7), send_receipt.opts(delay=50).job(7), send_receipt.opts(delay=70).job(7)]


async def test_a_failed_assertion_shows_calls(shared_database_url: str) -> None:
    async with session_of_maker(shared_database_url) as tx:
        await send_receipt.opts(delay=60, priority=1).enqueue(tx, 7, locale="sv")
        await reserve.enqueue(tx, ORDER)

        shown = repr(await enqueued(tx))
        # The delay counts from the beginning of the transaction.
        assert re.sub(r"delay=6\d\.\d", "delay=60.0", shown) == (
            "[send_receipt.opts(queue='mail', priority=1, delay=60.0).job(order_id=7, locale='sv'), "
            f"reserve.job(order='{ORDER}')]"
        )
    assert repr(reserve.job(ORDER)) == f"reserve.job(order='{ORDER}')"
    assert repr(send_receipt.opts(idempotency_key="k", delay=60).job(7)) == (
        "send_receipt.opts(queue='mail', delay=60.0, idempotency_key='k').job(order_id=7)"
    )


async def test_jobs_under_an_old_name_of_the_task_are_its_jobs(shared_database_url: str) -> None:
    async with session(shared_database_url) as tx:
        await send_receipt.enqueue(tx, 7)
        await tx.execute(text("UPDATE jobq.outbox SET task = 'old_receipt'"))

        assert await enqueued(tx, send_receipt) == [send_receipt.job(7)]


async def test_rows_of_other_languages_are_read_too(shared_database_url: str) -> None:
    async with session(shared_database_url) as tx:
        await tx.execute(
            text(
                "INSERT INTO jobq.outbox (id, queue, task, args, run_at) VALUES "
                "(gen_random_uuid(), 'mail', 'send_receipt', '{\"order_id\": 7}', now() + interval '60 s')"
            )
        )

        assert await enqueued(tx, send_receipt) == [send_receipt.opts(delay=60).job(7)]


async def test_a_row_that_the_task_would_refuse_is_told(shared_database_url: str) -> None:
    async with session(shared_database_url) as tx:
        await send_receipt.enqueue(tx, 7)
        await tx.execute(text("""UPDATE jobq.outbox SET args = '{"order": 7}'"""))

        with pytest.raises(InvalidArguments, match="order_id"):
            await enqueued(tx, send_receipt)
