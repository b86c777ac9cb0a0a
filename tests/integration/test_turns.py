"""The turns of a worker: what is fetched, what is read, and what is therefore never run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from jobq import JobQ
from jobq.broker.client import connect_sync
from jobq.broker.scripts import ADOPT_TOKEN, script
from jobq.model import Entry
from jobq.worker.worker import Worker
from tests.builders import Bench, Gate, any_id, entry_of, settled, started, turn
from tests.faults.proxy import redis_proxy
from tests.waiting import until


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


def note_runs(app: JobQ, **options: object) -> tuple[object, list[int]]:
    """A task that notes its number when it runs, and the notes."""
    runs: list[int] = []

    @app.task(**options)  # type: ignore[call-overload]
    async def note(number: int) -> None:
        runs.append(number)

    return note, runs


def gated(app: JobQ, name: str = "gated") -> tuple[object, Gate]:
    """A task that runs until its gate opens."""
    gate = Gate()

    @app.task(name=name)
    async def wait_at_gate() -> None:
        await gate.wait()

    return wait_at_gate, gate


async def test_a_committed_job_runs_once_and_leaves_nothing_behind(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    await bench.commit_and_relay(note, 7)

    await turn(worker)

    assert runs == [7]
    assert len(worker.owned) == 0
    await bench.assert_drained()


# --- what is never run -------------------------------------------------------------------------------------------


async def test_an_entry_whose_row_is_gone_is_a_ghost_and_never_runs(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    job_id = await bench.commit_and_relay(note, 1)
    await bench.db.execute("DELETE FROM jobq.outbox WHERE id = $1", job_id)

    await turn(worker)

    assert runs == []
    assert (await bench.stats())["ghost"] == 1
    await bench.assert_drained()


async def test_an_entry_whose_row_is_newer_is_a_ghost_and_never_runs(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    job_id = await bench.commit_and_relay(note, 1)
    await bench.db.execute("UPDATE jobq.outbox SET generation = 2 WHERE id = $1", job_id)

    await turn(worker)

    assert runs == []
    assert (await bench.stats())["ghost"] == 1
    assert await bench.row(job_id) is not None


async def test_an_entry_whose_row_is_older_is_rewound_and_never_runs(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    job_id = await bench.enqueue(note, 1)
    await bench.db.execute("UPDATE jobq.outbox SET generation = 5 WHERE id = $1", job_id)
    await bench.relay()
    await bench.db.execute("UPDATE jobq.outbox SET generation = 3 WHERE id = $1", job_id)

    await turn(worker)

    assert runs == []
    assert (await bench.stats())["rewound"] == 1
    assert await bench.broker.known("default", [job_id]) == [0], "the relay's walk brings the row again"
    assert await bench.row(job_id) is not None


async def test_a_forged_entry_starts_nothing(bench: Bench) -> None:
    _, runs = note_runs(bench.app)
    worker = await bench.worker()
    await bench.broker.push("default", [Entry.of(any_id(), 1, 1).raw], expected="*", token="forged")

    await turn(worker)

    assert runs == []
    assert (await bench.stats())["ghost"] == 1
    await bench.assert_drained()


async def test_a_cancelled_job_does_not_run(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    job_id = await bench.commit_and_relay(note, 1)
    async with bench.app.database.sessions.begin() as session:
        assert await bench.app.cancel(session, job_id)

    await turn(worker)

    assert runs == []
    await bench.assert_drained()


async def test_garbage_in_a_working_list_is_dropped_and_counted(bench: Bench) -> None:
    worker = await bench.worker()
    await bench.redis.rpush(bench.broker.keys("default").working(worker.name), b"\xff\x00 not an entry")

    await worker.turns.adopt("default", await bench.working(worker))

    assert await bench.working(worker) == []
    assert (await bench.stats())["garbage"] == 1


# --- the primary, and no other database --------------------------------------------------------------------------


async def cut_lines(bench: Bench, worker: Worker) -> None:
    """Lose the worker's own connections, as a failover does."""
    await bench.db.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name LIKE $1",
        f"jobq:{worker.name}%",
    )


async def test_another_database_behind_the_url_is_refused_and_nothing_is_dropped(
    database_url: str, redis_url: str
) -> None:
    async with Bench.open(database_url, redis_url) as bench:
        note, runs = note_runs(bench.app)
        worker = await bench.worker()
        job_id = await bench.commit_and_relay(note, 1)
        mine = await bench.db.fetchval("SELECT database_id FROM jobq.meta")
        # Another database with the same schema: not mine, and empty.
        await bench.db.execute("UPDATE jobq.meta SET database_id = gen_random_uuid()")
        await bench.db.execute("ALTER TABLE jobq.outbox RENAME TO outbox_of_mine")
        await bench.db.execute("CREATE TABLE jobq.outbox (LIKE jobq.outbox_of_mine INCLUDING ALL)")
        await cut_lines(bench, worker)

        reading = asyncio.create_task(started(worker))
        await until(lambda: worker.turns.database_outage._since is not None, "the database was refused")
        stats_while_away = await bench.stats()
        working_while_away = await bench.working(worker)
        await bench.db.execute("DROP TABLE jobq.outbox")
        await bench.db.execute("ALTER TABLE jobq.outbox_of_mine RENAME TO outbox")
        await bench.db.execute("UPDATE jobq.meta SET database_id = $1", mine)
        await reading
        await until(lambda: not worker.turns.runs, "the run ended")
        await settled(worker)

        assert "ghost" not in stats_while_away
        assert [entry[:32] for entry in working_while_away] == [job_id.hex.encode()]
        assert runs == [1]
        await bench.assert_drained()


async def test_reading_waits_for_postgresql_and_drops_nothing(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    await bench.commit_and_relay(note, 1)
    await cut_lines(bench, worker)

    await turn(worker)

    assert runs == [1]
    await bench.assert_drained()


# --- tasks nobody here knows -------------------------------------------------------------------------------------


async def test_a_job_of_an_unknown_task_is_parked_and_runs_where_the_task_is_known(bench: Bench) -> None:
    older_release = await bench.second_app()
    note, runs = note_runs(bench.app)
    old, new = await bench.worker(app=older_release), await bench.worker()
    job_id = await bench.commit_and_relay(note, 1)

    await turn(old)
    parked = await bench.redis.lrange(bench.broker.keys("default").parked("note"), 0, -1)
    await new.turns.unpark("default")
    await turn(new)

    assert [entry[:32] for entry in parked] == [job_id.hex.encode()]
    assert len(old.owned) == 0
    assert runs == [1]
    await bench.assert_drained()


async def test_parking_is_told_once_a_task_and_not_once_a_job(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    note, _ = note_runs(bench.app)
    other, _ = note_runs(bench.app, name="other")
    older = await bench.worker(app=await bench.second_app())
    for task in (note, note, other):
        await bench.commit_and_relay(task, 1)

    await turn(older)

    told = [message for message in caplog.messages if message.startswith("no such task in this worker")]
    assert len(told) == 2


async def test_a_renamed_task_still_runs_under_its_old_name(bench: Bench) -> None:
    older_release = await bench.second_app()

    @older_release.task
    async def old_name(number: int) -> None: ...

    _, runs = note_runs(bench.app, aliases=["old_name"])
    worker = await bench.worker()
    await bench.commit_and_relay(old_name, 3)

    await turn(worker)

    assert runs == [3]


# --- order -------------------------------------------------------------------------------------------------------


async def test_urgent_jobs_are_fetched_first(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker(concurrency=1)
    for priority in (4, 2, 1, 3):
        await bench.commit_and_relay(note, priority, priority=priority)

    for _ in range(4):
        await turn(worker)

    assert runs == [1, 2, 3, 4]


async def test_every_queue_of_a_worker_gets_its_turn(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker(queues=("a", "b"), concurrency=1)
    for number in range(3):
        await bench.enqueue(note, number, queue="a")
        await bench.enqueue(note, 10 + number, queue="b")
    await bench.relay()

    for _ in range(6):
        await turn(worker)

    assert sorted(runs) == [0, 1, 2, 10, 11, 12]
    assert {number >= 10 for number in runs[:2]} == {True, False}, "no queue waits for another one to be empty"
    await bench.assert_drained()


async def test_a_worker_leaves_other_queues_alone(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker(queues=("a",))
    await bench.commit_and_relay(note, 1, queue="b")

    await started(worker)

    assert runs == []
    assert len(await bench.ready("b")) == 1


# --- how much is fetched -----------------------------------------------------------------------------------------


async def test_no_more_is_fetched_than_there_are_free_slots(bench: Bench) -> None:
    wait_at_gate, gate = gated(bench.app)
    worker = await bench.worker(concurrency=2)
    for _ in range(3):
        await bench.commit_and_relay(wait_at_gate)

    await started(worker)
    await gate.arrived.wait()
    await started(worker)

    assert len(worker.turns.runs) == 2
    assert len(await bench.working(worker)) == 2
    assert len(await bench.ready()) == 1
    gate.open.set()
    await until(lambda: not worker.turns.runs, "both runs ended")
    await turn(worker)
    await bench.assert_drained()


async def test_a_quiet_worker_fetches_nothing_and_runs_on(bench: Bench) -> None:
    wait_at_gate, gate = gated(bench.app)
    worker = await bench.worker()
    await bench.commit_and_relay(wait_at_gate)
    await started(worker)
    await gate.arrived.wait()

    worker.orders.quiet.set()
    await bench.commit_and_relay(wait_at_gate)
    await started(worker)

    assert len(worker.turns.runs) == 1
    assert len(await bench.ready()) == 1
    gate.open.set()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)


async def test_nothing_starts_when_the_last_answered_beat_is_too_old(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    await bench.commit_and_relay(note, 1)
    worker.heartbeat.acked_at -= worker.settings.start_margin

    await started(worker)
    nothing_fetched = await bench.working(worker)
    worker.heartbeat.step()
    await turn(worker)

    assert nothing_fetched == []
    assert runs == [1]


async def test_what_was_fetched_before_the_lease_became_doubtful_goes_back_unrun(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    await bench.commit_and_relay(note, 1)
    holdings = await worker.turns._fetch(worker.turns._room())
    jobs = await worker.turns._read(holdings)

    worker.heartbeat.acked_at -= worker.settings.start_margin
    worker.turns._start(holdings, jobs)
    await settled(worker)

    assert runs == []
    assert len(worker.owned) == 0
    assert len(await bench.ready()) == 1


async def test_a_fenced_worker_fetches_nothing_until_it_has_beaten_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    await bench.redis.flushall()
    await bench.commit_and_relay(note, 1)

    await started(worker)
    await started(worker)
    fetched_while_fenced = await bench.working(worker)
    worker.heartbeat.step()
    await turn(worker)

    assert fetched_while_fenced == []
    assert [record.message for record in caplog.records].count(
        "fenced: redis does not know this worker, waiting for the next beat"
    ) == 1
    assert runs == [1]


# --- the bell ----------------------------------------------------------------------------------------------------


async def test_an_idle_worker_is_woken_by_the_bell_and_never_blocks_on_a_queue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobq.worker.fetching._BELL_S", 3600.0)
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    idle = asyncio.create_task(worker.turns.step())

    blocked = await until(lambda: blocked_client(bench), "the idle worker blocks on something")
    await bench.commit_and_relay(note, 1)
    await asyncio.wait_for(idle, 20)
    await until(lambda: runs, "what was fetched behind the bell has run, without another turn")
    await settled(worker)

    assert blocked["cmd"] == "blpop"
    assert await bench.working(worker) == []
    assert runs == [1]


async def blocked_client(bench: Bench) -> dict[str, str] | None:
    return next((client for client in await bench.redis.client_list() if "b" in client["flags"]), None)


async def test_jobs_have_begun_before_the_next_turn_asks_for_more(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    await bench.commit_and_relay(note, 1)

    await worker.turns.step()

    assert runs == [1]
    await settled(worker)


async def test_the_end_of_a_run_breaks_off_no_wait_for_the_bell(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobq.worker.fetching._BELL_S", 3600.0)
    wait_at_gate, gate = gated(bench.app)
    worker = await bench.worker(concurrency=2)
    await bench.commit_and_relay(wait_at_gate)
    await started(worker)
    worker.orders.woken.clear()
    idle = asyncio.create_task(worker.turns.step())
    before = await until(lambda: blocked_client(bench), "it waits for the bell")

    gate.open.set()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)
    after = await blocked_client(bench)

    assert after is not None
    assert after["id"] == before["id"]
    worker.orders.wake()
    await asyncio.wait_for(idle, 20)


async def test_what_was_fetched_behind_a_bell_that_a_wake_up_broke_off_is_adopted(
    bench: Bench, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobq.worker.fetching._BELL_S", 3600.0)
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    worker.orders.woken.clear()
    entry = entry_of(await bench.row(await bench.enqueue(note, 1)))
    keys = bench.broker.keys("default")
    idle = asyncio.create_task(worker.turns.step())
    await until(lambda: blocked_client(bench), "it waits for the bell")

    with connect_sync(redis_url) as client:  # in one go: the worker hears nothing of it
        names = [keys.relay, keys.known, keys.bell, keys.stats, *keys.ready]
        script("push").run_sync(client, names, [ADOPT_TOKEN, "token", "pushed", entry])
        worker.orders.wake()
    await asyncio.wait_for(idle, 20)
    fetched, owned = await bench.working(worker), len(worker.owned)
    worker.heartbeat.step()
    worker.heartbeat.step()
    await until(lambda: worker.turns._adopted, "two beats found it")
    await turn(worker)

    assert (len(fetched), owned) == (1, 0)
    assert runs == [1]
    await bench.assert_drained()


async def test_no_entry_is_lost_when_an_idle_worker_is_interrupted_again_and_again(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker(concurrency=100)

    for number in range(30):
        idle = asyncio.create_task(worker.turns.step())
        await asyncio.sleep(0)
        await bench.commit_and_relay(note, number)
        idle.cancel()
        await asyncio.gather(idle, return_exceptions=True)
        await worker.turns._release_unstarted()
    await settled(worker)
    while await bench.ready():
        await turn(worker)
    # What a cancelled fetch moved without telling: two beats find it.
    worker.heartbeat.step()
    worker.heartbeat.step()
    await until(lambda: len(worker.turns._adopted) == len(worker.heartbeat._before["default"].unknown), "adopted")
    while worker.turns._adopted:
        await turn(worker)
    await until(lambda: not worker.turns.runs, "all runs ended")
    await settled(worker)

    assert sorted(runs) == list(range(30))
    await bench.assert_drained()


# --- suspects ----------------------------------------------------------------------------------------------------


async def test_a_job_that_killed_two_workers_runs_with_nothing_beside_it(bench: Bench) -> None:
    beside: list[int] = []
    wait_at_gate, gate = gated(bench.app)
    note, runs = note_runs(bench.app)
    suspect_gate = Gate()
    worker = await bench.worker()

    @bench.app.task
    async def suspect() -> None:
        beside.append(len(worker.turns.runs))
        await suspect_gate.wait()
        beside.append(len(worker.turns.runs))

    await bench.commit_and_relay(wait_at_gate)
    suspect_id = await bench.enqueue(suspect)
    await bench.db.execute("UPDATE jobq.outbox SET crashes = 2 WHERE id = $1", suspect_id)
    await bench.relay()

    await started(worker)
    await gate.arrived.wait()
    await bench.commit_and_relay(note, 1)
    await started(worker)
    assert not suspect_gate.arrived.is_set(), "it waits for the others to end"
    assert len(await bench.ready()) == 1, "nothing is fetched while it waits"

    gate.open.set()
    await until(lambda: not worker.turns.runs, "the innocent ended")
    await settled(worker)
    await started(worker)
    await suspect_gate.arrived.wait()
    await started(worker)
    assert runs == [], "nothing is fetched while it runs"

    suspect_gate.open.set()
    await until(lambda: not worker.turns.runs, "the suspect ended")
    await turn(worker)

    assert beside == [1, 1]
    assert runs == [1]
    await bench.assert_drained()


async def test_nothing_but_the_suspect_stands_in_the_working_list_while_it_runs(bench: Bench) -> None:
    """What stands there counts as started: a suspect that kills its worker would bury those that wait behind it."""
    wait_at_gate, gate = gated(bench.app)
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    innocent_id = await bench.enqueue(note, 0)
    suspects = [await bench.enqueue(wait_at_gate), await bench.enqueue(note, 1), await bench.enqueue(note, 2)]
    await bench.db.execute("UPDATE jobq.outbox SET crashes = 2 WHERE id = ANY($1)", suspects)
    await bench.relay()

    await started(worker)
    await until(lambda: not worker.turns.runs, "the innocent ended")
    await started(worker)
    assert not worker.turns.runs, "the innocent is not settled yet"
    await settled(worker)
    await started(worker)
    await gate.arrived.wait()

    assert [raw[:32].decode() for raw in await bench.working(worker)] == [suspects[0].hex]
    assert [raw[:32].decode() for raw in await bench.ready()] == [job_id.hex for job_id in suspects[1:]]

    gate.open.set()
    await until(lambda: not worker.turns.runs, "the suspect ended")
    for _ in suspects[1:]:
        await settled(worker)
        await started(worker)
        await settled(worker)
        await turn(worker)

    assert runs == [0, 1, 2]
    assert await bench.row(innocent_id) is None
    await bench.assert_drained()


async def test_a_suspect_that_was_cancelled_while_it_waited_does_not_run(bench: Bench) -> None:
    wait_at_gate, gate = gated(bench.app)
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    await bench.commit_and_relay(wait_at_gate)
    suspect_id = await bench.enqueue(note, 1)
    await bench.db.execute("UPDATE jobq.outbox SET crashes = 2 WHERE id = $1", suspect_id)
    await bench.relay()
    await started(worker)
    await gate.arrived.wait()

    await bench.db.execute("DELETE FROM jobq.outbox WHERE id = $1", suspect_id)
    gate.open.set()
    await until(lambda: not worker.turns.runs, "the innocent ended")
    await settled(worker)
    await started(worker)
    await until(lambda: not worker.turns.runs, "nothing runs")
    await settled(worker)

    assert runs == []
    await bench.assert_drained()


async def test_entries_adopted_while_a_suspect_waits_go_to_other_workers(bench: Bench) -> None:
    wait_at_gate, gate = gated(bench.app)
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    await bench.commit_and_relay(wait_at_gate)
    suspect_id = await bench.enqueue(note, 1)
    await bench.db.execute("UPDATE jobq.outbox SET crashes = 2 WHERE id = $1", suspect_id)
    await bench.relay()
    await started(worker)
    await gate.arrived.wait()
    await bench.commit_and_relay(note, 2)
    fetched = await bench.broker.fetch("default", worker.name, 1)
    assert fetched is not None

    await worker.turns.adopt("default", fetched.entries)
    await started(worker)
    await worker.settler.step()

    assert await bench.ready() == fetched.entries
    gate.open.set()
    await until(lambda: not worker.turns.runs, "the innocent ended")
    await settled(worker)
    await turn(worker)
    assert runs == [1]
    await turn(worker)
    assert runs == [1, 2]
    await bench.assert_drained()


# --- what the heartbeat finds ------------------------------------------------------------------------------------


async def test_adopted_entries_beyond_the_free_slots_are_released(bench: Bench) -> None:
    wait_at_gate, gate = gated(bench.app)
    worker = await bench.worker(concurrency=2)
    await bench.commit_and_relay(wait_at_gate)
    await started(worker)
    await gate.arrived.wait()
    for _ in range(2):
        await bench.commit_and_relay(wait_at_gate)
    raws = (await bench.broker.fetch("default", worker.name, 2)).entries  # type: ignore[union-attr]

    await worker.turns.adopt("default", raws)
    await started(worker)
    await until(lambda: len(worker.turns.runs) == 2, "the slot is taken")
    await settled(worker)

    assert await bench.ready() == [raws[1]]
    assert (await bench.stats())["adopted"] == 2
    gate.open.set()
    await until(lambda: not worker.turns.runs, "the runs ended")
    await settled(worker)


async def test_adoption_leaves_turns_to_others(bench: Bench) -> None:
    note, _ = note_runs(bench.app)
    worker = await bench.worker(concurrency=2)
    for number in range(5):
        await bench.commit_and_relay(note, number)
    raws = (await bench.broker.fetch("default", worker.name, 5)).entries  # type: ignore[union-attr]

    await worker.turns.adopt("default", raws)

    assert (await bench.stats())["adopted"] == 2, "the next beat names the rest"


# --- fetching ahead --------------------------------------------------------------------------------------------------


async def many(bench: Bench, task: Any, count: int) -> None:
    """Commit and push jobs of a task without arguments, in one batch."""
    async with bench.app.database.sessions.begin() as session:
        await bench.app.enqueue_many(session, (task.job() for _ in range(count)))
    await bench.relay()


def quick(app: JobQ) -> tuple[Any, list[None]]:
    runs: list[None] = []

    @app.task
    async def end_at_once() -> None:
        runs.append(None)

    return end_at_once, runs


async def test_the_next_batch_is_fetched_while_one_runs_where_batches_end_at_once(bench: Bench) -> None:
    task, runs = quick(bench.app)
    worker = await bench.worker(concurrency=50)
    await many(bench, task, 200)

    left, done = [], []
    for _ in range(4):
        await started(worker)
        left.append(len(await bench.ready()))
        done.append(len(runs))
    await settled(worker)

    assert done == [50, 100, 150, 200]
    assert left == [150, 50, 0, 0], "the first turn fetched one batch, the second two"
    await bench.assert_drained()


async def test_rows_that_were_read_while_a_batch_held_the_process_up_are_read_again(bench: Bench) -> None:
    task, runs = quick(bench.app)

    @bench.app.task
    async def hold_up() -> None:
        time.sleep(0.02)  # noqa: ASYNC251

    worker = await bench.worker(concurrency=10)
    for kind in (task, hold_up, task):
        await many(bench, kind, 10)
    await started(worker)
    await started(worker)
    coming = worker.turns._coming
    await until(lambda: coming is not None and coming.done(), "the last batch was read")

    await bench.db.execute("DELETE FROM jobq.outbox WHERE task = $1", task.name)
    await started(worker)
    await settled(worker)

    assert len(runs) == 10
    assert (await bench.stats())["ghost"] == 10


async def test_a_turn_that_breaks_leaves_nothing_of_the_next_batch_owned(bench: Bench) -> None:
    task, runs = quick(bench.app)
    worker = await bench.worker(concurrency=10)
    await many(bench, task, 30)
    await started(worker)
    await started(worker)

    await worker.turns._release_unstarted()
    await settled(worker)

    assert (len(runs), len(await bench.ready()), len(worker.owned)) == (20, 10, 0)


async def test_nothing_is_fetched_ahead_of_jobs_that_take_their_time(bench: Bench) -> None:
    task, _ = quick(bench.app)
    wait_at_gate, gate = gated(bench.app)
    worker = await bench.worker(concurrency=50)
    await many(bench, wait_at_gate, 25)
    await many(bench, task, 125)

    await started(worker)
    await gate.arrived.wait()
    await until(lambda: len(worker.turns.runs) == 25, "the others ended")
    await started(worker)

    assert len(await bench.ready()) == 75, "as many as slots were free"
    gate.open.set()
    await until(lambda: not worker.turns.runs, "the runs ended")
    await settled(worker)


async def test_what_was_fetched_ahead_goes_back_where_no_slot_is_free_after_all(bench: Bench) -> None:
    task, runs = quick(bench.app)
    wait_at_gate, gate = gated(bench.app)
    worker = await bench.worker(concurrency=50)
    for kind in (task, wait_at_gate, task):
        await many(bench, kind, 50)
    await started(worker)  # those end at once
    await started(worker)  # those wait, and the others have been fetched ahead of them
    await gate.arrived.wait()
    ahead = len(await bench.working(worker)) - 100

    await started(worker)
    await settled(worker)

    assert ahead == 50
    assert (len(await bench.ready()), len(runs), len(worker.turns.runs)) == (50, 50, 50)
    gate.open.set()
    await until(lambda: not worker.turns.runs, "the runs ended")
    await turn(worker)
    await bench.assert_drained()
    assert len(runs) == 100


async def test_what_was_fetched_ahead_goes_back_when_the_worker_stops(bench: Bench) -> None:
    task, _ = quick(bench.app)
    worker = await bench.worker(concurrency=50)
    await many(bench, task, 150)
    await started(worker)
    await started(worker)

    await worker.turns.hand_back_unstarted()
    await settled(worker)

    assert len(await bench.ready()) == 50
    assert len(worker.owned) == 0


async def test_a_worker_of_few_jobs_more_fetches_none_beyond_them(bench: Bench) -> None:
    task, runs = quick(bench.app)
    worker = await bench.worker(concurrency=50, max_jobs=110)
    await many(bench, task, 150)

    for _ in range(3):
        await started(worker)
    await settled(worker)

    assert (len(runs), len(await bench.ready())) == (110, 40)


async def test_what_is_owned_is_ignored_when_it_is_adopted_again(bench: Bench) -> None:
    wait_at_gate, gate = gated(bench.app)
    worker = await bench.worker()
    await bench.commit_and_relay(wait_at_gate)
    await started(worker)
    await gate.arrived.wait()

    await worker.turns.adopt("default", await bench.working(worker))
    await started(worker)

    assert len(worker.turns.runs) == 1
    gate.open.set()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)
    await bench.assert_drained()


async def test_entries_that_turn_up_while_the_worker_stops_go_back(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    await bench.commit_and_relay(note, 1)
    fetched = await bench.broker.fetch("default", worker.name, 1)
    assert fetched is not None

    worker.orders.stopping.set()
    await worker.turns.hand_back_unstarted()
    await worker.turns.adopt("default", fetched.entries)
    await settled(worker)

    assert len(worker.owned) == 0
    assert len(await bench.ready()) == 1
    assert runs == []


async def test_entries_are_not_stranded_when_redis_goes_away_during_their_adoption(bench: Bench) -> None:
    note, runs = note_runs(bench.app)
    worker = await bench.worker()
    await bench.commit_and_relay(note, 1)
    fetched = await bench.broker.fetch("default", worker.name, 1)
    assert fetched is not None
    raws = [*fetched.entries, b"garbage"]

    # Garbage beside it, and no answer when that is to be dropped.
    working = bench.broker.keys("default").working(worker.name)
    await bench.redis.rename(working, "aside")
    await bench.redis.set(working, "of another type")
    with pytest.raises(Exception, match="WRONGTYPE"):
        await worker.turns.adopt("default", raws)
    await bench.redis.delete(working)
    await bench.redis.rename("aside", working)

    assert worker.owned.listed("default") == [], "the next two beats must find it unknown again"
    await worker.turns.adopt("default", fetched.entries)
    await turn(worker)
    assert runs == [1]


async def test_a_turn_that_breaks_off_leaves_nothing_owned_by_nobody(shared_database_url: str, redis_url: str) -> None:
    async with (
        redis_proxy(redis_url) as (proxy, through),
        Bench.open(shared_database_url, redis_url, redis=through) as bench,
    ):
        note, runs = note_runs(bench.app)
        worker = await bench.worker(queues=("a", "b"))
        await bench.enqueue(note, 1, queue="a")
        await bench.relay()
        known = bench.broker.keys("b").known
        proxy.lose_request(f"{script('fetch').sha}\r\n$1\r\n9\r\n${len(known)}\r\n{known}".encode())

        loops = [asyncio.create_task(worker.turns.take_until_stopped()), asyncio.create_task(worker.settler.run())]
        await until(lambda: runs == [1], "it went back and was fetched again")
        await until(lambda: len(worker.owned) == 0, "it was settled")
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)

        assert proxy.losses == 1
        assert (await bench.stats("a"))["released"] == 1


async def test_lost_ids_cancel_plain_runs(bench: Bench) -> None:
    wait_at_gate, gate = gated(bench.app)
    worker = await bench.worker()
    job_id = await bench.commit_and_relay(wait_at_gate)
    await started(worker)
    await gate.arrived.wait()
    await bench.db.execute("UPDATE jobq.outbox SET generation = 2 WHERE id = $1", job_id)

    await worker.turns.lose("default", worker.owned.listed("default"))
    await until(lambda: not worker.turns.runs, "the run was cancelled")
    await settled(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert (row["generation"], row["attempts"]) == (2, 0), "its next run is elsewhere, and this one changed nothing"
    assert len(worker.owned) == 0


async def test_unknown_losses_are_nobodys_business(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    worker = await bench.worker()
    caplog.set_level(logging.ERROR)

    await worker.turns.lose("default", [Entry.of(any_id(), 1, 2).raw, b"garbage"])

    assert caplog.records == []


async def test_an_entry_of_a_row_is_what_the_relay_pushes(bench: Bench) -> None:
    note, _ = note_runs(bench.app)
    leader = await bench.leader()
    job_id = await bench.enqueue(note, 1, priority=3)

    async def is_pushed() -> bool:
        await leader.step()
        return bool(await bench.ready())

    await until(is_pushed, "the relay pushed it")

    assert await bench.ready() == [entry_of(await bench.row(job_id))]
