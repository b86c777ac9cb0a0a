"""Burials: the dead letter and what the hooks write are one transaction, and no hook keeps a job alive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text

from jobq import DeadJob, Reject
from jobq.worker import burial
from tests.builders import Bench, settled, started, turn
from tests.faults.proxy import postgres_proxy
from tests.waiting import until


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


def rejected(bench: Bench) -> Any:
    @bench.app.task
    async def send(address: str) -> None:
        raise Reject("no such address")

    return send


async def test_a_hook_writes_in_the_transaction_of_the_burial(bench: Bench) -> None:
    seen: list[DeadJob] = []

    @bench.app.task
    async def alert(task: str) -> None: ...

    @bench.app.on_dead
    async def tell(session: Any, job: DeadJob) -> None:
        seen.append(job)
        await alert.enqueue(session, job.task)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(rejected(bench), "a@b")

    await turn(worker)

    (job,) = seen
    assert (job.id, job.task, job.reason, job.attempts) == (job_id, "send", "rejected", 1)
    assert job.args == '{"address":"a@b"}'
    assert await bench.dead(job_id) is not None
    assert await bench.db.fetchval("SELECT array_agg(task) FROM jobq.outbox") == ["alert"]


async def test_every_hook_of_every_dead_job_is_called(bench: Bench) -> None:
    seen: list[str] = []

    @bench.app.on_dead
    async def first(session: Any, job: DeadJob) -> None:
        seen.append("first")

    @bench.app.on_dead
    async def second(session: Any, job: DeadJob) -> None:
        seen.append("second")

    worker = await bench.worker()
    send = rejected(bench)
    await bench.enqueue(send, "a")
    await bench.commit_and_relay(send, "b")

    await turn(worker)

    assert seen == ["first", "second"] * 2


class Odd(BaseException):
    pass


async def raises(session: Any) -> None:
    raise LookupError("a hook that breaks")


async def raises_odd(session: Any) -> None:
    raise Odd


async def cancels(session: Any) -> None:
    raise asyncio.CancelledError


async def raises_os_error(session: Any) -> None:
    raise ConnectionRefusedError("the chat is away, the database is not")


async def breaks_a_statement(session: Any) -> None:
    await session.execute(text("SELECT 1 / 0"))


async def swallows_a_failed_statement(session: Any) -> None:
    try:
        await session.execute(text("SELECT 1 / 0"))
    except Exception:
        return


async def rolls_back(session: Any) -> None:
    await session.rollback()


async def violates_a_constraint_at_commit(session: Any) -> None:
    await session.execute(text("INSERT INTO child VALUES (1)"))


async def hangs(session: Any) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    "spoil",
    [
        raises,
        raises_odd,
        cancels,
        raises_os_error,
        breaks_a_statement,
        swallows_a_failed_statement,
        rolls_back,
        violates_a_constraint_at_commit,
        hangs,
    ],
)
async def test_a_hook_that_fails_does_not_keep_its_job_alive_nor_leave_effects(
    bench: Bench, spoil: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burial, "HOOKS_TIMEOUT_S", 0.2)
    await bench.db.execute("CREATE TABLE parent (id int PRIMARY KEY)")
    await bench.db.execute("CREATE TABLE child (parent_id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")

    @bench.app.on_dead
    async def hook(session: Any, job: DeadJob) -> None:
        await session.execute(text("INSERT INTO effect (note) VALUES ('by the hook')"))
        await spoil(session)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(rejected(bench), "a")

    await turn(worker)

    assert await bench.dead(job_id) is not None
    assert await bench.effects() == 0
    assert caplog.messages.count("on_dead failed, burying without it") == 1
    await bench.assert_drained()


async def test_a_commit_whose_answer_is_lost_calls_no_hook_a_second_time(
    shared_database_url: str, redis_url: str
) -> None:
    async with (
        postgres_proxy(shared_database_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, database=through) as bench,
    ):

        @bench.app.on_dead
        async def hook(session: Any, job: DeadJob) -> None:
            await session.execute(text("INSERT INTO effect (note) VALUES ('by the hook')"))
            proxy.lose_reply(b"COMMIT")

        worker = await bench.worker()
        job_id = await bench.commit_and_relay(rejected(bench), "a")

        await turn(worker)

        assert proxy.losses == 1
        assert await bench.dead(job_id) is not None
        assert await bench.effects() == 1
        await bench.assert_drained()


async def test_a_database_that_goes_away_does_not_cost_the_hook_its_part(
    shared_database_url: str, redis_url: str
) -> None:
    async with (
        postgres_proxy(shared_database_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, database=through) as bench,
    ):
        calls: list[int] = []

        @bench.app.on_dead
        async def hook(session: Any, job: DeadJob) -> None:
            calls.append(1)
            if len(calls) == 1:
                proxy.lose_request(b"INSERT INTO effect")
            await session.execute(text("INSERT INTO effect (note) VALUES ('by the hook')"))

        worker = await bench.worker()
        job_id = await bench.commit_and_relay(rejected(bench), "a")

        await turn(worker)

        assert len(calls) == 2
        assert await bench.dead(job_id) is not None
        assert await bench.effects() == 1
        await bench.assert_drained()


async def test_a_cancelled_flush_stops_at_a_hook_and_loses_nothing(bench: Bench) -> None:
    entered = asyncio.Event()
    is_waiting = True

    @bench.app.on_dead
    async def hook(session: Any, job: DeadJob) -> None:
        entered.set()
        if is_waiting:
            await asyncio.Event().wait()
        await session.execute(text("INSERT INTO effect (note) VALUES ('by the hook')"))

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(rejected(bench), "a")
    await started(worker)
    await until(lambda: not worker.turns.runs, "the run ended")
    flushing = asyncio.create_task(worker.settler.step())
    await entered.wait()

    flushing.cancel()
    await asyncio.gather(flushing, return_exceptions=True)
    is_waiting = False
    assert await bench.row(job_id) is not None
    await settled(worker)

    assert await bench.effects() == 1
    assert await bench.dead(job_id) is not None
    await bench.assert_drained()
