"""A process that takes orders: an order and its jobs in one transaction, committed or rolled back.

    python -m tests.chaos.producer SEED ORDERS_PER_SECOND

What became of a transaction is told in the journal, for the orders that leave no trace in the tables: `back` when it
was rolled back, `kept` when its COMMIT was answered, and after a COMMIT without an answer what the tables then said.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import asyncpg

from jobq.outbox.database import is_unavailable
from tests.chaos import app
from tests.chaos.journal import VARIABLE, Journal

LANES = 6
"""Transactions that one producer has open at the same time."""
FULL, EMPTY = 1_000, 20
"""Jobs that wait, beyond which it takes no orders until few are left: the machine may be slow, and what is least urgent
would wait for ever."""
ROLLED_BACK = 0.08
SENT_TWICE = 0.05
SERIALIZABLE = 0.06

Isolation = Literal["serializable", "read_committed"]


class Order:
    """One order: what it writes, and how its transaction goes."""

    def __init__(self, choose: random.Random):
        self.id = UUID(int=choose.getrandbits(128), version=4)
        self.kind, self.failures, task, values = _kind(choose)
        self.is_rolled_back = choose.random() < ROLLED_BACK
        self.isolation: Isolation = "serializable" if choose.random() < SERIALIZABLE else "read_committed"
        self.is_sent_twice = choose.random() < SENT_TWICE
        self.pause_s = choose.choice([0.0, 0.0, 0.0, 0.02, 0.2])
        self._job = task.opts(
            priority=choose.choices([1, 2, 3, 4], [1, 6, 1, 1])[0],
            delay=choose.uniform(0.1, 3.0) if choose.random() < 0.06 else None,
            idempotency_key=str(self.id) if self.is_sent_twice else None,
        )
        self._values = values

    async def write(self, connection: asyncpg.Connection) -> str:
        """Write it, and return the transaction's id."""
        job = await self._job.enqueue(connection, self.id, **self._values)
        xid: str = await connection.fetchval(
            "INSERT INTO chaos.orders (id, kind, job_id, failures) VALUES ($1, $2, $3, $4)"
            " ON CONFLICT (id) DO UPDATE SET job_id = excluded.job_id RETURNING CAST(pg_current_xact_id() AS text)",
            self.id, self.kind, job.id, self.failures,
        )  # fmt: skip
        return xid


def _kind(choose: random.Random) -> tuple[str, int, Any, dict[str, Any]]:
    """The kind of an order, how often its job is to fail, its task, and the arguments."""
    before = choose.choice([0.0, 0.01, 0.05, 0.1, 0.3])
    inside = choose.choice([0.0, 0.0, 0.0, 0.02, 0.1])
    match choose.choices(range(8), [44, 22, 7, 5, 6, 6, 6, 4])[0]:
        case 0:
            return "book", 0, app.book, {"before_s": before, "inside_s": inside}
        case 1:
            return "plain", 0, app.plain, {"before_s": before}
        case 2:
            failures = choose.choice([1, 1, 2, 3])
            return "book", failures, app.book, {"before_s": before, "inside_s": inside, "failures": failures}
        case 3:
            failures = choose.choice([1, 2])
            return "plain", failures, app.plain, {"before_s": before, "failures": failures}
        case 4:
            return "book", 0, app.parent, {"before_s": before}
        case 5:
            is_nap = choose.random() < 0.6
            return ("book", 0, app.nap, {}) if is_nap else ("step", 0, app.stepwise, {"before_s": before})
        case 6:
            return "plain", 0, app.in_thread, {"before_s": before}
        case _:
            rejects = choose.random() < 0.5
            return "doomed", 1 if rejects else 2, app.doomed, {"rejects": rejects}


class Producer:
    """Takes orders at a steady rate, as long as PostgreSQL takes them."""

    def __init__(self, seed: str, per_second: float):
        self._choose = random.Random(seed)
        self._per_second = per_second
        self._journal = Journal(Path(os.environ[VARIABLE]), "order")
        self._url = os.environ["JOBQ_DATABASE_URL"]
        self._stopping = asyncio.Event()
        self._next_at = time.monotonic()
        self._is_full = False

    async def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stopping.set)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_backlog())
            for _ in range(LANES):
                group.create_task(self._lane())

    async def _lane(self) -> None:
        connection: asyncpg.Connection | None = None
        while not self._stopping.is_set():
            await self._turn()
            order = Order(self._choose)
            if connection is None or connection.is_closed():
                connection = await self._connect()
            if connection is not None:
                await self._take(connection, order)
        if connection is not None:
            connection.terminate()

    async def _turn(self) -> None:
        """Wait for the time of the next order."""
        now = time.monotonic()
        self._next_at = max(self._next_at, now - 1.0) + 1 / self._per_second
        await self._pause(max(0.0, self._next_at - now))
        while self._is_full and not self._stopping.is_set():
            await self._pause(0.1)

    async def _take(self, connection: asyncpg.Connection, order: Order) -> None:
        if await self._try(connection, order) and order.is_sent_twice and not order.is_rolled_back:
            order.pause_s = 0.0
            await self._try(connection, order)

    async def _try(self, connection: asyncpg.Connection, order: Order) -> bool:
        """One transaction. Returns whether it is known to be committed."""
        xid = None
        try:
            transaction = connection.transaction(isolation=order.isolation)
            await transaction.start()
            xid = await order.write(connection)
            await self._pause(order.pause_s)
            if order.is_rolled_back:
                # Before it: what is told stands, whatever becomes of the connection, and nothing commits it by now.
                self._journal.write("back", order.id)
                await transaction.rollback()
                return False
            await transaction.commit()
        except Exception as error:
            if not is_unavailable(error) and not isinstance(error, asyncpg.SerializationError):
                raise
            connection.terminate()
            return xid is not None and not order.is_rolled_back and await self._probe(order, xid)
        self._journal.write("kept", order.id)
        return True

    async def _probe(self, order: Order, xid: str) -> bool:
        """Find out what became of a COMMIT that was not answered: the row is there or it is not."""
        while not self._stopping.is_set():
            connection = await self._connect()
            if connection is None:
                break
            with _away(connection):
                try:
                    status = await connection.fetchval("SELECT pg_xact_status(CAST(CAST($1 AS text) AS xid8))", xid)
                except asyncpg.InvalidParameterValueError:  # in the future: PostgreSQL has lost it
                    return False
                found = await connection.fetchval("SELECT true FROM chaos.orders WHERE id = $1", order.id)
                if found:
                    return True
                if status != "in progress":
                    return False
            await self._pause(0.1)
        return False

    async def _connect(self) -> asyncpg.Connection | None:
        while not self._stopping.is_set():
            try:
                return await asyncpg.connect(self._url, timeout=10)
            except (OSError, asyncpg.PostgresError, TimeoutError):
                await self._pause(0.1)
        return None

    async def _watch_backlog(self) -> None:
        query = f"SELECT count(*) FROM (SELECT FROM jobq.outbox LIMIT {FULL + 1}) AS waiting"
        while not self._stopping.is_set():
            connection = await self._connect()
            with _away(connection):
                while connection is not None and not self._stopping.is_set():
                    self._is_full = await connection.fetchval(query) > (EMPTY if self._is_full else FULL)
                    await self._pause(0.5)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


@contextmanager
def _away(connection: asyncpg.Connection | None) -> Iterator[None]:
    """Use a connection for a while, which may end at any moment."""
    try:
        yield
    except Exception as error:
        if not is_unavailable(error):
            raise
    finally:
        if connection is not None:
            connection.terminate()


if __name__ == "__main__":
    asyncio.run(Producer(sys.argv[1], float(sys.argv[2])).run())
