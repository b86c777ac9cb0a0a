"""`jobq worker --processes`: a real supervisor over real workers, which are killed, recycled and told to end."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobq.cli.failures import ExitCode
from tests.builders import Bench
from tests.commands import Process
from tests.commands import started as command
from tests.faults import app as faults
from tests.faults.test_processes import ROOT, drained, has_run, open_gate, runs
from tests.waiting import until


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        await bench.db.execute(faults.TABLES)
        yield bench


class Supervised:
    """A supervisor, and the processes that its log tells of."""

    def __init__(self, process: Process):
        self.process = process

    def pids(self, phrase: str) -> list[int]:
        """The processes whose own lines, or the supervisor's, say this."""
        return [
            int(pid)
            for line in self.process.said.splitlines()
            if phrase in line
            for pid in re.findall(r"process=(\d+)", line) or re.findall(r"\[(\d+)\]", line)
        ]

    async def serve(self, times: int) -> list[int]:
        """Wait until so many have become ready."""
        await self.process.says("worker ready", times=times)
        return self.pids("worker ready")


@pytest.fixture
def start(tmp_path: Path, shared_database_url: str, redis_url: str) -> Iterator[object]:
    urls = {"PYTHONPATH": str(ROOT), "JOBQ_DATABASE_URL": shared_database_url, "JOBQ_REDIS_URL": redis_url}
    timing = ["--lease", "1", "--beat", "0.1"]
    made: list[Supervised] = []
    with ExitStack() as stack:

        def make(*options: str, **env: str) -> Supervised:
            arguments = ["worker", "tests.faults.app:jobs", *timing, *options]
            made.append(Supervised(stack.enter_context(command(*arguments, folder=tmp_path, **urls, **env))))
            return made[-1]

        yield make
    for pid in [pid for supervised in made for pid in supervised.pids("process started")]:
        end_at_once(pid)


def end_at_once(pid: int) -> None:
    """Kill a process of this test that may have ended."""
    if is_alive(pid) and b"tests.faults.app:jobs" in Path(f"/proc/{pid}/cmdline").read_bytes():
        os.kill(pid, signal.SIGKILL)


def loaded_libraries(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_killed_process_is_replaced_its_jobs_run_again_and_signals_reach_all(bench: Bench, start) -> None:
    supervised = start("--processes", "2", "-c", "1")
    await supervised.serve(2)
    job_id = await bench.commit_and_relay(faults.book, "gate")
    await has_run(bench, job_id)

    os.kill(await bench.db.fetchval("SELECT pid FROM run"), signal.SIGKILL)
    await supervised.process.says("process died, starting another")
    assert "signal=SIGKILL" in supervised.process.said
    await supervised.serve(3)
    await has_run(bench, job_id, 2)
    supervised.process.signal(signal.SIGTSTP)
    await supervised.process.says("worker quiet", times=2)
    supervised.process.signal(signal.SIGTERM)
    await supervised.process.says("worker draining", times=2)
    os.kill(await bench.db.fetchval("SELECT pid FROM run ORDER BY ctid DESC"), signal.SIGTERM)  # as systemd would
    await open_gate(bench)

    assert await supervised.process.ends() == 0
    assert await bench.effects(job_id) == 1
    assert await bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0
    assert await bench.keys_left() == set()


async def test_the_processes_of_a_killed_supervisor_end_their_jobs_and_themselves(bench: Bench, start) -> None:
    supervised = start("--processes", "2")
    pids = await supervised.serve(2)
    assert "asyncpg" in loaded_libraries(pids[0])
    assert "asyncpg" not in loaded_libraries(supervised.pids("supervisor starts")[0]), "it is light"
    job_id = await bench.commit_and_relay(faults.book, "gate")
    await has_run(bench, job_id)

    supervised.process.signal(signal.SIGKILL)
    await until(lambda: supervised.process.said.count("the supervisor is gone") == 2, "both have noticed")
    await open_gate(bench)

    await until(lambda: not any(map(is_alive, pids)), "both have ended", 20)
    assert await bench.effects(job_id) == 1
    assert await runs(bench, job_id) == 1
    assert await bench.keys_left() == set()


async def test_recycled_processes_lose_and_interrupt_no_job(bench: Bench, start) -> None:
    supervised = start("--processes", "1", "--max-jobs", "2", "-c", "2")
    await supervised.serve(1)
    long = await bench.commit_and_relay(faults.plain, "gate")
    short = [await bench.commit_and_relay(faults.plain, "open")]
    await has_run(bench, long)
    await open_gate(bench, "open")

    await supervised.process.says("worker recycles")
    short += [await bench.commit_and_relay(faults.plain, "open")]
    await supervised.serve(2)
    await has_run(bench, short[-1])
    assert await bench.row(long) is not None
    await open_gate(bench)
    await drained(bench)
    await supervised.process.says("process has ended")
    supervised.process.signal(signal.SIGTERM)

    assert await supervised.process.ends() == 0
    assert [await runs(bench, job_id) for job_id in [long, *short]] == [1, 1, 1]
    assert len(await bench.db.fetch("SELECT DISTINCT pid FROM run")) == 2
    assert await bench.keys_left() == set()


async def test_what_keeps_one_process_from_starting_is_said_once_and_ends_all(start) -> None:
    supervised = start("--processes", "3", "--redis-url", "redis://127.0.0.1:1/0")

    assert await supervised.process.ends() == ExitCode.UNREACHABLE
    assert supervised.process.said.count("cannot reach Redis at redis://127.0.0.1:1/0") == 1
