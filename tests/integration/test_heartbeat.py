"""The heartbeat: it vouches for all that a process owns, and believes nothing that two beats do not agree on."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
import redis

from jobq import Context
from jobq.broker.scripts import script
from jobq.worker import heartbeat
from jobq.worker.worker import Worker
from tests.builders import Bench, Gate, settled, started, turn, write_effect
from tests.faults.proxy import redis_proxy
from tests.waiting import until


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


class Counted:
    """A task that counts its runs, and waits at a gate."""

    def __init__(self, bench: Bench, *, completes: bool = False, is_open: bool = True):
        self.runs = 0
        self.gate = Gate()
        if is_open:
            self.gate.open.set()

        @bench.app.task(name="counted")
        async def counted(ctx: Context) -> None:
            self.runs += 1
            await self.gate.wait()
            if completes:
                async with ctx.complete() as session:
                    await write_effect(session, ctx)

        self.task = counted


async def beat(worker: Worker, times: int = 1) -> None:
    """Beat, and let the loop follow up what the beats found."""
    for _ in range(times):
        await asyncio.to_thread(worker.heartbeat.step)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


# --- it lists everything ---------------------------------------------------------------------------------------------


async def fetched(bench: Bench, worker: Worker, counted: Counted) -> None:
    await worker.turns._fetch(worker.turns._room())


async def running(bench: Bench, worker: Worker, counted: Counted) -> None:
    counted.gate.open.clear()
    await started(worker)
    await counted.gate.arrived.wait()


async def in_the_settlers_buffer(bench: Bench, worker: Worker, counted: Counted) -> None:
    await started(worker)
    await until(lambda: not worker.turns.runs, "the run ended")


async def committed_and_not_acked(bench: Bench, worker: Worker, counted: Counted) -> None:
    await started(worker)
    await until(lambda: not worker.turns.runs, "the run ended")
    await worker.settler._flush_rows()
    assert await bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0


@pytest.mark.parametrize("completes", [False, True], ids=["plain", "complete()"])
@pytest.mark.parametrize("stage", [fetched, running, in_the_settlers_buffer, committed_and_not_acked])
async def test_whatever_a_process_owns_is_listed_until_redis_has_confirmed_its_end(
    bench: Bench, stage: Any, completes: bool
) -> None:
    counted = Counted(bench, completes=completes)
    worker = await bench.worker()
    job_id = await bench.commit_and_relay(counted.task)
    await stage(bench, worker, counted)
    runs = counted.runs

    assert [raw[:32] for raw in worker.owned.listed("default")] == [job_id.hex.encode()]
    await beat(worker, 3)
    assert not worker.turns._adopted, "it is no stranger"
    assert counted.runs == runs

    await bench.redis.flushall()
    await beat(worker)

    assert [raw[:32] for raw in await bench.working(worker)] == [job_id.hex.encode()]
    assert await bench.broker.known("default", [job_id]) == [1]
    counted.gate.open.set()
    if stage is fetched:
        await worker.turns._release_unstarted()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)
    assert worker.owned.listed("default") == []


async def test_a_run_whose_task_is_gone_is_not_vouched_for_and_runs_again(bench: Bench) -> None:
    counted = Counted(bench)
    worker = await bench.worker()
    await bench.commit_and_relay(counted.task)
    (zombie,) = await worker.turns._fetch(worker.turns._room())
    zombie.task = asyncio.create_task(asyncio.sleep(0))
    await zombie.task

    await beat(worker, 2)
    await until(lambda: worker.turns._adopted, "what nobody vouched for was adopted")
    await turn(worker)

    assert counted.runs == 1
    await bench.assert_drained()


async def test_every_queue_has_a_lease_of_its_own(bench: Bench) -> None:
    counted = Counted(bench, is_open=False)
    worker = await bench.worker(queues=("a", "b"))
    await bench.commit_and_relay(counted.task, queue="a")
    await started(worker)
    await counted.gate.arrived.wait()
    await bench.redis.flushall()

    await beat(worker)

    assert len(await bench.working(worker, "a")) == 1
    assert await bench.working(worker, "b") == []
    assert worker.name in await bench.broker.beats("a")
    assert worker.name in await bench.broker.beats("b")
    counted.gate.open.set()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)


# --- two beats must agree --------------------------------------------------------------------------------------------


async def test_a_beat_that_races_an_ack_brings_no_finished_job_back(bench: Bench) -> None:
    """The beat has listed the entry, Redis has just acked it, and the worker has not heard of that yet."""
    counted = Counted(bench)
    worker = await bench.worker()
    job_id = await bench.commit_and_relay(counted.task)
    await in_the_settlers_buffer(bench, worker, counted)
    (entry,) = worker.owned.listed("default")
    await worker.settler._flush_rows()
    await bench.broker.ack("default", worker.name, [entry])

    await beat(worker)
    known = await bench.broker.known("default", [job_id])
    in_list = await bench.working(worker)
    await settled(worker)
    await beat(worker, 3)

    assert (known, in_list) == ([0], [])
    assert counted.runs == 1
    await bench.assert_drained()


async def test_what_redis_lost_for_two_beats_is_put_back(bench: Bench) -> None:
    counted = Counted(bench, is_open=False)
    worker = await bench.worker()
    job_id = await bench.commit_and_relay(counted.task)
    await started(worker)
    await counted.gate.arrived.wait()
    await bench.redis.delete(bench.broker.keys("default").known, bench.broker.keys("default").working(worker.name))

    await beat(worker)
    after_one = await bench.working(worker)
    await beat(worker)

    assert after_one == []
    assert len(await bench.working(worker)) == 1
    assert await bench.broker.known("default", [job_id]) == [1]
    counted.gate.open.set()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)
    await bench.assert_drained()


async def test_a_fetch_without_an_answer_is_adopted_after_two_beats_and_runs_once(
    shared_database_url: str, redis_url: str
) -> None:
    async with (
        redis_proxy(redis_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, redis=through) as bench,
    ):
        counted = Counted(bench)
        worker = await bench.worker()
        job_id = await bench.commit_and_relay(counted.task)
        await bench.redis.script_load(script("fetch").source)  # or it is sent twice, and the first reply is no answer
        proxy.lose_reply(script("fetch").sha.encode())

        with pytest.raises(Exception, match=r"(?i)connection|closed|reset"):
            await worker.turns.step()
        moved = await bench.working(worker)
        await beat(worker)
        after_one = (len(worker.turns._adopted), counted.runs)
        await beat(worker)
        await until(lambda: worker.turns._adopted, "it was adopted")
        await turn(worker)
        await beat(worker, 2)

        assert proxy.losses == 1
        assert [raw[:32] for raw in moved] == [job_id.hex.encode()]
        assert after_one == (0, 0)
        assert counted.runs == 1
        assert (await bench.stats())["adopted"] == 1
        await bench.assert_drained()


async def test_a_beat_without_an_answer_makes_the_next_two_agree_anew(shared_database_url: str, redis_url: str) -> None:
    async with (
        redis_proxy(redis_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, redis=through) as bench,
    ):
        counted = Counted(bench)
        worker = await bench.worker()
        await bench.commit_and_relay(counted.task)
        assert await bench.broker.fetch("default", worker.name, 1) is not None
        adopted: list[int] = []

        await beat(worker)
        proxy.lose_request(script("beat").sha.encode())
        with pytest.raises(redis.ConnectionError):
            await beat(worker)
        for _ in range(2):
            await beat(worker)
            adopted.append(len(worker.turns._adopted))

        assert adopted == [0, 1]


async def test_nothing_is_adopted_that_only_every_other_beat_saw(bench: Bench) -> None:
    counted = Counted(bench)
    worker = await bench.worker()
    await bench.commit_and_relay(counted.task)
    working = bench.broker.keys("default").working(worker.name)
    reply = await bench.broker.fetch("default", worker.name, 1)
    assert reply is not None

    await beat(worker)
    await bench.redis.rename(working, "aside")
    await beat(worker)
    await bench.redis.rename("aside", working)
    await beat(worker)

    assert not worker.turns._adopted
    assert worker.owned.listed("default") == []


# --- Redis lost everything -------------------------------------------------------------------------------------------


async def test_after_flushall_the_worker_tells_all_at_once_and_nothing_runs_twice(bench: Bench) -> None:
    counted = Counted(bench, is_open=False)
    leader = await bench.leader(beat=0.3)
    worker = await bench.worker()
    for _ in range(3):
        await bench.enqueue(counted.task)

    async def is_pushed() -> bool:
        await leader.step()
        return len(await bench.ready()) == 3

    await until(is_pushed, "the relay pushed them")
    await started(worker)
    await until(lambda: counted.runs == 3, "all three run")

    await bench.redis.flushall()

    async def has_seen_the_loss() -> bool:
        await leader.step()
        return (await bench.stats()).get("losses", 0) == 1

    await until(has_seen_the_loss, "the relay has seen the loss")
    for _ in range(5):
        await leader.step()
    assert await bench.ready() == [], "it gives the workers time to say what they run"
    await beat(worker)
    assert len(await bench.working(worker)) == 3

    async def is_rebuilt() -> bool:
        await leader.step()
        return leader._backlog.is_clean and not leader._walk.is_repairing

    await until(is_rebuilt, "the relay has rebuilt after its hold")
    await started(worker)

    assert counted.runs == 3
    assert await bench.ready() == []
    assert (await bench.stats())["reasserted"] == 3
    counted.gate.open.set()
    await until(lambda: not worker.turns.runs, "the runs ended")
    await settled(worker)
    await bench.assert_drained()


# --- lost ------------------------------------------------------------------------------------------------------------


async def take_away(bench: Bench, job_id: UUID) -> None:
    """Another worker swept the job: PostgreSQL and Redis have it at its next generation."""
    await bench.db.execute("UPDATE jobq.outbox SET generation = 2, crashes = 1 WHERE id = $1", job_id)
    await bench.relay()


async def test_a_plain_run_whose_job_has_moved_on_is_cancelled(bench: Bench) -> None:
    counted = Counted(bench, is_open=False)
    worker = await bench.worker()
    job_id = await bench.commit_and_relay(counted.task)
    await started(worker)
    await counted.gate.arrived.wait()
    await take_away(bench, job_id)

    await beat(worker)
    await until(lambda: not worker.turns.runs, "the run was cancelled")
    await settled(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert (row["generation"], row["attempts"], row["crashes"]) == (2, 0, 1)
    assert await bench.broker.known("default", [job_id]) == [2], "a late ack does not erase the new generation"


async def test_a_run_inside_complete_is_left_to_its_delete(bench: Bench) -> None:
    gate = Gate()

    @bench.app.task
    async def book(ctx: Context) -> None:
        async with ctx.complete() as session:
            await write_effect(session, ctx)
            await gate.wait()

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(book)
    await started(worker)
    await gate.arrived.wait()
    known = bench.broker.keys("default").known
    await bench.redis.hset(known, job_id.hex, 2)

    await beat(worker, 2)
    assert len(worker.turns.runs) == 1
    gate.open.set()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)

    assert await bench.effects(job_id) == 1
    assert await bench.row(job_id) is None


# --- the loop --------------------------------------------------------------------------------------------------------


async def test_a_frozen_loop_silences_the_beat_until_it_turns_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await bench.worker(beat=0.02, frozen_after=0.2)  # nothing ticks: this worker does not run

    await until(lambda: "heartbeat stops: the event loop is frozen" in caplog.messages, "the beat fell silent")
    silent_since, counter = time.monotonic(), (await bench.broker.beats("default"))[worker.name]
    await until(lambda: time.monotonic() - silent_since > 0.3, "several beats would have come")
    assert (await bench.broker.beats("default"))[worker.name] == counter

    worker.heartbeat.loop_ticked()

    async def has_beaten() -> bool:
        return (await bench.broker.beats("default"))[worker.name] != counter

    await until(has_beaten, "the beat goes on, or this worker would do nothing for ever")


async def test_a_blocked_loop_is_told_with_the_stack_of_what_blocks_it(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_BLOCKED_S", 0.1)
    monkeypatch.setattr(heartbeat, "_TICK_S", 0.02)
    worker = await bench.worker()

    def block_the_loop() -> None:
        worker.heartbeat.loop_ticked()
        ends_at = time.monotonic() + 20
        while "event loop blocked" not in caplog.messages and time.monotonic() < ends_at:
            time.sleep(0.01)

    block_the_loop()

    (fields,) = [record.fields for record in caplog.records if record.message == "event loop blocked"]  # type: ignore[attr-defined]
    assert "block_the_loop" in fields["stack"]
    assert fields["still_s"] >= 0.1


async def test_the_beat_goes_on_while_the_loop_is_blocked(bench: Bench) -> None:
    worker = await bench.worker(beat=0.02)
    before = worker.heartbeat.acked_at

    def block_the_loop() -> None:
        ends_at = time.monotonic() + 20
        while worker.heartbeat.acked_at == before and time.monotonic() < ends_at:
            time.sleep(0.01)

    block_the_loop()

    assert worker.heartbeat.acked_at > before


# --- its life --------------------------------------------------------------------------------------------------------


async def test_stop_joins_the_thread_and_closes_its_connection(bench: Bench) -> None:
    worker = await bench.worker()
    before = len(await bench.redis.client_list())

    worker.heartbeat.stop()

    assert not any(thread.name == "jobq heartbeat" for thread in threading.enumerate())
    assert len(await bench.redis.client_list()) == before - 1


async def test_no_counter_comes_twice(bench: Bench) -> None:
    worker = await bench.worker()
    seen = set()

    for _ in range(5):
        await beat(worker)
        seen.add((await bench.broker.beats("default"))[worker.name])

    assert len(seen) == 5
    assert min(map(int, seen)) > 1_000, "it began at random"


async def test_workers_are_named_anew_at_every_start(bench: Bench) -> None:
    names = {Worker(bench.app).name for _ in range(100)}

    assert len(names) == 100


async def test_it_tells_people_who_the_worker_is(bench: Bench) -> None:
    Counted(bench)
    worker = await bench.worker(concurrency=7)

    info = json.loads(await bench.redis.hget(bench.broker.keys("default").workers, worker.name))

    assert info["pid"] == os.getpid()
    assert info["tasks"] == ["counted"]
    assert info["slots"] == 7


async def test_it_survives_an_outage_of_redis(
    shared_database_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        redis_proxy(redis_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, redis=through) as bench,
    ):
        worker = await bench.worker(beat=0.05)
        proxy.is_refusing = True
        proxy.cut()
        await until(lambda: "store away" in caplog.messages, "the outage was told")
        last = worker.heartbeat.acked_at
        proxy.is_refusing = False

        await until(lambda: worker.heartbeat.acked_at > last, "it beats again")
        await until(lambda: "store back" in caplog.messages, "its end was told")

        assert caplog.messages.count("store away") == 1
