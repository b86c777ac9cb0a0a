"""A worker of several queues: by weight nobody starves, in strict order the first comes first, and no bell is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from jobq import Task
from jobq.broker.scripts import ADOPT_TOKEN
from jobq.settings import WorkerSettings
from jobq.worker.worker import Worker
from tests.builders import Bench, Gate, entry_of, running, settled, started, turn
from tests.waiting import until

WEIGHTS = {"a": 5, "b": 3, "c": 1}


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


def notes_of_queues(bench: Bench) -> tuple[Task, list[str]]:
    """A task that notes the queue that it was told, and the notes."""
    starts: list[str] = []

    @bench.app.task
    async def note(queue: str) -> None:
        starts.append(queue)

    return note, starts


async def fill(bench: Bench, task: Task, **counts: int) -> None:
    """Commit so many jobs into each queue, and push them."""
    async with bench.app.database.sessions.begin() as session:
        for queue, count in counts.items():
            await bench.app.enqueue_many(session, [task.opts(queue=queue).job(queue) for _ in range(count)])
    await bench.relay()


def furthest_from_its_share(starts: list[str], window: int) -> float:
    """How many starts any queue is off its share, in any window of that many starts."""
    shares = {queue: window * weight / sum(WEIGHTS.values()) for queue, weight in WEIGHTS.items()}
    windows = [starts[first : first + window] for first in range(len(starts) - window + 1)]
    return max(abs(part.count(queue) - share) for part in windows for queue, share in shares.items())


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 4, 60])
async def test_no_queue_starves_and_starts_are_in_proportion_in_every_window(bench: Bench, slots: int) -> None:
    note, starts = notes_of_queues(bench)
    await fill(bench, note, a=600, b=600, c=600)
    settings = WorkerSettings(queues=("a", "b", "c"), weights=WEIGHTS, concurrency=slots, beat=0.5, lease=30)

    async with running(Worker(bench.app, settings)):
        await until(lambda: len(starts) >= 600, "a good part of them ran", 30)
        seen = list(starts[:600])

    assert all(WEIGHTS[queue] * 600 / 9 < 600 for queue in WEIGHTS), "none of them ran dry meanwhile"
    for window in (9, 90, 300):
        assert furthest_from_its_share(seen, window) <= 2 + slots / 2
    places = [place for place, queue in enumerate(seen) if queue == "c"]
    assert max(later - earlier for earlier, later in pairwise(places)) <= 9 + slots


async def test_the_slots_of_one_turn_are_shared(bench: Bench) -> None:
    note, starts = notes_of_queues(bench)
    worker = await bench.worker(queues=("a", "b", "c"), weights=WEIGHTS, concurrency=18)
    await fill(bench, note, a=30, b=30, c=30)

    await turn(worker)

    assert {queue: starts.count(queue) for queue in WEIGHTS} == {"a": 10, "b": 6, "c": 2}


async def test_no_slot_waits_for_a_queue_that_is_empty(bench: Bench) -> None:
    note, starts = notes_of_queues(bench)
    worker = await bench.worker(queues=("a", "b", "c"), weights=WEIGHTS, concurrency=18)
    await fill(bench, note, b=2, c=30)

    await turn(worker)

    assert {queue: starts.count(queue) for queue in WEIGHTS} == {"a": 0, "b": 2, "c": 16}


async def test_a_worker_of_one_queue_asks_once_a_turn(bench: Bench) -> None:
    note, _ = notes_of_queues(bench)
    worker = await bench.worker(concurrency=5)
    await fill(bench, note, default=7)

    async def scripts() -> int:
        stats = await bench.redis.info("commandstats")
        return sum(stats[name]["calls"] for name in ("cmdstat_evalsha", "cmdstat_eval") if name in stats)

    asked = []
    for _ in range(3):
        before = await scripts()
        await started(worker)
        asked.append(await scripts() - before)
        await until(lambda: not worker.turns.runs, "the runs ended")
        await settled(worker)

    assert asked == [1, 1, 1]
    await bench.assert_drained()


# --- strict ----------------------------------------------------------------------------------------------------------


async def test_strict_serves_a_queue_only_while_those_before_it_are_empty(bench: Bench) -> None:
    note, starts = notes_of_queues(bench)
    worker = await bench.worker(queues=("urgent", "default", "bulk"), strict=True, concurrency=2)
    await fill(bench, note, bulk=4, default=3, urgent=3)

    for _ in range(3):
        await turn(worker)
    await fill(bench, note, urgent=1)
    for _ in range(3):
        await turn(worker)

    assert starts == [*["urgent"] * 3, *["default"] * 3, "urgent", *["bulk"] * 4]


async def test_priorities_order_the_jobs_within_a_queue_and_not_between_queues(bench: Bench) -> None:
    note, starts = notes_of_queues(bench)
    worker = await bench.worker(queues=("first", "second"), strict=True, concurrency=1)
    await bench.enqueue(note, "second 1", queue="second", priority=1)
    await bench.enqueue(note, "first 4", queue="first", priority=4)
    await bench.enqueue(note, "first 1", queue="first", priority=1)
    await bench.relay()

    for _ in range(3):
        await turn(worker)

    assert starts == ["first 1", "first 4", "second 1"]


# --- dedicated workers -----------------------------------------------------------------------------------------------


async def test_a_dedicated_worker_keeps_its_queue_moving_whatever_fills_the_others(bench: Bench) -> None:
    note, starts = notes_of_queues(bench)
    gate = Gate()

    @bench.app.task(queue="bulk")
    async def endless() -> None:
        await gate.wait()

    bulk = await bench.worker(queues=("bulk", "mail"), concurrency=2)
    mail = await bench.worker(queues=("mail",), concurrency=2)
    for _ in range(4):
        await bench.commit_and_relay(endless)
    await started(bulk)
    await fill(bench, note, mail=2)

    await turn(mail)

    assert starts == ["mail", "mail"]
    assert len(bulk.turns.runs) == 2
    assert len(await bench.ready("bulk")) == 2, "nobody else took them"
    await gate.opened()
    await until(lambda: not bulk.turns.runs, "the others ended")
    await settled(bulk)


# --- the bells -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers wait for their bells, and look at nothing by themselves."""
    monkeypatch.setattr("jobq.worker.fetching._BELL_S", 3600.0)


@pytest.mark.parametrize("order", [{"weights": WEIGHTS}, {"strict": True}], ids=["weights", "strict"])
async def test_the_bell_of_every_queue_wakes_a_worker(bench: Bench, no_look_up: None, order: dict[str, object]) -> None:
    note, starts = notes_of_queues(bench)
    settings = WorkerSettings.model_validate({"queues": ("a", "b", "c"), "beat": 0.5, "lease": 30, **order})

    async with running(Worker(bench.app, settings)):
        for queue in ("c", "a", "b", "b", "c"):
            starts.clear()
            await fill(bench, note, **{queue: 1})
            await until(lambda: len(starts) == 1, f"the job of {queue} ran")


async def test_a_bell_that_a_busy_worker_took_wakes_another_one(bench: Bench, no_look_up: None) -> None:
    note, starts = notes_of_queues(bench)
    busy = await bench.worker(queues=("a", "b"), strict=True, concurrency=1)
    idle = await bench.worker(queues=("b",))
    listening = asyncio.create_task(busy.turns.step())
    await until(lambda: is_blocked(bench), "it waits for a bell")
    await fill(bench, note, b=1)
    await asyncio.wait_for(listening, 10)
    job_id = await bench.enqueue(note, "a", queue="a")
    await bench.broker.push("a", [entry_of(await bench.row(job_id))], expected=ADOPT_TOKEN, token="by hand")
    assert await bench.redis.llen(bench.broker.keys("b").bell) == 0, "it took the only ring"

    await turn(busy)
    assert starts == ["a"], "in strict order it had no slot for b"

    await asyncio.wait_for(idle.turns.fetching._broker.listen(("b",), 10), 10)
    await turn(idle)
    assert starts == ["a", "b"]


async def test_a_bell_that_an_interrupted_worker_may_have_taken_is_passed_on(bench: Bench, no_look_up: None) -> None:
    note, _ = notes_of_queues(bench)
    worker = await bench.worker(queues=("a", "b"), strict=True, concurrency=1)
    listening = asyncio.create_task(worker.turns.step())
    await until(lambda: is_blocked(bench), "it waits for a bell")
    worker.orders.wake()
    await asyncio.wait_for(listening, 10)
    await fill(bench, note, a=1, b=1)
    await bench.redis.delete(bench.broker.keys("b").bell)  # taken by the wait that was interrupted

    await turn(worker)

    assert await bench.redis.llen(bench.broker.keys("b").bell) == 1


async def is_blocked(bench: Bench) -> bool:
    return any("b" in client["flags"] for client in await bench.redis.client_list())
