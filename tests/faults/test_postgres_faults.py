"""PostgreSQL ends sessions, has none left, and holds transactions open for long, while relay and worker serve."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import text

from jobq import Context, RetryPolicy, embedded
from jobq.broker.client import connect_sync
from jobq.broker.scripts import beat
from jobq.model import Entry
from jobq.relay.leadership import Relay
from jobq.settings import RelaySettings, WorkerSettings
from jobq.worker.worker import Worker
from tests.builders import Bench, running, write_effect
from tests.faults.proxy import proxy_before
from tests.postgres_pair import make_tables, socket_of
from tests.waiting import until

LEASE_S = 1.0
STRIKES = 5
END = "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name ~ $1"
SESSIONS = {
    "relay": "^jobq:relay$",
    "janitor": "^jobq:janitor$",
    "read": "^jobq:w-.*:read$",
    "settle": "^jobq:w-.*:settle$",
    "sweep": "^jobq:w-.*:sweep$",
    "complete": "^jobq:w-[^:]*$",
}


@dataclass
class Serving:
    """A bench whose relay and worker serve by themselves, and what its tasks did."""

    bench: Bench
    runs: Counter[UUID] = field(default_factory=Counter)
    booked: list[UUID] = field(default_factory=list)

    async def order(self) -> None:
        """Commit a job with an effect, and one without."""
        async with self.bench.db.transaction():
            self.booked.append((await self.book.enqueue(self.bench.db)).id)
            await self.plain.enqueue(self.bench.db)

    async def drained(self) -> None:
        async def is_drained() -> bool:
            return await self.bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0

        await until(is_drained, "every job is done", 60)

    async def each_order_has_one_effect(self) -> bool:
        rows = await self.bench.db.fetch("SELECT job_id, count(*) FROM effect GROUP BY 1")
        return Counter(dict(map(tuple, rows))) == Counter(self.booked)

    def make_tasks(self) -> None:
        soon = RetryPolicy(max_attempts=1000, delay=lambda attempt, error: 0.01)

        @self.bench.app.task(retry=soon)
        async def book(ctx: Context) -> None:
            self.runs[ctx.id] += 1
            async with ctx.complete() as session:
                await write_effect(session, ctx)
                await session.execute(text("SELECT pg_sleep(0.002)"))

        @self.bench.app.task(retry=soon)
        async def plain(ctx: Context) -> None:
            self.runs[ctx.id] += 1

        self.book, self.plain = book, plain


@asynccontextmanager
async def serving(database_url: str, redis_url: str) -> AsyncIterator[Serving]:
    stopping = asyncio.Event()
    async with Bench.open(database_url, redis_url) as bench:
        serving = Serving(bench)
        serving.make_tasks()
        settings = RelaySettings(beat=0.1, scrub_every=1e6, tidy_every=0.05)
        relay = Relay(bench.app.database, redis_url, bench.app.schema, settings)
        relaying = asyncio.create_task(relay.run(stopping))
        worker = Worker(bench.app, WorkerSettings(beat=0.05, lease=LEASE_S, grace=5.0))
        try:
            async with running(worker):
                yield serving
        finally:
            stopping.set()
            await relaying


class Deaths:
    """Workers that fetch a job and are never heard of again."""

    def __init__(self, bench: Bench, redis_url: str):
        self._bench = bench
        self._redis_url = redis_url
        self._numbers = itertools.count()

    def fetch_and_die(self, job_id: UUID) -> None:
        """Put the job into a dead worker's hands. By hand: a live one that waits for the bell fetches it first."""
        keys, name = self._bench.broker.keys("default"), f"dead-{next(self._numbers)}"
        with connect_sync(self._redis_url) as client:
            beat(client, keys, name, counter=1, info="{}", owned=[], put_back=[])
            client.rpush(keys.working(name), Entry.of(job_id, 1, 2).raw)


@pytest.mark.parametrize("part", SESSIONS)
async def test_sessions_of_any_kind_may_be_ended_again_and_again(
    shared_database_url: str, redis_url: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobq.worker.worker.SWEEP_EVERY_S", 0.05)
    async with serving(shared_database_url, redis_url) as our:
        deaths, struck = Deaths(our.bench, redis_url), 0
        await our.order()
        await our.drained()  # the worker has started: one that cannot start ends

        async def strike_often_enough() -> bool:
            nonlocal struck
            await our.order()
            if part == "sweep":
                deaths.fetch_and_die(our.booked[-1])
            struck += await our.bench.db.fetchval(END, SESSIONS[part])
            return struck >= STRIKES

        await until(strike_often_enough, f"{STRIKES} sessions were ended", 60)
        await our.drained()

        assert await our.each_order_has_one_effect()
        assert len(our.runs) == 2 * len(our.booked)
        assert await our.bench.db.fetchval("SELECT count(*) FROM jobq.dead") == 0


@asynccontextmanager
async def own_server(**settings: str) -> AsyncIterator[embedded.Servers]:
    servers = await asyncio.to_thread(lambda: embedded.start(postgres_config=settings))
    try:
        await make_tables(servers.database_url)
        yield servers
    finally:
        await asyncio.to_thread(servers.stop)


async def test_a_server_without_a_free_connection_costs_time_and_no_attempt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with (
        own_server(max_connections="12", superuser_reserved_connections="0") as servers,
        proxy_before(socket_of(servers)) as proxy,
        serving(f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres", servers.redis_url) as our,
        AsyncExitStack() as taken,
    ):
        await our.order()
        await our.drained()
        connections = 1  # the bench's own

        async def has_taken_all() -> bool:
            nonlocal connections
            await our.bench.db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend' "
                "AND application_name <> 'somebody else' AND pid <> pg_backend_pid()"
            )
            try:
                connection = await asyncpg.connect(
                    servers.database_url, server_settings={"application_name": "somebody else"}
                )
            except asyncpg.TooManyConnectionsError:
                return False
            connections += 1
            taken.callback(connection.terminate)
            return connections == 12

        await until(has_taken_all, "somebody else has all connections")
        for _ in range(5):
            await our.order()
        tries = proxy.accepted
        await until(lambda: proxy.accepted >= tries + 5, "relay and worker have tried to connect")
        await taken.aclose()
        await our.drained()

        assert await our.each_order_has_one_effect()
        assert set(our.runs.values()) == {1}
        assert "job retried" not in caplog.messages
        # It is an outage as any other.
        assert not [said for said in caplog.messages if "broke off" in said or "failed, trying again" in said]


async def test_jobs_pass_a_transaction_that_stays_open_and_its_own_are_found_when_it_commits() -> None:
    """A prepared one: it outlives its server, and so the snapshots of one relay and the next."""
    async with own_server() as servers, serving(servers.database_url, servers.redis_url) as our:
        await our.bench.db.execute("BEGIN; SET LOCAL jobq.notify = 'off'")
        late = (await our.book.enqueue(our.bench.db)).id
        await our.bench.db.execute("PREPARE TRANSACTION 'shop-1'")
        for _ in range(20):
            await our.order()
        await our.drained()

        await asyncio.to_thread(servers.postgres.stop, "immediate")
        await asyncio.to_thread(servers.postgres.start)
        our.bench.db = await asyncpg.connect(servers.database_url)
        our.bench.closes(our.bench.db.close)
        await our.order()
        await our.drained()
        await our.bench.db.execute("COMMIT PREPARED 'shop-1'")
        our.booked.append(late)

        await our.drained()
        assert await our.each_order_has_one_effect()
