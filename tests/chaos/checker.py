"""The invariants I1 to I8, judged by what stands in the tables when all is over, and by reading Redis.

What producers believe is no truth: an order is committed if its row is there. Each check is one statement that finds
what breaks it, with the ids to look at; docs/reliability.md says them in words.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import asyncpg

from jobq.settings import CRASHES_BEFORE_ALONE
from tests.chaos import journal
from tests.chaos.faults import Strike
from tests.chaos.tables import INDEXES

SHOWN = 5
_NO_FAILURE = "('done', 'Snooze', 'CancelledError', 'HandBack', 'AlreadyDone')"
_IS_CRASH = "next_crashes = crashes + 1"
_IS_FAILURE = "next_attempts = attempts + 1"

CHECKS: dict[str, str] = {
    "I1 an order has exactly one effect": """
        SELECT o.id, o.job_id, o.kind, count(e.order_id) AS effects
        FROM chaos.orders AS o LEFT JOIN chaos.effect AS e ON e.order_id = o.id
        WHERE o.kind <> 'plain' GROUP BY o.id HAVING count(e.order_id) <> 1""",
    "I1 the job of an order ended exactly once": """
        SELECT o.id, o.job_id, o.kind, count(h.job_id) AS ends
        FROM chaos.orders AS o LEFT JOIN chaos.history AS h ON h.job_id = o.job_id AND h.next IS NULL
        GROUP BY o.id HAVING count(h.job_id) <> 1""",
    "I1 a job without effects was done": """
        SELECT o.id, o.job_id FROM chaos.orders AS o WHERE o.kind = 'plain' AND NOT EXISTS (
            SELECT FROM chaos.run AS r JOIN chaos.run_end AS e USING (name)
            WHERE r.job_id = o.job_id AND e.outcome = 'done')""",
    "I1 an effect carries the result that its step kept": """
        SELECT o.id, o.job_id, e.note FROM chaos.orders AS o JOIN chaos.effect AS e ON e.order_id = o.id
        WHERE o.kind = 'step' AND NOT EXISTS (
            SELECT FROM chaos.told AS t WHERE t.what = 'step ' || e.note AND t.order_id = o.job_id)""",
    "I1 no order is gone but those whose commit PostgreSQL lost": """
        SELECT t.order_id, t.at FROM chaos.told AS t WHERE t.what = 'kept'
        AND NOT EXISTS (SELECT FROM chaos.orders AS o WHERE o.id = t.order_id)
        AND NOT EXISTS (SELECT FROM chaos.rewound AS w WHERE t.at BETWEEN w.since AND w.until)""",
    "I2 nothing is there of an order that was rolled back": """
        SELECT t.order_id,
            EXISTS (SELECT FROM chaos.orders AS o WHERE o.id = t.order_id) AS row,
            EXISTS (SELECT FROM chaos.effect AS e WHERE e.order_id = t.order_id) AS effect,
            EXISTS (SELECT FROM chaos.run AS r WHERE r.order_id = t.order_id) AS run
        FROM chaos.told AS t WHERE t.what = 'back' AND (
            EXISTS (SELECT FROM chaos.orders AS o WHERE o.id = t.order_id)
            OR EXISTS (SELECT FROM chaos.effect AS e WHERE e.order_id = t.order_id)
            OR EXISTS (SELECT FROM chaos.run AS r WHERE r.order_id = t.order_id))""",
    "I2 no effect without an order": """
        SELECT e.order_id, e.job_id FROM chaos.effect AS e
        WHERE NOT EXISTS (SELECT FROM chaos.orders AS o WHERE o.id = e.order_id)""",
    "I2 no run without an order, but before PostgreSQL lost its commit": """
        SELECT r.order_id, r.job_id, r.generation, r.at FROM chaos.run AS r
        WHERE NOT EXISTS (SELECT FROM chaos.orders AS o WHERE o.id = r.order_id)
        AND NOT EXISTS (SELECT FROM chaos.rewound AS w WHERE r.at BETWEEN w.since AND w.until)""",
    "I3 no job is left": "SELECT id, generation, task, run_at, attempts, crashes FROM jobq.outbox",
    "I6 no generation ended twice": """
        SELECT job_id, generation, count(*) FROM chaos.history GROUP BY job_id, generation HAVING count(*) > 1""",
    "I6 generations grow by one, from the first": """
        SELECT job_id, min(generation), max(generation), count(*) FROM chaos.history GROUP BY job_id
        HAVING min(generation) <> 1 OR max(generation) <> count(*)
        OR bool_or(next IS NOT NULL AND next <> generation + 1)""",
    "I6 a generation ends in one failure, one crash, or neither": f"""
        SELECT job_id, generation, attempts, next_attempts, crashes, next_crashes FROM chaos.history
        WHERE next IS NOT NULL AND NOT (
            (next_attempts = attempts AND next_crashes = 0 AND crashes = 0)
            OR (next_attempts = attempts AND next_crashes = 0)
            OR ({_IS_FAILURE} AND next_crashes = 0)
            OR (next_attempts = attempts AND {_IS_CRASH}))""",
    "I6 who ended a generation had run it": """
        SELECT h.job_id, h.generation, h.by, h.at FROM chaos.history AS h
        WHERE h.by ~ '^jobq:w-[0-9a-f]+(:settle)?$' AND NOT EXISTS (
            SELECT FROM chaos.run AS r WHERE r.job_id = h.job_id AND r.generation = h.generation
            AND r.worker = split_part(h.by, ':', 2))""",
    "I6 an attempt was counted for a run that failed": f"""
        SELECT h.job_id, h.generation, h.by FROM chaos.history AS h WHERE {_IS_FAILURE} AND NOT EXISTS (
            SELECT FROM chaos.run AS r JOIN chaos.run_end AS e USING (name)
            WHERE r.job_id = h.job_id AND r.generation = h.generation AND e.outcome NOT IN {_NO_FAILURE})""",
    "I6 a run that failed was counted, or its worker died before": f"""
        SELECT r.job_id, r.generation, e.outcome, h.by FROM chaos.run AS r
        JOIN chaos.run_end AS e USING (name)
        JOIN chaos.history AS h ON h.job_id = r.job_id AND h.generation = r.generation
        WHERE e.outcome NOT IN {_NO_FAILURE} AND h.next_attempts = h.attempts AND NOT {_IS_CRASH}
        AND 1 = (SELECT count(*) FROM chaos.run AS o WHERE o.job_id = r.job_id AND o.generation = r.generation)""",
    "I6 a run was told the attempts of its generation": """
        SELECT r.job_id, r.generation, r.attempt, h.attempts FROM chaos.run AS r
        JOIN chaos.history AS h ON h.job_id = r.job_id AND h.generation = r.generation
        WHERE r.attempt <> h.attempts + 1
        AND NOT EXISTS (SELECT FROM chaos.rewound AS w WHERE r.at BETWEEN w.since AND w.until)""",
    "I6 a job failed as often as it was to, or more often where a store failed": """
        SELECT o.id, o.job_id, o.failures, h.attempts FROM chaos.orders AS o
        JOIN chaos.history AS h ON h.job_id = o.job_id AND h.next IS NULL
        WHERE o.kind <> 'doomed' AND h.attempts < o.failures""",
    "I6 a job that a killed worker held was counted as crashed, once": f"""
        SELECT w.job_id, w.generation, w.worker, h.by, h.next FROM chaos.orphan AS w
        LEFT JOIN chaos.history AS h ON h.job_id = w.job_id AND h.generation = w.generation
        WHERE h.job_id IS NULL OR NOT (coalesce({_IS_CRASH}, false)
            OR h.by LIKE 'jobq:' || w.worker || '%' OR h.at < to_timestamp(w.killed_at))""",
    "I6 the dead are those that were to die": """
        SELECT d.id, d.reason, d.attempts, d.crashes, o.kind, o.failures FROM jobq.dead AS d
        LEFT JOIN chaos.orders AS o ON o.job_id = d.id
        WHERE NOT coalesce(CASE d.reason
            WHEN 'exhausted' THEN o.kind = 'doomed' AND d.attempts = o.failures
            WHEN 'rejected' THEN o.kind = 'doomed' AND d.attempts = o.failures
            WHEN 'poison' THEN o.kind = 'die' AND d.crashes = 3 END, false)""",
    "I8 no run began when the end of its job could be seen": """
        SELECT name, job_id, generation, at, worker, seen FROM chaos.run WHERE seen <> 'due'""",
}

_DUPLICATES = f"""
    WITH ranked AS (
        SELECT *, row_number() OVER (PARTITION BY job_id, generation ORDER BY at) AS n FROM chaos.run
    )
    SELECT coalesce((
        SELECT w.since FROM chaos.run AS before JOIN chaos.rewound AS w ON before.at BETWEEN w.since AND w.until
        WHERE before.job_id = r.job_id AND before.generation = r.generation AND before.name <> r.name LIMIT 1
    ), r.at) AS caused, r.job_id, r.generation, r.worker, r.at
    FROM ranked AS r
    WHERE n > 1 OR EXISTS (
        SELECT FROM chaos.history AS h JOIN chaos.run AS before USING (job_id, generation)
        WHERE h.job_id = r.job_id AND h.next = r.generation AND {_IS_CRASH})
    ORDER BY caused"""
"""A run of a generation that had one already, or of one that began because a run's worker died. Where PostgreSQL lost
what the first of them did, that was the cause, however late the second comes."""

_LOST = """
    SELECT count(*) FROM chaos.told AS t
    WHERE t.what = 'kept' AND NOT EXISTS (SELECT FROM chaos.orders AS o WHERE o.id = t.order_id)"""
_REPEATABLE = "SELECT count(DISTINCT (job_id, generation)) FROM chaos.run WHERE at BETWEEN $1 AND $2"
_CRASHES = f"SELECT extract(epoch FROM at), job_id, generation FROM chaos.history WHERE {_IS_CRASH} ORDER BY at"
_ENDS = "SELECT extract(epoch FROM at) FROM chaos.history WHERE next IS NULL ORDER BY at"
_RESTARTS = f"""
    SELECT min(r.at) - min(w.killed_at) FROM chaos.orphan AS w
    JOIN chaos.history AS h ON h.job_id = w.job_id AND h.generation = w.generation AND {_IS_CRASH}
        AND h.next_crashes < {CRASHES_BEFORE_ALONE}
    JOIN chaos.run AS r ON r.job_id = w.job_id AND r.generation = h.next
    GROUP BY w.job_id, w.generation, w.worker ORDER BY 1"""
"""Without those that have to run alone, and wait for that, and those whose next worker died before they began."""


@dataclass
class Window:
    """The time from one fault, or two of them, to the next."""

    faults: tuple[str, ...]
    since: float
    strike: Strike
    recovery_s: float = 0.0
    repeatable: int = 0
    """Generations that ran while PostgreSQL answered with commits that it then lost: each may have to run again."""
    jobs: int = 0
    duplicates: list[tuple[Any, ...]] = field(default_factory=list)
    crashes: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def bound(self) -> int:
        """Duplicate runs that are allowed."""
        return self.strike.bound + self.repeatable


@dataclass
class Findings:
    """What the checker found."""

    broken: dict[str, list[str]] = field(default_factory=dict)
    """What breaks each invariant."""
    restarts_s: list[float] = field(default_factory=list)
    """From the SIGKILL of a worker to the next run of each job that it held."""
    jobs: int = 0
    runs: int = 0
    duplicates: int = 0
    lost: int = 0
    """Orders whose COMMIT was answered and that PostgreSQL then lost."""

    def add(self, invariant: str, *lines: str) -> None:
        if lines:
            self.broken.setdefault(invariant, []).extend(lines)


async def load(connection: asyncpg.Connection, folder: Path, windows: Sequence[Window]) -> None:
    """Bring the journals into the tables, once nobody writes to them any more."""
    await connection.execute(
        "CREATE TABLE chaos.orphan (job_id uuid, generation int, worker text, killed_at double precision);"
        "CREATE TABLE chaos.rewound (since double precision, until double precision)"
    )
    deaths = [death for window in windows for death in window.strike.deaths]
    tables: dict[str, Iterable[tuple[Any, ...]]] = {
        "run": (
            (name, at, worker, job, order, task, int(generation), int(attempt), seen)
            for at, (name, worker, job, order, task, generation, attempt, seen) in _lines(folder, "run", "start")
        ),
        "run_end": ((name, at, outcome) for at, (name, outcome) in _lines(folder, "run", "end")),
        "told": (
            *((job, f"step {name}", at) for at, (name, job) in _lines(folder, "run", "step")),
            *((order, what, at) for what in ("kept", "back") for at, (order,) in _lines(folder, "order", what)),
        ),
        "orphan": ((*key, death.worker, death.at) for death in deaths for key in death.orphans),
        "rewound": (times for window in windows for times in window.strike.rewound),
    }
    for table, records in tables.items():
        await connection.copy_records_to_table(table, schema_name="chaos", records=records)
    await connection.execute(INDEXES)


def _lines(folder: Path, kind: str, what: str) -> Iterator[tuple[float, list[str]]]:
    """The lines of the journals that tell of one thing."""
    return ((at, words) for _, at, (first, *words) in journal.read(folder, kind) if first == what)


async def check(connection: asyncpg.Connection, windows: Sequence[Window]) -> Findings:
    """Judge by the tables."""
    found = Findings()
    for name, query in CHECKS.items():
        found.add(name, *[_shown(row) for row in await connection.fetch(f"{query} LIMIT {SHOWN}")])
    found.jobs = await connection.fetchval("SELECT count(*) FROM chaos.history WHERE next IS NULL")
    found.runs = await connection.fetchval("SELECT count(*) FROM chaos.run")
    found.lost = await connection.fetchval(_LOST)
    found.restarts_s = [row[0] for row in await connection.fetch(_RESTARTS)]
    for row in await connection.fetch(_DUPLICATES):
        _window(windows, row[0]).duplicates.append(tuple(row))
        found.duplicates += 1
    for row in await connection.fetch(_CRASHES):
        _window(windows, float(row[0])).crashes.append(tuple(row))
    for row in await connection.fetch(_ENDS):
        _window(windows, float(row[0])).jobs += 1
    for window in windows:
        window.repeatable = sum([await connection.fetchval(_REPEATABLE, *times) for times in window.strike.rewound])
        _judge(found, window)
    return found


def _judge(found: Findings, window: Window) -> None:
    strike, where = window.strike, f"{' + '.join(window.faults)} at {window.since:.3f}"
    if len(window.duplicates) > window.bound:
        found.add(
            "I5 duplicate runs stay under the bound of the fault",
            f"{where}: {len(window.duplicates)} duplicate runs, {window.bound} allowed",
            *[str(row) for row in window.duplicates[:SHOWN]],
        )
    if len(window.crashes) > strike.crashes:
        found.add(
            "I6 a crash is counted only for what a dead worker held",
            f"{where}: {len(window.crashes)} crashes counted, {strike.crashes} allowed",
            *[str(row) for row in window.crashes[:SHOWN]],
        )


def _window(windows: Sequence[Window], at: float) -> Window:
    return windows[max(0, bisect_right(windows, at, key=attrgetter("since")) - 1)]


def _shown(row: asyncpg.Record) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())
