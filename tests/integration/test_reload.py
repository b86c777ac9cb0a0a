"""One process after another, as `jobq dev` runs them: real small scripts, and files that really change."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from jobq.cli.processes import reload
from jobq.cli.processes.children import environment
from jobq.cli.processes.reload import Session
from tests.waiting import until

SCRIPT = """
import os, signal, socket, sys, time
from pathlib import Path
line = socket.socket(fileno=int(os.environ["JOBQ_SUPERVISOR_FD"]))
with open("started", "a") as started:
    started.write("x")
nth = len(Path("started").read_text())
"""
SERVES = "line.send(b'r'); line.recv(1)"
Run = Callable[..., AbstractAsyncContextManager[tuple[Session, "asyncio.Task[int]"]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a session of scripts in an own folder, whose Python files are watched; it is ended with the block."""
    monkeypatch.chdir(tmp_path)

    @asynccontextmanager
    async def running(script: str, *, watched: bool = True) -> AsyncIterator[tuple[Session, asyncio.Task[int]]]:
        command = [sys.executable, "-I", "-S", "-c", SCRIPT + script]
        session = Session(command, environment(), [tmp_path] if watched else [], grace_s=0)
        task = asyncio.create_task(session.run())
        try:
            yield session, task
        finally:
            session.stop()
            session.stop()
            await asyncio.wait_for(task, 20)

    return running


def starts() -> int:
    started = Path("started")
    return len(started.read_text()) if started.exists() else 0


async def has_started(times: int) -> None:
    await until(lambda: starts() >= times, f"it has started {times} times", 20)


def write(name: str) -> None:
    Path(name).write_text("x = 1")


async def test_a_change_of_a_python_file_starts_a_new_process_and_others_do_not(run: Run, caplog) -> None:
    caplog.set_level(logging.INFO)
    async with run(SERVES) as (session, task):
        await has_started(1)
        write("notes.txt")
        write("code.py")
        await has_started(2)
        session.stop()

        assert await task == 0
    (line,) = [record for record in caplog.records if record.message == "the code has changed, starting again"]
    assert line.fields == {"files": ["code.py"]}  # type: ignore[attr-defined]
    assert starts() == 2
    assert "process ended, waiting for a change" not in caplog.messages


async def test_a_process_that_ends_by_itself_waits_for_a_change(run: Run, caplog) -> None:
    async with run("nth == 1 and sys.exit(3); " + SERVES) as (session, task):
        await until(lambda: "process ended, waiting for a change" in caplog.messages, "it has ended", 20)
        assert starts() == 1
        write("code.py")
        await has_started(2)
        session.stop()

        assert await task == 0


async def test_a_session_can_end_while_it_waits_for_a_change(run: Run, caplog) -> None:
    async with run("sys.exit(3)") as (session, task):
        await until(lambda: "process ended, waiting for a change" in caplog.messages, "it has ended", 20)
        session.stop()

        assert await asyncio.wait_for(asyncio.shield(task), 20) == 0


async def test_without_reload_the_code_of_the_process_is_that_of_all(run: Run) -> None:
    async with run("sys.exit(3)", watched=False) as (_, task):
        assert await asyncio.wait_for(asyncio.shield(task), 20) == 3


async def test_a_process_that_recycles_is_started_again_without_a_change(run: Run) -> None:
    async with run("nth == 1 and (line.send(b'rc'), sys.exit(0)); " + SERVES):
        await has_started(2)


async def test_a_process_that_does_not_stop_is_killed(run: Run, caplog, monkeypatch) -> None:
    monkeypatch.setattr(reload, "_END_S", 0.05)
    async with run("signal.signal(15, signal.SIG_IGN); line.send(b'r'); time.sleep(600)"):
        await has_started(1)
        write("code.py")
        await has_started(2)
    assert "process killed, since it did not stop: its jobs run again when its lease is over" in caplog.messages


async def test_a_second_stop_ends_it_at_once(run: Run) -> None:
    async with run("signal.signal(15, signal.SIG_IGN); line.send(b'r'); time.sleep(600)") as (session, task):
        await has_started(1)
        session.stop()
        await asyncio.sleep(0)
        assert not session.is_in_a_hurry
        session.stop()

        assert await asyncio.wait_for(asyncio.shield(task), 20) == 0
        assert session.is_in_a_hurry
