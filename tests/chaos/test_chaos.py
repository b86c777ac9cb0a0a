"""A short run of the harness, and that its checker sees what it is there to see."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from tests.chaos import checker
from tests.chaos.checker import Findings, Window
from tests.chaos.faults import FAULTS, Death, Strike
from tests.chaos.processes import Process
from tests.chaos.report import INVARIANTS, MARKS
from tests.chaos.samples import EVERY_S, SLACK, WARM_S, Sampler
from tests.chaos.schedule import Schedule
from tests.chaos.tables import TABLES

ROOT = Path(__file__).parents[2]
ROUND = (
    "kill_in_complete,stop_worker,terminate_worker,killer_job,kill_leader,flushall,kill_redis,rewind_redis,fill_redis,"
    "client_kill,crash_postgres"
)
RUN = ["--rounds", "1", "--seed", "3", "--lease", "4", "--rate", "60", "--faults", ROUND]
A = UUID(int=1)
JOB = UUID(int=11)


@pytest.mark.timeout(900)
async def test_nothing_is_lost_and_nothing_happens_twice_while_everything_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.chaos", *RUN]
    run = Process("chaos", command, {**os.environ, "PYTHONPATH": str(ROOT)}, tmp_path / "log")

    try:
        code = await run.ends(deadline=850)
    finally:
        run.kill()

    assert code == 0, run.said()
    assert [number for number in INVARIANTS if f"{number} holds" not in run.said()] == []


def test_the_same_seed_makes_the_same_schedule() -> None:
    def drawn(seed: int) -> list[tuple[tuple[str, ...], float, float]]:
        schedule = Schedule(seed, ["one", "two", "three"], rounds=5)
        return [(names, pause_s, choose.random()) for names, pause_s, choose in schedule]

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)
    assert sorted(name for names, _, _ in drawn(7) for name in names) == sorted(["one", "two", "three"] * 5)


def test_every_fault_leaves_the_draws_of_the_next_alone() -> None:
    drawn = []
    for draws in (0, 3):
        for _, _, choose in Schedule(7, ["one", "two"], rounds=1):
            drawn.append(choose.random())
            for _ in range(draws):
                choose.random()

    assert drawn[: len(drawn) // 2] == drawn[len(drawn) // 2 :]


def test_the_page_names_every_fault_with_its_bound_and_every_check() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    faults = [f"| {fault.about} | {fault.bound} |" for fault in FAULTS.values()]
    checks = [f"- {name}" for name in PLANTED if not name.startswith("I5")]

    assert [line for line in (*faults, *checks, *MARKS["run"], *MARKS["soak"]) if f"{line}\n" not in page] == []


@pytest.mark.parametrize("figure", SLACK)
def test_a_soak_sees_a_figure_that_grows_and_passes_one_that_breathes(figure: str, tmp_path: Path) -> None:
    def is_flat(value_at: Callable[[int], float], samples: int = 100) -> list[bool]:
        sampler = Sampler(tmp_path)
        for number in range(samples):
            sampler._figures["worker-1", figure].append((number * EVERY_S, value_at(number)))
        return [one.is_flat for one in sampler.growth()]

    assert is_flat(lambda number: 40.0 + number % 3) == [True]
    assert is_flat(lambda number: 40.0 + number / 3) == [False]
    assert is_flat(lambda number: 40.0, samples=int(WARM_S / EVERY_S)) == []


# --- the checker -----------------------------------------------------------------------------------------------------

ORDER = f"INSERT INTO chaos.orders VALUES ('{A}', '{{kind}}', '{JOB}', {{failures}})"
EFFECT = f"INSERT INTO chaos.effect VALUES ('{A}', '{JOB}', 1)"
STARTED = f"INSERT INTO chaos.run VALUES ('{{name}}', {{at}}, 'w-1', '{JOB}', '{A}', 'book', {{generation}}, 1, 'due')"
ENDED = "INSERT INTO chaos.run_end VALUES ('{name}', {at}, '{outcome}')"
WENT = f"INSERT INTO chaos.history VALUES ('{JOB}', {{generation}}, {{next}}, {{attempts}}, {{crashes}}, 'jobq:w-1')"


def order(kind: str = "book", failures: int = 0) -> str:
    return ORDER.format(kind=kind, failures=failures)


def run(name: str = "r1", *, generation: int = 1, at: int = 100, outcome: str | None = "done") -> str:
    ended = "" if outcome is None else ";" + ENDED.format(name=name, at=at, outcome=outcome)
    return STARTED.format(name=name, at=at, generation=generation) + ended


def went(generation: int = 1, *, attempts: str = "0, 0", crashes: str = "0, 0") -> str:
    return WENT.format(generation=generation, next=generation + 1, attempts=attempts, crashes=crashes)


def done(generation: int = 1, *, attempts: int = 0, crashes: int = 0) -> str:
    counted = {"attempts": f"{attempts}, NULL", "crashes": f"{crashes}, NULL"}
    return WENT.format(generation=generation, next="NULL", **counted)


DEAD = (
    "INSERT INTO jobq.dead (id, generation, queue, task, args, priority, attempts, crashes, created_at, reason)"
    f" VALUES ('{JOB}', 1, 'desk', 'book', '{{}}', 2, 0, 3, now(), 'poison')"
)
LEFT = f"INSERT INTO jobq.outbox (id, queue, task, args) VALUES ('{JOB}', 'desk', 'book', '{{}}')"
TOLD = f"INSERT INTO chaos.told VALUES ('{A}', '{{}}', 100)"
FINE = [order(), EFFECT, run(), done()]

PLANTED = {
    "I1 an order has exactly one effect": [*FINE, EFFECT],
    "I1 the job of an order ended exactly once": [order(), EFFECT],
    "I1 a job without effects was done": [order("plain"), run(outcome="HandBack"), done()],
    "I1 an effect carries the result that its step kept": [order("step"), EFFECT, run(), done()],
    "I1 no order is gone but those whose commit PostgreSQL lost": [TOLD.format("kept")],
    "I2 nothing is there of an order that was rolled back": [*FINE, TOLD.format("back")],
    "I2 no effect without an order": [EFFECT],
    "I2 no run without an order, but before PostgreSQL lost its commit": [run()],
    "I3 no job is left": [LEFT],
    "I6 no generation ended twice": [order(), EFFECT, run(), went(), went(), run("r2", generation=2), done(2)],
    "I6 generations grow by one, from the first": [order(), EFFECT, run(generation=2), done(2)],
    "I6 a generation ends in one failure, one crash, or neither": [
        order(), EFFECT, run(outcome="Snooze"), went(attempts="0, 2"), run("r2", generation=2), done(2),
    ],
    "I6 who ended a generation had run it": [order(), EFFECT, done()],
    "I6 an attempt was counted for a run that failed": [
        order(), EFFECT, run(outcome="Snooze"), went(attempts="0, 1"), run("r2", generation=2), done(2),
    ],
    "I6 a run that failed was counted, or its worker died before": [
        order(), EFFECT, run(outcome="RuntimeError"), went(), run("r2", generation=2), done(2),
    ],
    "I6 a run was told the attempts of its generation": [order(), EFFECT, run(), done(attempts=1)],
    "I6 a job failed as often as it was to, or more often where a store failed": [
        order(failures=1), EFFECT, run(), done(),
    ],
    "I6 a job that a killed worker held was counted as crashed, once": [
        order(), EFFECT, run(outcome=None), went(), run("r2", generation=2), done(2),
    ],
    "I6 the dead are those that were to die": [*FINE, DEAD],
    "I8 no run began when the end of its job could be seen": [*FINE, "UPDATE chaos.run SET seen = 'over'"],
    "I5 duplicate runs stay under the bound of the fault": [*FINE, run("r2")],
    "I6 a crash is counted only for what a dead worker held": [
        order(), EFFECT, run(), went(crashes="0, 1"), run("r2", generation=2), done(2, crashes=1),
    ],
}  # fmt: skip


def test_every_check_has_something_planted_for_it() -> None:
    assert checker.CHECKS.keys() - PLANTED.keys() == set()


async def test_the_checker_finds_nothing_where_all_is_well(database_url: str, tmp_path: Path) -> None:
    found = await judged(database_url, tmp_path, FINE)

    assert found.broken == {}


@pytest.mark.parametrize("invariant", PLANTED)
async def test_the_checker_finds(invariant: str, database_url: str, tmp_path: Path) -> None:
    found = await judged(database_url, tmp_path, PLANTED[invariant])

    assert invariant in found.broken


@pytest.mark.parametrize(
    ("ats", "is_allowed"), [((105,), True), ((200,), True), ((200, 300), False), ((105, 200), False)]
)
async def test_a_run_may_be_repeated_once_whose_end_postgresql_lost(
    ats: tuple[int, ...], is_allowed: bool, database_url: str, tmp_path: Path
) -> None:
    again = [run(f"r{at}", at=at) for at in ats]

    found = await judged(database_url, tmp_path, [*FINE, *again], rewound=[(90.0, 110.0)])

    assert ("I5 duplicate runs stay under the bound of the fault" in found.broken) is not is_allowed


async def judged(
    url: str, folder: Path, planted: list[str], *, rewound: Sequence[tuple[float, float]] = ()
) -> Findings:
    """Look at what was planted, with one window in which a worker was killed that held the job."""
    dead = Death("w-2", 50.0, [(JOB, 1)], [(JOB, 1)] if went() in planted else [])
    windows = [Window(("kill_worker",), 0.0, Strike(bound=0, deaths=[dead], rewound=list(rewound)))]
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(TABLES)
        for statement in planted:
            await connection.execute(statement)
        await checker.load(connection, folder, windows)
        return await checker.check(connection, windows)
    finally:
        await connection.close()
