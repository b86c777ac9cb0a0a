"""Whoever may enqueue writes what they like into the columns that are theirs: nobody else's job waits for it.

What the table does not refuse becomes dead as `invalid`, is parked, or is simply a job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from jobq import Context, RetryPolicy
from jobq.settings import WorkerSettings
from jobq.worker.worker import Worker
from tests.builders import Bench, running, write_effect
from tests.commands import Commands
from tests.faults.leading import leading
from tests.roles import roles_of
from tests.secrets import ARGUMENT
from tests.waiting import until

DEEP = "[" * 3_000 + "]" * 3_000

INVALID: dict[str, dict[str, Any]] = {
    "deep": {"args": f'{{"number": {DEEP}}}'},
    "huge": {"args": '{"number": "%s"}' % ("x" * 1_000_000)},
    "long": {"args": '{"number": 1%s}' % ("0" * 5_000)},
    "infinite": {"args": '{"number": 1e400}'},
    "surrogate": {"args": r'{"number": "\ud800"}'},
    "nul": {"args": r'{"number": "\u0000"}'},
    "missing": {"args": "{}"},
    "unknown": {"args": f'{{"number": 1, "other": "{ARGUMENT}"}}'},
    "wrong": {"args": f'{{"number": "{ARGUMENT}"}}'},
    "odd key": {"args": r'{"\u0000\u001b[2J\ud800": 1}'},
}
DONE: dict[str, dict[str, Any]] = {
    "twice": {"args": '{"number": 1, "number": 2}'},
    "random id": {"id": uuid4()},
    "last id": {"id": UUID(int=2**128 - 1)},
    "first id": {"id": UUID(int=1)},
    "trace": {"headers": '{"traceparent": 7, "tracestate": {}}'},
    "trace of control characters": {"headers": r'{"traceparent": "\u0000\u001b[2J\ud800"}'},
    "deep headers": {"headers": f'{{"a": {DEEP}}}'},
    "huge headers": {"headers": '{"a": "%s"}' % ("x" * 2_000_000)},
    "no attempts": {"max_attempts": 0},
    "less than no attempts": {"max_attempts": -32_768},
    "endless": {"timeout_s": 1e308},
    "long ago": {"run_at": "0001-01-03 00:00+00"},
    "most urgent": {"priority": 1},
}
LEFT: dict[str, dict[str, Any]] = {
    "late": {"run_at": "9999-12-30 00:00+00"},
    "unserved": {"queue": "nobody-serves"},
    "control": {"task": "\x1b[2J\x9b\u202e\n"},
    "braces": {"task": "}:relay{"},
    "long name": {"task": "t" * 128},
    "blank": {"task": " "},
    "deep headers and long arguments": {
        "task": "x",
        "headers": f'{{"a": {DEEP}}}',
        "args": '{"a": 1%s}' % ("0" * 5_000),
    },
}


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


async def insert(connection: asyncpg.Connection, columns: dict[str, Any]) -> UUID:
    """One row, as plain SQL writes it."""
    row = {"id": uuid4(), "queue": "default", "task": "book", "args": '{"number": 1}'} | columns
    values = [f"CAST(${place} AS text)::{_TYPES.get(name, 'text')}" for place, name in enumerate(row, 1)]
    await connection.execute(
        f"INSERT INTO jobq.outbox ({', '.join(row)}) VALUES ({', '.join(values)})", *map(str, row.values())
    )
    return UUID(str(row["id"]))


_TYPES = {
    "id": "uuid",
    "args": "json",
    "headers": "json",
    "run_at": "timestamptz",
    "priority": "smallint",
    "max_attempts": "smallint",
    "timeout_s": "float8",
}


async def test_no_row_that_the_table_takes_keeps_others_from_running(
    bench: Bench, shared_database_url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs: Counter[UUID] = Counter()

    @bench.app.task(name="book", retry=RetryPolicy(max_attempts=1))
    async def book(ctx: Context, number: int) -> None:
        runs[ctx.id] += 1
        async with ctx.complete() as session:
            await write_effect(session, ctx)

    caplog.set_level("DEBUG", "jobq")
    innocent: list[UUID] = []
    invalid: set[UUID] = set()
    done: set[UUID] = set()
    left: set[UUID] = set()
    async with roles_of(shared_database_url) as roles, leading(bench):
        web = await asyncpg.connect(roles.urls["web"])
        async with running(Worker(bench.app, WorkerSettings(concurrency=5, beat=0.1, lease=30.0))):
            for rows, ids in ((INVALID, invalid), (DONE, done), (LEFT, left)):
                for columns in rows.values():
                    ids.add(await insert(web, columns))
                    innocent.append(await bench.enqueue(book, 7))
            everything = {*innocent, *done}
            await until(lambda: runs.keys() == everything, "all that can run has run")
            await until(lambda: _count(bench, "dead", len(invalid)), "what cannot run is dead")
            await until(lambda: _count(bench, "outbox", len(left)), "what is left waits")
        await web.close()

    assert set(runs.values()) == {1}
    assert await bench.effects() == len(everything)
    dead = await bench.db.fetch("SELECT id, reason, last_error FROM jobq.dead")
    assert {(row["id"], row["reason"]) for row in dead} == {(id_, "invalid") for id_ in invalid}
    assert all(len(row["last_error"]) < 1_000 for row in dead)
    assert ARGUMENT not in "".join(row["last_error"] for row in dead)
    await _all_commands_show_them(Commands(shared_database_url, redis_url), invalid, left)


async def _count(bench: Bench, table: str, count: int) -> bool:
    return bool(await bench.db.fetchval(f"SELECT count(*) = $1 FROM jobq.{table}", count))


async def _all_commands_show_them(commands: Commands, dead: set[UUID], left: set[UUID]) -> None:
    calls: list[tuple[object, ...]] = [("status",), ("jobs", "list"), ("dead", "list")]
    calls += [("jobs", "show", id_, *more) for id_ in left for more in ((), ("--args",))]
    calls += [("dead", "show", id_, *more) for id_ in dead for more in ((), ("--args",))]
    for call in calls:
        shown = await commands.run(*call)
        assert shown.exit_code == 0, (call, shown.output[-500:])
        assert all(line.isprintable() for line in shown.output.split("\n")), call
