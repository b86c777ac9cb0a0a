"""A shop on a pair of PostgreSQL servers: producers, real processes, and a failover with orders of every kind.

Used by the tests of PostgreSQL's failover. Calls postgres_pair and faults.failover_app.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from jobq.broker.client import connect
from jobq.broker.scripts import Broker
from jobq.outbox.database import Database
from jobq.outbox.settle import Reschedule, reschedule
from tests.commands import Process
from tests.commands import started as command
from tests.faults import failover_app as app
from tests.faults.proxy import Proxy, proxy_before
from tests.postgres_pair import Pair, connection_to, query, socket_of
from tests.waiting import until

ROOT = Path(__file__).parents[1]
APP = "tests.faults.failover_app:jobs"
NEXT_XID = "SELECT pg_current_xact_id()::text::bigint"
BURNT_XIDS = 500

# Orders, by what becomes of them.
DONE = range(1, 11)  # completed, and the replica knows
UNDONE = range(11, 16)  # completed, and the replica has never heard of that
PAID = 16  # likewise, and a step was taken
TOLD = 17  # likewise, of a plain task
CAUGHT = 18  # inside ctx.complete() when the primary dies
RETRIED = 19  # given a new generation of which the replica has never heard
LOST = range(20, 25)  # committed and completed, and the replica has never heard of any of it
GHOSTS = range(25, 30)  # committed and pushed, likewise
NEW = range(30, 40)  # committed on the new primary
AGAIN = 40  # likewise, with an idempotency key that was lost


@dataclass
class Aftermath:
    """What is left when nothing is left to do."""

    orders: set[int]
    effects: Counter[int]
    notes_before: Counter[str]
    """What ran before the failover, in the words of the application."""
    notes_after: Counter[str]
    stats: Counter[str]
    said: list[str]
    ghosts_in_between: int
    """Entries dropped while there was a replica, and no primary."""
    last_old_xid: int
    first_new_xid: int
    old_key: tuple[UUID, UUID]
    """The job of an idempotency key, enqueued before the replica was cut off and again after the failover."""
    lost_key: tuple[UUID, UUID]
    """Likewise, before the first time the replica had been cut off."""


class Address:
    """How processes find the primary: one address that is moved, or the hosts of both."""

    def __init__(self, proxies: list[Proxy]):
        self.proxies = proxies
        self.hosts = [f"127.0.0.1:{proxy.port}" for proxy in proxies]

    @property
    def url(self) -> str:
        return f"postgresql://postgres@{','.join(self.hosts)}/postgres"

    @property
    def engine_url(self) -> str:
        """As SQLAlchemy has it."""
        words = "".join(f"host={host}&" for host in self.hosts)
        return f"postgresql+asyncpg://postgres@/postgres?{words}target_session_attrs=read-write"

    @classmethod
    @asynccontextmanager
    async def of(cls, *nodes: Any) -> AsyncIterator[Address]:
        async with AsyncExitStack() as stack:
            yield cls([await stack.enter_async_context(proxy_before(socket_of(node))) for node in nodes])


class Shop:
    """Producers on the primary, processes that may be told where it is, and the look at both stores."""

    def __init__(self, stack: AsyncExitStack, pair: Pair, broker: Broker, folder: Path):
        self._stack = stack
        self._folder = folder
        self.pair = pair
        self.broker = broker
        self.primary = pair.primary
        self.processes: list[Process] = []

    @classmethod
    @asynccontextmanager
    async def open(cls, pair: Pair, folder: Path) -> AsyncIterator[Shop]:
        async with AsyncExitStack() as stack:
            client = connect(pair.redis_url)
            stack.push_async_callback(client.aclose)
            found = await query(pair.primary, "SELECT database_id FROM jobq.meta")
            async with connection_to(pair.primary) as connection:
                await connection.execute(app.TABLES)
            yield cls(stack, pair, Broker(client, UUID(bytes=found.bytes)), folder)

    async def start(self, command_name: str, *options: str, says: str, **environment: str) -> Process:
        arguments = [command_name, APP, "--lease", "60", "--beat", "0.2", *options]
        environment = {"PYTHONPATH": str(ROOT), "JOBQ_REDIS_URL": self.pair.redis_url, **environment}
        process = self._stack.enter_context(command(*arguments, folder=self._folder, **environment))
        self.processes.append(process)
        await process.says(says)
        return process

    async def order(self, task: Any, *ids: int, gate: str = "", **options: Any) -> UUID:
        """Commit orders, each with its job. Returns the last job's id."""
        database = Database.of(self.primary.database_url)
        try:
            for id_ in ids:
                async with database.sessions.begin() as session:
                    await (await session.connection()).exec_driver_sql(f"INSERT INTO orders VALUES ({id_})")
                    job = await task.opts(**options).enqueue(session, id_, gate)
        finally:
            await database.close()
        return job.id

    def open_gate(self, name: str) -> None:
        (self._folder / name).touch()

    def notes(self) -> Counter[str]:
        notes = self._folder / app.NOTES
        return Counter(notes.read_text().splitlines() if notes.exists() else ())

    async def noted(self, *words: str) -> None:
        await until(lambda: all(self.notes()[word] for word in words), f"it was noted: {words}")

    async def orders(self) -> set[int]:
        async with connection_to(self.primary) as connection:
            return {row[0] for row in await connection.fetch("SELECT id FROM orders")}

    async def effects(self) -> Counter[int]:
        async with connection_to(self.primary) as connection:
            rows = await connection.fetch("SELECT order_id, count(*) FROM effect GROUP BY 1")
        return Counter(dict(rows))

    async def completed(self, *ids: int) -> None:
        async def are() -> bool:
            return set(ids) <= (await self.effects()).keys()

        await until(are, f"the effects of orders {ids} are there", 60)

    async def drained(self) -> None:
        """No row is left, and no entry."""

        async def is_drained() -> bool:
            names = {name.decode().rpartition(":")[2] for name in await self.broker.client.keys("jobq:*")}
            rows = await query(self.primary, "SELECT count(*) FROM jobq.outbox")
            return rows == 0 and not names & {"known", "1", "2", "3", "4"}

        await until(is_drained, "nothing is left in either store", 60)

    async def stats(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for queue in ("default", "later"):
            for name, value in (await self.broker.client.hgetall(self.broker.keys(queue).stats)).items():
                found[name.decode()] += int(value)
        return found

    async def known(self, job_id: UUID, generation: int) -> None:
        async def is_known() -> bool:
            return await self.broker.known("later", [job_id]) == [generation]

        await until(is_known, f"Redis knows generation {generation}")

    async def retry_by_hand(self, job_id: UUID) -> None:
        async with connection_to(self.primary) as connection:
            assert await reschedule(connection, "jobq", [Reschedule(job_id, 1)])

    async def burn_xids(self) -> None:
        async with connection_to(self.primary) as connection:
            for _ in range(BURNT_XIDS):
                await connection.fetchval(NEXT_XID)

    async def give_to_a_worker(self, job_id: UUID) -> None:
        """Have a worker ask PostgreSQL for something."""
        keys = self.broker.keys("default")
        await self.broker.client.hset(keys.known, job_id.hex, "1")
        await self.broker.client.rpush(keys.ready[1], f"{job_id.hex}:1:2")


async def fail_over_with_orders_of_every_kind(our: Shop, address: Address) -> Aftermath:
    """Lose the primary and its last commits, move the address, and go on until nothing is left to do."""
    pair, where = our.pair, {"JOBQ_DATABASE_URL": address.url}
    await our.start("relay", says="relay leads", **where)
    await our.start("worker", says="worker ready", **where)
    await our.order(app.book, *DONE)
    await our.completed(*DONE)
    await our.order(app.book, *UNDONE, gate="before")
    old_key = await our.order(app.pay, PAID, gate="before", idempotency_key="old")
    await our.order(app.tell, TOLD, gate="before")
    await our.order(app.book_slowly, CAUGHT, gate="after")
    retried = await our.order(app.book, RETRIED, queue="later")
    await our.noted(*(f"book {id_}" for id_ in (*UNDONE, CAUGHT)), f"pay {PAID}", f"tell {TOLD}")
    await our.known(retried, 1)

    await pair.cut_off()
    our.open_gate("before")
    await our.completed(*UNDONE, PAID)
    await our.order(app.book, *LOST)
    await our.completed(*LOST)
    lost_key = await our.order(app.book, *GHOSTS[:1], queue="later", idempotency_key="lost")
    await our.known(await our.order(app.book, *GHOSTS[1:], queue="later"), 1)
    await our.retry_by_hand(retried)
    await our.known(retried, 2)
    await until(lambda: _is_completed(our, TOLD), "the plain task is completed")
    await our.burn_xids()
    notes_before, last_old_xid = our.notes(), await query(pair.primary, NEXT_XID)

    await pair.crash()
    address.proxies[0].target = socket_of(pair.replica)
    await our.give_to_a_worker(lost_key)
    our.open_gate("after")
    for process in our.processes:
        await process.says("store away")
    await our.processes[1].says("part=settler")
    tries = address.proxies[0].accepted
    await until(lambda: address.proxies[0].accepted >= tries + 5, "both have asked the replica")
    ghosts_in_between = (await our.stats())["ghost"]

    await pair.promote()
    our.primary = pair.replica
    first_new_xid = await query(pair.replica, NEXT_XID)
    await our.order(app.book, *NEW)
    again = await our.order(app.book, AGAIN, idempotency_key="lost")
    await our.start("worker", "-q", "later", says="worker ready", **where)
    await our.drained()
    kept = await our.order(app.pay, 97, idempotency_key="old")
    return Aftermath(
        orders=await our.orders(),
        effects=await our.effects(),
        notes_before=notes_before,
        notes_after=our.notes() - notes_before,
        stats=await our.stats(),
        said=[process.said for process in our.processes],
        ghosts_in_between=ghosts_in_between,
        last_old_xid=last_old_xid,
        first_new_xid=first_new_xid,
        old_key=(old_key, kept),
        lost_key=(lost_key, again),
    )


async def _is_completed(our: Shop, order_id: int) -> bool:
    statement = f"SELECT count(*) FROM jobq.outbox WHERE (args->>'order_id')::int = {order_id}"
    return await query(our.primary, statement) == 0
