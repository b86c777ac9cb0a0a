"""The supervisor, stepped by hand, over real processes: small scripts that say on their line what a worker would."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobq.cli.failures import ExitCode
from jobq.cli.processes import supervisor as supervisor_module
from jobq.cli.processes.children import Child
from jobq.cli.processes.supervisor import Supervisor
from tests.waiting import until

SCRIPT = """
import os, signal, socket, sys, time
from pathlib import Path
line = socket.socket(fileno=int(os.environ["JOBQ_SUPERVISOR_FD"]))
folder = Path(sys.argv[1])
nth = len(list(folder.glob("started-*")))
(folder / f"started-{nth}").touch()

def hears(order):
    while True:
        heard = line.recv(1)
        with (folder / f"heard-{nth}").open("ab") as said:
            said.write(heard)
        if heard in (order, b""):
            return

"""
SERVES = "line.send(b'r'); hears(b's')"
Start = Callable[..., Supervisor]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Make a supervisor of scripts: SCRIPT and what the test adds. What still lives is killed with the test."""
    made: list[Supervisor] = []

    def make(script: str, count: int = 1) -> Supervisor:
        command = [sys.executable, "-I", "-S", "-c", SCRIPT + script, str(tmp_path)]
        made.append(Supervisor(command, count))
        return made[-1]

    yield make
    for child in [child for supervisor in made for child in supervisor.children]:
        child.kill()
        child.forget()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[dict[str, object]]]:
    """The fields of every line logged with a phrase."""
    caplog.set_level(logging.INFO)
    return lambda phrase: [record.fields for record in caplog.records if record.message == phrase]  # type: ignore[attr-defined]


def starts(folder: Path) -> int:
    return len(list(folder.glob("started-*")))


def heard(folder: Path, nth: int) -> str:
    """The orders that a process has read."""
    return (folder / f"heard-{nth}").read_text()


async def stepped(supervisor: Supervisor, condition: Callable[[], object], message: str) -> None:
    def step() -> object:
        supervisor.step()
        return condition()

    await until(step, message, 20)


async def serve(supervisor: Supervisor, count: int) -> list[Child]:
    """Step until so many processes serve."""

    def serving() -> bool:
        return len([child for child in supervisor.children if child.is_ready]) == count

    await stepped(supervisor, serving, f"{count} processes serve")
    return list(supervisor.children)


async def ended(supervisor: Supervisor) -> int:
    await stepped(supervisor, lambda: supervisor.code is not None, "all has ended")
    assert supervisor.code is not None
    return supervisor.code


# --- start


async def test_one_process_starts_alone_and_its_failure_is_that_of_all(start: Start, tmp_path: Path, lines) -> None:
    supervisor = start("sys.exit(4)", count=3)

    assert await ended(supervisor) == ExitCode.UNREACHABLE
    assert starts(tmp_path) == 1
    assert len(lines("process cannot serve, so all stop")) == 1


async def test_the_others_start_once_the_first_serves(start: Start, tmp_path: Path) -> None:
    supervisor = start("nth or hears(b'q'); " + SERVES, count=3)
    supervisor.step()
    await until(lambda: (tmp_path / "started-0").exists(), "the first has started")
    supervisor.step()
    assert len(list(supervisor.children)) == 1

    next(supervisor.children).order(b"q")

    assert len({child.pid for child in await serve(supervisor, 3)}) == 3


async def test_a_program_that_cannot_be_started_is_tried_again(
    start: Start, tmp_path: Path, monkeypatch, lines
) -> None:
    monkeypatch.setattr(supervisor_module, "_FIRST_DELAY_S", 0.01)
    program = tmp_path / "program"
    supervisor = Supervisor([str(program), "-I", "-S", "-c", SCRIPT + SERVES, str(tmp_path)], 1)
    supervisor.step()
    assert len(lines("process could not be started, trying again")) == 1

    program.symlink_to(sys.executable)
    await serve(supervisor, 1)
    supervisor.tell(signal.SIGTERM)

    assert await ended(supervisor) == ExitCode.OK


# --- restart


async def test_a_process_that_keeps_dying_is_started_again_ever_later(start: Start, monkeypatch, lines) -> None:
    monkeypatch.setattr(supervisor_module, "_FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(supervisor_module, "_LONGEST_DELAY_S", 0.05)
    supervisor = start("line.send(b'r'); os.kill(os.getpid(), signal.SIGKILL) if nth else sys.exit(1)")

    died = "process died, starting another"
    await stepped(supervisor, lambda: len(lines(died)) == 5, "it has died five times")

    assert [fields["next_in_s"] for fields in lines(died)] == [0.01, 0.02, 0.04, 0.05, 0.05]
    assert [fields.get("code", fields.get("signal")) for fields in lines(died)] == [1, *["SIGKILL"] * 4]


async def test_a_life_of_a_minute_makes_up_for_earlier_deaths(start: Start, monkeypatch, lines) -> None:
    monkeypatch.setattr(supervisor_module, "_FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(supervisor_module, "_FORGIVEN_AFTER_S", 0.0)
    supervisor = start("line.send(b'r'); sys.exit(1)")

    died = "process died, starting another"
    await stepped(supervisor, lambda: len(lines(died)) == 3, "it has died three times")

    assert [fields["next_in_s"] for fields in lines(died)] == [0.01] * 3


async def test_a_process_that_was_ended_in_order_is_replaced_at_once(start: Start) -> None:
    supervisor = start("line.send(b'r'); hears(b's') if nth else hears(b'q')")
    (first,) = await serve(supervisor, 1)

    first.order(b"q")
    await stepped(supervisor, lambda: first not in supervisor.children, "the first has ended")

    (second,) = supervisor.children
    assert second is not first


async def test_a_process_that_finds_other_tables_ends_all_in_order(start: Start, tmp_path: Path) -> None:
    supervisor = start("nth or (" + SERVES.replace(";", ",") + ", sys.exit(0)); hears(b'q'); sys.exit(5)", count=2)
    _, second = await stepped_to(supervisor, 2)

    second.order(b"q")

    assert await ended(supervisor) == ExitCode.SCHEMA
    assert heard(tmp_path, 0) == "s"


async def stepped_to(supervisor: Supervisor, count: int) -> list[Child]:
    await stepped(supervisor, lambda: len(list(supervisor.children)) == count, f"{count} processes have started")
    return list(supervisor.children)


# --- recycling


async def test_another_serves_while_one_recycles_but_a_third_waits_for_its_end(start: Start) -> None:
    supervisor = start("line.send(b'r'); hears(b'q'); line.send(b'c'); hears(b'e')")
    (first,) = await serve(supervisor, 1)

    first.order(b"q")
    _, second = await serve(supervisor, 2)
    second.order(b"q")
    await stepped(supervisor, lambda: second.is_recycling, "the second recycles")
    supervisor.step()

    assert list(supervisor.children) == [first, second]
    first.order(b"e")
    await stepped(supervisor, lambda: first not in supervisor.children, "the first has ended")
    await serve(supervisor, 2)
    assert second in supervisor.children


# --- orders


async def test_tstp_makes_all_quiet_and_nothing_starts_again(start: Start, tmp_path: Path, lines) -> None:
    supervisor = start("line.send(b'r'); hears(b'q'); sys.exit(nth)", count=2)
    await serve(supervisor, 2)

    supervisor.tell(signal.SIGTSTP)
    await stepped(supervisor, lambda: not list(supervisor.children), "both have ended")
    supervisor.step()

    assert [heard(tmp_path, nth) for nth in (0, 1)] == ["q", "q"]
    assert supervisor.code is None
    assert starts(tmp_path) == 2
    assert [fields["code"] for fields in lines("process died, and none starts while quiet")] == [1]
    supervisor.tell(signal.SIGTERM)
    assert await ended(supervisor) == ExitCode.OK


async def test_the_worst_of_the_codes_is_that_of_all(start: Start) -> None:
    supervisor = start(SERVES + "; sys.exit(6 if nth == 1 else 0)", count=3)
    await serve(supervisor, 3)

    supervisor.tell(signal.SIGTERM)

    assert await ended(supervisor) == ExitCode.FORCED


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.FORCED)])
async def test_a_second_signal_hurries_and_a_third_kills(
    start: Start, tmp_path: Path, number, code, lines, caplog
) -> None:
    supervisor = start("line.send(b'r'); hears(b'h'); nth or sys.exit(0); time.sleep(600)", count=2)
    first, second = await serve(supervisor, 2)

    supervisor.tell(number)
    supervisor.step()
    assert {first, second} == set(supervisor.children)
    supervisor.tell(number)
    await stepped(supervisor, lambda: first not in supervisor.children, "the first has ended")
    assert heard(tmp_path, 0) == "sh"
    supervisor.tell(number)

    assert await ended(supervisor) == max(code, 128 + signal.SIGKILL)
    assert [fields.get("signal") for fields in lines("process stopped")] == [None, "SIGKILL"]
    assert caplog.messages.count("supervisor has everything handed back at once") == 1
    assert lines("supervisor kills what still runs") == [{"processes": 1}]


async def test_a_process_that_does_not_serve_yet_is_ended_with_the_others(start: Start, tmp_path: Path) -> None:
    supervisor = start("time.sleep(600)")
    supervisor.step()
    await until(lambda: (tmp_path / "started-0").exists(), "it has started")

    supervisor.tell(signal.SIGTERM)

    assert await ended(supervisor) == ExitCode.OK
