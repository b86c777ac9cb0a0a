"""The watchdog: it ends a process that takes no turns any more, and no other."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from jobq.cli import watchdog
from jobq.cli.failures import ExitCode
from jobq.cli.probes import Address
from jobq.cli.watchdog import Watchdog, watched
from jobq.health import Pulse
from jobq.model import new_job_id
from jobq.outbox.database import Database
from jobq.relay.leadership import Relay
from jobq.settings import RelaySettings, WorkerSettings
from jobq.worker.worker import Worker
from tests.builders import Bench, Gate, running
from tests.commands import started
from tests.faults.proxy import postgres_proxy
from tests.probing import ask_now
from tests.waiting import until


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns that find nothing, and pauses in an outage, are much shorter than what these tests call frozen."""
    monkeypatch.setattr("jobq.worker.fetching._BELL_S", 0.1)
    monkeypatch.setattr("jobq.outage._LONGEST_PAUSE_S", 0.1)


class Ended:
    """Stands where os._exit does, in a process that is to go on."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.event = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.event.set()


class BarePart:
    """A part of a process that is nothing but its pulse."""

    def __init__(self, pulse: Pulse):
        self.pulse = pulse

    def checks(self) -> list[Any]:
        return []


def last_words(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    (fields,) = [record.fields for record in caplog.records if record.message.startswith("frozen: no turn")]  # type: ignore[attr-defined]
    return dict(fields)


async def test_a_blocked_event_loop_ends_the_process_and_is_told_with_its_stack(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(bench.app, WorkerSettings(frozen_after=2.0))
    end = Ended()
    with watched([worker], end=end):
        async with running(worker):
            await until(lambda: worker.pulse.still_s, "it takes turns")

            def block_the_loop() -> None:
                end.event.wait(20)

            block_the_loop()

    assert end.codes == [ExitCode.FORCED]
    fields = last_words(caplog)
    assert fields["part"] == "worker"
    assert fields["still_s"] > 2.0
    assert "block_the_loop" in fields["stack"].partition("turn:\n")[0]


async def test_a_turn_that_hangs_ends_the_process_though_the_loop_and_the_heartbeat_go_on(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    @bench.app.task
    async def quick() -> None: ...

    worker = Worker(bench.app, WorkerSettings(frozen_after=2.0, beat=0.05))
    end = Ended()
    with watched([worker], end=end):
        async with running(worker):
            await until(lambda: worker.pulse.still_s, "it takes turns")
            async with worker.turns._line._turn:  # somebody took the connection and never gives it back
                await bench.commit_and_relay(quick)
                await until(end.event.is_set, "the process was ended")
                assert worker.heartbeat.may_start

    stack = last_words(caplog)["stack"].partition("turn:\n")[2]
    assert all(f"in {name}\n" in stack for name in ("take_until_stopped", "step", "_read"))


async def test_an_outage_of_postgresql_is_no_hang(shared_database_url: str, redis_url: str) -> None:
    async with (
        postgres_proxy(shared_database_url) as (postgres, through),
        Bench.open(shared_database_url, redis_url, database=through) as bench,
    ):

        @bench.app.task
        async def quick() -> None: ...

        worker = Worker(bench.app, WorkerSettings(frozen_after=2.0))
        await bench.enqueue(quick)
        end = Ended()
        with watched([worker], end=end):
            async with running(worker):
                await until(lambda: worker.pulse.still_s, "it takes turns")
                postgres.is_refusing = True
                postgres.cut()
                await bench.relay()
                await until(lambda: worker.turns.database_outage.away_s > 2.5, "the outage was long")
                assert worker.turns.runs == set(), "the batch is still being read"
                assert end.codes == []
                postgres.is_refusing = False
                await until(lambda: not worker.turns.database_outage.away_s, "it was read")
                await until(lambda: not worker.owned.listed("default"), "the job was run")


async def test_a_worker_is_not_judged_before_its_first_turn_nor_while_it_drains(bench: Bench) -> None:
    gate = Gate()

    @bench.app.task
    async def waits() -> None:
        await gate.wait()

    worker = await bench.worker()
    worker.pulse.frozen_after_s = 0.0
    assert not worker.pulse.is_frozen, "its start may take long"
    async with running(worker):
        await until(lambda: worker.pulse.is_frozen, "it takes turns, and is judged")
        await bench.commit_and_relay(waits)
        await gate.arrived.wait()
        worker.orders.stopping.set()
        worker.orders.wake()
        await until(lambda: not worker.pulse.still_s, "it drains")
        assert not worker.pulse.is_frozen
        gate.open.set()


async def take_turns(part: Worker | Relay, number: int) -> None:
    seen: set[float | None] = set()

    def were_taken() -> bool:
        seen.add(part.pulse.ticked_at)
        return len(seen) > number

    await until(were_taken, f"{number} turns were taken", 20)


async def test_idle_and_quiet_turns_are_turns(bench: Bench) -> None:
    worker = Worker(bench.app, WorkerSettings(frozen_after=2.0))
    end = Ended()
    with watched([worker], end=end):
        async with running(worker):
            for is_quiet in (False, True):
                if is_quiet:
                    worker.orders.quiet.set()
                await take_turns(worker, 3)

    assert end.codes == []


async def test_the_turns_of_a_leader_of_a_standby_and_of_a_relay_that_cannot_connect_are_turns(
    shared_database_url: str, redis_url: str
) -> None:
    settings = RelaySettings(detect_loss_every=0.05)
    stopping = asyncio.Event()
    async with postgres_proxy(shared_database_url) as (postgres, through):
        leader, standby, outside = (
            Relay(Database.of(url), redis_url, "jobq", settings)
            for url in (shared_database_url, shared_database_url, through)
        )
        postgres.is_refusing = True
        serving = [asyncio.create_task(leader.run(stopping))]
        await until(lambda: leader.is_leading, "it leads")
        serving += [asyncio.create_task(relay.run(stopping)) for relay in (standby, outside)]
        await until(lambda: standby._is_standing_by, "it stands by")
        for relay in (leader, standby, outside):
            await take_turns(relay, 3)
        stopping.set()
        await asyncio.gather(*serving)

    assert not any(relay.pulse.still_s for relay in (leader, standby, outside)), "none is judged any more"


@pytest.mark.parametrize("leads", [True, False])
async def test_a_relay_that_hangs_ends_the_process(
    shared_database_url: str, redis_url: str, caplog: pytest.LogCaptureFixture, leads: bool
) -> None:
    async with postgres_proxy(shared_database_url) as (postgres, through):
        settings = RelaySettings(frozen_after=1.0, takeover_after=600.0, detect_loss_every=0.05)
        relay = Relay(Database.of(through), redis_url, "jobq", settings)
        other = Relay(Database.of(shared_database_url), redis_url, "jobq")
        stopping = asyncio.Event()
        end = Ended()
        tasks = []
        if not leads:
            tasks.append(asyncio.create_task(other.run(stopping)))
            await until(lambda: other.is_leading, "the other leads")
        with watched([relay], end=end):
            serving = asyncio.create_task(relay.run(stopping))
            await until(lambda: relay.is_leading if leads else relay._is_standing_by, "it serves")
            assert end.codes == []
            postgres.is_black_hole = True
            await until(end.event.is_set, "the process was ended")
            postgres.cut()
            stopping.set()
            await asyncio.gather(serving, *tasks)

    assert last_words(caplog)["part"] == "relay"
    assert "leadership.py" in last_words(caplog)["stack"]


def test_a_process_that_was_stopped_as_a_whole_has_time_to_turn_before_it_is_judged() -> None:
    pulse = Pulse("worker", 10.0)
    watchdog = Watchdog([pulse])

    def stop_for_long() -> None:
        pulse.ticked_at = time.monotonic() - 600

    stop_for_long()
    assert watchdog.look() is None, "it may be about to turn"
    pulse.tick()
    assert watchdog.look() is None
    stop_for_long()
    assert watchdog.look() is None
    stop_for_long()
    assert watchdog.look() is None, "it turned in between"
    assert watchdog.look() is pulse


def test_a_log_that_blocks_does_not_keep_it_from_ending_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_REPORT_WAIT_S", 0.1)
    released = threading.Event()

    class FullPipe(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            released.wait(20)

    handler = FullPipe()
    watchdog.log.addHandler(handler)
    pulse = Pulse("worker", 0.05)
    pulse.tick()
    end = Ended()
    try:
        with watched([BarePart(pulse)], end=end):
            assert end.event.wait(20)
            assert end.codes == [ExitCode.FORCED]
    finally:
        released.set()
        watchdog.log.removeHandler(handler)


# --- real processes --------------------------------------------------------------------------------------------------


SHOP = """
import time
from pathlib import Path
from jobq import JobQ

jobs = JobQ()

@jobs.task
async def blocks() -> None:
    if not Path("was here").exists():
        Path("was here").touch()
        time.sleep(600)
    Path("done").touch()
"""

FROZEN_SOON = """
import os
from jobq.cli.logs import set_up
from jobq.cli.serving import end_with, serve_worker
from jobq.settings import WorkerSettings
from jobq.worker.worker import Worker
from shop import jobs

set_up("text", "info")
jobs.connect_to(database=os.environ["JOBQ_DATABASE_URL"], redis=os.environ["JOBQ_REDIS_URL"])
worker = Worker(jobs, WorkerSettings(frozen_after=1.0, beat=0.1))
end_with("asyncio", lambda: serve_worker(worker, None), worker)
"""


async def test_the_job_that_froze_a_worker_runs_again_elsewhere_and_counts_as_a_crash(
    tmp_path: Path, shared_database_url: str, redis_url: str
) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "frozen_soon.py").write_text(FROZEN_SOON)
    urls = {"JOBQ_DATABASE_URL": shared_database_url, "JOBQ_REDIS_URL": redis_url}
    db = await asyncpg.connect(shared_database_url)
    job_id = new_job_id()
    await db.execute("INSERT INTO jobq.outbox (id, queue, task, args) VALUES ($1, 'default', 'blocks', '{}')", job_id)

    with (
        started("relay", folder=tmp_path, **urls),
        started(folder=tmp_path, module="frozen_soon", **urls) as frozen,
    ):
        assert await frozen.ends() == ExitCode.FORCED
        assert "frozen: no turn was taken for too long, the process ends" in frozen.said
        assert "time.sleep(600)" in frozen.said
        with started("worker", "shop:jobs", "--lease", "1", folder=tmp_path, **urls) as heir:
            await until((tmp_path / "done").exists, "another worker ran the job", 30)
            assert "swept" in heir.said
    await db.close()


async def test_a_worker_answers_probes_from_its_start_to_its_end(
    tmp_path: Path, shared_database_url: str, redis_url: str
) -> None:
    (tmp_path / "shop.py").write_text(SHOP.replace("time.sleep(600)", "await __import__('asyncio').sleep(1)"))
    urls = {"JOBQ_DATABASE_URL": shared_database_url, "JOBQ_REDIS_URL": redis_url, "JOBQ_HEALTH": "127.0.0.1:0"}
    db = await asyncpg.connect(shared_database_url)
    with started("run", "shop:jobs", "--frozen-after", "60", folder=tmp_path, **urls) as process:
        await process.says("at=http://127.0.0.1:")
        port = int(process.said.partition("http://127.0.0.1:")[2].split(" ")[0])
        address = Address("127.0.0.1", port)
        await until(lambda: ask_now(address, "/readyz")[0] == 200, "relay and worker are ready", 20)
        _, document = ask_now(address, "/readyz")
        await db.execute(
            "INSERT INTO jobq.outbox (id, queue, task, args) VALUES ($1, 'default', 'blocks', '{}')", new_job_id()
        )
        await until((tmp_path / "was here").exists, "the job runs", 20)
        process.signal(signal.SIGTERM)
        await process.says("worker draining")
        alive, _ = ask_now(address, "/healthz")
        _, draining = ask_now(address, "/readyz")

        assert await process.ends() == ExitCode.OK
    await db.close()
    assert {check["name"].partition(".")[0] for check in document["checks"]} == {"worker", "relay"}
    assert alive == 200
    assert "worker.open" in draining["failing"]
