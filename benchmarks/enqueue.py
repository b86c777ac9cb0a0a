"""What an enqueue costs the application that makes it, and what it would cost to do without it, or another way.

Writers are tasks of one process on asyncio, each with an SQLAlchemy connection. What is compared goes in turn within
one run, TURNS times each. Called by suite. Calls stage.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeAlias, TypeVar

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from jobq import JobQ

from . import app
from .figures import Measure, Samples
from .stage import Stage

TURNS = 16
"""A multiple of the four that go in turn."""
TRANSACTIONS = {1: 60, 16: 200, 32: 200}
"""Of a turn, by number of writers. What is compared within a short turn met the same machine."""
WAKE_UP_TURNS = 6
WAKE_UP_TRANSACTIONS = 500
"""A turn begins beside a relay that may have fallen asleep, which is to weigh little."""
MANY_TURNS = 3
MANY = 10_000

T = TypeVar("T")
Write: TypeAlias = Callable[[AsyncSession, int], Awaitable[None]]

_TABLES = """
    CREATE TABLE IF NOT EXISTS plain (LIKE jobq.outbox INCLUDING ALL);
    CREATE TABLE IF NOT EXISTS purchase (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, customer int NOT NULL, total int NOT NULL
    );
    TRUNCATE plain, purchase
"""
_PLAIN = text(
    "INSERT INTO plain (id, queue, task, args) VALUES"
    " (uuidv7(), 'default', 'nothing', CAST(CAST(:args AS text) AS json))"
)
_PURCHASE = text("INSERT INTO purchase (customer, total) VALUES (:customer, :total)")
_NOTIFY_ALWAYS = """
    CREATE OR REPLACE FUNCTION jobq.wake_relay() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_catalog.pg_notify('jobq', CAST(TG_TABLE_SCHEMA AS pg_catalog.text));
        RETURN NULL;
    END
    $$
"""


async def _enqueue(session: AsyncSession, number: int) -> None:
    await app.nothing.enqueue(session, number, "word")


async def _insert(session: AsyncSession, number: int) -> None:
    await session.execute(_PLAIN, {"args": f'{{"number":{number},"word":"word"}}'})


async def _purchase(session: AsyncSession, number: int) -> None:
    await session.execute(_PURCHASE, {"customer": number, "total": number})


async def _purchase_and_enqueue(session: AsyncSession, number: int) -> None:
    await _purchase(session, number)
    await _enqueue(session, number)


def _single(writers: int) -> Callable[[Stage], Awaitable[Samples]]:
    """Four transactions: an enqueue, the plain INSERT, an INSERT of the application, and that one with an enqueue."""

    async def run(stage: Stage) -> Samples:
        writes = (_enqueue, _insert, _purchase, _purchase_and_enqueue)
        count = min(TRANSACTIONS[writers], stage.jobs)
        async with stage.database() as connection, stage.application(connections=writers) as application:
            await connection.execute(_TABLES)
            await _rate(application, _enqueue, writers, writers)  # opens the connections
            rates: dict[Write, list[float]] = {write: [] for write in writes}
            for write in _in_turn(writes, TURNS):
                rates[write].append(await _rate(application, write, writers, count))
        enqueue, plain, purchase, both = (rates[write] for write in writes)
        return {
            "": statistics.median(enqueue),
            "plain": statistics.median(plain),
            "of-plain": _median_ratio(enqueue, plain),
            "purchase": statistics.median(purchase),
            "purchase-and-enqueue": statistics.median(both),
            "of-purchase": _median_ratio(both, purchase),
        }

    return run


def _in_turn(ways: Sequence[T], turns: int) -> Iterator[T]:
    """Each way once a turn, and each as often first as any other."""
    for turn in range(turns):
        first = turn % len(ways)
        yield from (*ways[first:], *ways[:first])


def _median_ratio(these: Sequence[float], those: Sequence[float]) -> float:
    return statistics.median(this / that for this, that in zip(these, those, strict=True))


async def _many(stage: Stage) -> float:
    """Jobs a second, validation and commit included; after one call that opens the connection."""
    async with stage.application() as application:
        rates = [await _many_rate(application, min(MANY, stage.jobs)) for _ in range(1 + MANY_TURNS)]
    return statistics.median(rates[1:])


async def transactions(stage: Stage, *, writers: int, batch: int, jobs: int) -> None:
    """Enqueue `jobs`, `batch` in a transaction."""
    async with stage.application(connections=writers) as application:
        if batch == 1:
            await _rate(application, _enqueue, writers, jobs)
            return
        for first in range(0, jobs, batch):
            await _many_rate(application, min(batch, jobs - first))


async def _many_rate(application: JobQ, count: int) -> float:
    started_at = time.perf_counter()
    async with application.database.sessions.begin() as session:
        await application.enqueue_many(session, (app.nothing.job(number, "word") for number in range(count)))
    return count / (time.perf_counter() - started_at)


async def _wake_up(stage: Stage) -> Samples:
    """Enqueues of 16 writers beside a relay that has work: as shipped, with NOTIFY always, and without a trigger."""
    known = (await stage.keys()).known
    count = min(WAKE_UP_TRANSACTIONS, stage.jobs)
    rates: dict[str, list[float]] = {"shipped": [], "always": [], "none": []}
    async with (
        stage.database() as connection,
        stage.redis() as client,
        stage.application(connections=16) as application,
    ):
        shipped = await connection.fetchval("SELECT pg_get_functiondef('jobq.wake_relay'::regproc)")
        try:
            with stage.process("relay"):
                await _rate(application, _enqueue, 16, 16)
                for way in _in_turn(list(rates), WAKE_UP_TURNS):
                    await connection.execute(_NOTIFY_ALWAYS if way == "always" else shipped)
                    verb = "DISABLE" if way == "none" else "ENABLE"
                    await connection.execute(f"ALTER TABLE jobq.outbox {verb} TRIGGER wake_relay")
                    rates[way].append(await _rate(application, _enqueue, 16, count))
                    rows = await connection.fetchval("SELECT count(*) FROM jobq.outbox")
                    while await client.hlen(known) < rows:
                        await stage.breathe()
        finally:
            await connection.execute(shipped)
            await connection.execute("ALTER TABLE jobq.outbox ENABLE TRIGGER wake_relay")
    return {
        "": statistics.median(rates["shipped"]),
        "notify-always": statistics.median(rates["always"]),
        "no-trigger": statistics.median(rates["none"]),
        "of-no-trigger": _median_ratio(rates["shipped"], rates["none"]),
        "always-of-no-trigger": _median_ratio(rates["always"], rates["none"]),
    }


async def _rate(application: JobQ, write: Write, writers: int, transactions: int) -> float:
    """Transactions a second."""

    async def writer(numbers: Sequence[int]) -> None:
        for number in numbers:
            async with application.database.sessions.begin() as session:
                await write(session, number)

    started_at = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for first in range(writers):
            group.create_task(writer(range(first, transactions, writers)))
    return transactions / (time.perf_counter() - started_at)


MEASURES = [
    *(
        Measure(
            f"enqueue/{writers}-writer{'s' if writers > 1 else ''}",
            "transactions/s",
            _single(writers),
            f"a transaction with one enqueue and nothing else, {writers} at a time",
            units={"of-plain": "of the plain INSERT", "of-purchase": "of the transaction without the enqueue"},
        )
        for writers in TRANSACTIONS
    ),
    Measure("enqueue/many", "jobs/s", _many, f"`enqueue_many` of {MANY:,} jobs, validation and commit included"),
    Measure(
        "enqueue/wake-up",
        "transactions/s",
        _wake_up,
        "the same, 16 at a time, beside a relay that has work, with the conditional wake-up as shipped",
        units={"of-no-trigger": "of no trigger", "always-of-no-trigger": "of no trigger"},
    ),
]
