"""A rolling deploy, in either order: nothing is lost, and nothing runs twice.

Two releases of one application live side by side, each with producers and workers; workers run by themselves here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any
from uuid import UUID

import pytest

from jobq import JobQ
from jobq.outbox import browse
from jobq.settings import WorkerSettings
from jobq.worker import worker as worker_module
from jobq.worker.worker import Worker
from tests.builders import Bench, running, turn
from tests.waiting import until

BEAT_S = 0.05
JOBS = 20


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth beat comes soon, and is not kept waiting by the sweeper's pace."""
    monkeypatch.setattr(worker_module, "SWEEP_EVERY_S", 0.05)


class Release:
    """One version of the application: tasks by name, and the former names of each."""

    def __init__(self, app: JobQ, tasks: dict[str, Iterable[str]]):
        self.app = app
        self.runs: list[tuple[str, int]] = []
        """(the task's own name, the number of the job) of every run here."""
        self.tasks = {name: self._task(name, aliases) for name, aliases in tasks.items()}

    def _task(self, name: str, aliases: Iterable[str]) -> Any:
        @self.app.task(name=name, aliases=aliases)
        async def task(number: int) -> None:
            self.runs.append((name, number))

        return task

    def worker(self) -> Worker:
        return Worker(self.app, WorkerSettings(beat=BEAT_S, lease=30.0, concurrency=5))

    def numbers(self) -> list[int]:
        return sorted(number for _, number in self.runs)


async def release(bench: Bench, tasks: dict[str, Iterable[str]]) -> Release:
    return Release(await bench.second_app(), tasks)


async def produce(bench: Bench, made_by: Release, task: str, numbers: Iterable[int]) -> list[UUID]:
    ids = [await bench.enqueue(made_by.tasks[task], number) for number in numbers]
    await bench.relay()
    return ids


async def has_beaten(bench: Bench, worker: Worker) -> None:
    async def is_known() -> bool:
        return worker.name in await bench.broker.beats("default")

    await until(is_known, "the worker has registered")


async def are_parked(bench: Bench, task: str, count: int) -> None:
    async def is_parked() -> bool:
        return await bench.redis.llen(bench.broker.keys("default").parked(task)) == count

    await until(is_parked, f"{count} jobs of {task} are parked")


# --- producers first: workers of the old release see a task they do not know -----------------------------------------


async def test_jobs_of_a_task_that_no_worker_knows_yet_wait_and_run_once_with_the_first_that_does(
    bench: Bench,
) -> None:
    old, new = await release(bench, {"send": []}), await release(bench, {"send": [], "resize": []})

    async with running(old.worker()):
        await produce(bench, new, "resize", range(JOBS))
        await produce(bench, new, "send", range(JOBS))
        await are_parked(bench, "resize", JOBS)
        await until(lambda: len(old.runs) == JOBS, "the old worker runs what it knows, and is not held up")
    async with running(new.worker()):
        await until(lambda: len(new.runs) == JOBS, "the new worker called them back as it registered")
        await bench_is_drained(bench)

    assert (old.numbers(), new.numbers()) == (list(range(JOBS)), list(range(JOBS)))


async def test_jobs_that_an_old_worker_parks_while_a_new_one_lives_are_called_back(bench: Bench) -> None:
    old, new = await release(bench, {"send": []}), await release(bench, {"send": [], "resize": []})
    newer = new.worker()

    async with running(newer):
        await has_beaten(bench, newer)
        newer.orders.quiet.set()  # so that the old one gets all of them
        async with running(old.worker()):
            await produce(bench, new, "resize", range(JOBS))
            await until(lambda: parked_so_far(bench, JOBS), "the old worker parked what it fetched")
        newer.orders.quiet.clear()
        newer.orders.wake()
        await until(lambda: len(new.runs) == JOBS, "they were called back with one of the next beats", 20)
        await bench_is_drained(bench)

    assert new.numbers() == list(range(JOBS))


async def parked_so_far(bench: Bench, count: int) -> bool:
    return (await bench.stats()).get("parked", 0) >= count


async def test_both_releases_at_work_pass_jobs_to_and_fro_and_run_each_once(bench: Bench) -> None:
    old = await release(bench, {"send": [], "retired": []})
    new = await release(bench, {"send": [], "resize": []})

    async with running(old.worker()), running(new.worker()):
        for number in range(0, 24, 3):
            await produce(bench, new, "resize", [number])
            await produce(bench, old, "send", [number + 1])
            await produce(bench, old, "retired", [number + 2])
        await until(lambda: len(old.runs) + len(new.runs) == 24, "every job ran", 40)
        await bench_is_drained(bench)

    assert sorted(old.numbers() + new.numbers()) == list(range(24))
    assert {name for name, _ in new.runs} <= {"send", "resize"}


async def test_more_jobs_than_one_call_takes_are_called_back_at_once(bench: Bench) -> None:
    new = await release(bench, {"resize": []})
    worker = await bench.worker(app=new.app)
    entries = [f"{UUID(int=number).hex}:1:2" for number in range(1, 2_501)]
    await bench.redis.rpush(bench.broker.keys("default").parked("resize"), *entries)

    await worker._unpark()

    assert len(await bench.ready()) == 2_500


async def test_old_workers_do_not_get_what_a_new_one_calls_back_and_has_room_for(bench: Bench) -> None:
    """From ready they would fetch and park it again, perhaps for many rounds."""
    old, new = await release(bench, {}), await release(bench, {"resize": []})
    older, newer = await bench.worker(app=old.app), await bench.worker(app=new.app, concurrency=5)
    await produce(bench, new, "resize", range(3))
    await turn(older)
    await are_parked(bench, "resize", 3)

    await newer._unpark()

    assert await bench.ready() == []
    await turn(newer)
    assert new.numbers() == [0, 1, 2]
    await bench.assert_drained()


async def test_what_is_called_back_beyond_the_room_is_for_all(bench: Bench) -> None:
    old, new = await release(bench, {}), await release(bench, {"resize": []})
    older, newer = await bench.worker(app=old.app), await bench.worker(app=new.app, concurrency=2)
    await produce(bench, new, "resize", range(5))
    await turn(older)
    await are_parked(bench, "resize", 5)

    for _ in range(2):
        await newer._unpark()

    assert (len(newer.owned), len(await bench.ready())) == (2, 3)
    await turn(newer)
    assert new.numbers() == [0, 1]


async def test_a_worker_that_may_not_fetch_calls_back_for_the_others_alone(bench: Bench) -> None:
    old, new = await release(bench, {}), await release(bench, {"resize": []})
    older, newer = await bench.worker(app=old.app), await bench.worker(app=new.app)
    await produce(bench, new, "resize", range(3))
    await turn(older)
    newer.orders.quiet.set()

    await newer._unpark()

    assert (len(newer.owned), len(await bench.ready())) == (0, 3)


# --- workers first, and renames --------------------------------------------------------------------------------------


async def test_a_renamed_task_runs_what_old_producers_still_enqueue_under_its_old_name(bench: Bench) -> None:
    old, new = await release(bench, {"send": []}), await release(bench, {"send_receipt": ["send"]})

    async with running(new.worker()):
        await produce(bench, old, "send", range(JOBS))
        await produce(bench, new, "send_receipt", range(JOBS, 2 * JOBS))
        await until(lambda: len(new.runs) == 2 * JOBS, "jobs of both names ran")
        await bench_is_drained(bench)

    assert Counter(name for name, _ in new.runs) == {"send_receipt": 2 * JOBS}
    assert new.numbers() == list(range(2 * JOBS))


async def test_a_rename_with_both_releases_at_work_runs_each_job_once(bench: Bench) -> None:
    old, new = await release(bench, {"send": []}), await release(bench, {"send_receipt": ["send"]})

    async with running(old.worker()), running(new.worker()):
        for number in range(JOBS):
            await produce(bench, new, "send_receipt", [number])
            await produce(bench, old, "send", [JOBS + number])
        await until(lambda: len(old.runs) + len(new.runs) == 2 * JOBS, "every job ran", 40)
        await bench_is_drained(bench)

    assert sorted(old.numbers() + new.numbers()) == list(range(2 * JOBS))
    assert {number for number in old.numbers() if number < JOBS} == set(), "the old release does not know the new name"


async def test_a_release_rolled_back_runs_what_the_new_one_enqueued_where_it_knows_the_name(bench: Bench) -> None:
    """The old release was given the coming name as an alias before: then either may go first, or back."""
    old, new = await release(bench, {"send": ["send_receipt"]}), await release(bench, {"send_receipt": ["send"]})

    await produce(bench, new, "send_receipt", range(JOBS))
    await produce(bench, old, "send", range(JOBS, 2 * JOBS))
    async with running(old.worker()):
        await until(lambda: len(old.runs) == 2 * JOBS, "the old release ran both")
        await bench_is_drained(bench)

    assert old.numbers() == list(range(2 * JOBS))


async def test_a_job_keeps_its_stored_name_through_retry_death_and_return(bench: Bench) -> None:
    """So that a release rolled back still knows it, and lists by task go on finding it."""
    old = await release(bench, {"send": []})
    new_app = await bench.second_app()
    names: list[str] = []

    @new_app.task(name="send_receipt", aliases=["send"])
    async def send_receipt(number: int) -> None:
        raise LookupError

    @new_app.on_dead
    async def note(session: Any, dead: Any) -> None:
        names.append(dead.task)

    worker = await bench.worker(app=new_app)
    job_id = await bench.enqueue(old.tasks["send"], 1, max_attempts=2)
    await bench.relay()
    await turn(worker)
    retrying = await browse.jobs(bench.db, "jobq", task="send", limit=10)
    await bench.db.execute("UPDATE jobq.outbox SET run_at = NULL")
    await bench.relay()
    await turn(worker)
    dead = await browse.dead(bench.db, "jobq", browse.DeadFilter(task="send"))
    await browse.retry_dead(bench.db, "jobq", [job_id])

    assert [row.id for row in retrying] == [job_id]
    assert [row.id for row in dead] == [job_id]
    assert names == ["send"]
    async with running(old.worker()):
        await bench.relay()
        await until(lambda: old.runs == [("send", 1)], "the release rolled back ran it")
        await bench_is_drained(bench)


async def test_parked_jobs_survive_the_loss_of_redis(bench: Bench) -> None:
    old, new = await release(bench, {"send": []}), await release(bench, {"resize": []})
    async with running(old.worker()):
        await produce(bench, new, "resize", range(JOBS))
        await are_parked(bench, "resize", JOBS)
    await bench.redis.flushall()
    await bench.relay()

    async with running(new.worker()):
        await until(lambda: len(new.runs) == JOBS, "they were rebuilt and ran")
        await bench_is_drained(bench)

    assert new.numbers() == list(range(JOBS))


# --- arguments -------------------------------------------------------------------------------------------------------


async def test_a_new_parameter_with_a_default_takes_jobs_of_both_releases(bench: Bench) -> None:
    old, new_app, runs = await release(bench, {"send": []}), await bench.second_app(), []

    @new_app.task
    async def send(number: int, locale: str = "en") -> None:
        runs.append((number, locale))

    worker = await bench.worker(app=new_app)
    await bench.enqueue(old.tasks["send"], 1)
    await bench.enqueue(send, 2, "sv")
    await bench.relay()
    await turn(worker)

    assert sorted(runs) == [(1, "en"), (2, "sv")]
    await bench.assert_drained()


async def test_a_removed_parameter_is_a_dead_job_that_says_so_and_runs_once_the_parameter_is_back(
    bench: Bench,
) -> None:
    old_app, new, runs = await bench.second_app(), await release(bench, {"send": []}), []

    @old_app.task
    async def send(number: int, locale: str) -> None:
        runs.append((number, locale))

    newer, older = await bench.worker(app=new.app), await bench.worker(app=old_app)
    job_id = await bench.commit_and_relay(send, 1, "sv")
    await turn(newer)
    (dead,) = await browse.dead(bench.db, "jobq")
    await browse.retry_dead(bench.db, "jobq", [job_id])
    await bench.relay()
    await turn(older)

    assert (dead.reason, dead.attempts) == ("invalid", 0)
    assert dead.last_error == "jobq.errors.InvalidArguments: send(): locale: Extra inputs are not permitted"
    assert new.runs == []
    assert runs == [(1, "sv")]
    await bench.assert_drained()


async def bench_is_drained(bench: Bench) -> None:
    async def is_drained() -> bool:
        left = await bench.db.fetchval("SELECT count(*) FROM jobq.outbox")
        names = {name for name in await bench.keys_left() if name.rpartition(":")[2] not in ("beats", "workers")}
        return left == 0 and not names

    await until(is_drained, "no row and no entry is left")
