"""The relay under faults: whatever breaks, every committed row arrives, and nothing that is done stays alive.

Faults strike through proxies before both stores, at random and with a seed, while rows are written, retried and
completed. Afterwards everything must drain.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg
import pytest

from jobq.broker.client import AsyncClient, connect, connect_sync
from jobq.broker.scripts import Broker, beat, script
from jobq.outbox.database import Database
from jobq.outbox.settle import Reschedule, reschedule
from jobq.relay.leadership import Relay
from jobq.settings import RelaySettings
from tests.faults.proxy import Proxy, postgres_proxy, redis_proxy
from tests.relay_rows import SCHEMA, RelayUnderTest, add, entries, open_relay, own_connection
from tests.waiting import until

PUSH = script("push").sha.encode()
FAST = RelaySettings(
    beat=0.005,
    look_ahead=0.05,
    page=7,
    poll_limit=20,
    push_limit=5,
    ready_limit=30,
    scrub_every=0.2,
    scrub_pause=0.0,
    detect_loss_every=0.02,
)


# --- one fault at every step of one push


@pytest.fixture
def database_url(shared_database_url: str) -> str:
    """These tests leave jobq's tables as they are, and share a database."""
    return shared_database_url


async def is_exactly(relay: RelayUnderTest, wanted: list[str]) -> bool:
    return await relay.ready() == wanted


@pytest.mark.parametrize("fault", ["lose_reply", "lose_request"])
@pytest.mark.parametrize("times", [1, 2, 3, 4, 7])
async def test_rows_arrive_once_however_often_their_push_gets_lost(
    database_url: str, redis_url: str, fault: str, times: int
) -> None:
    async with redis_proxy(redis_url) as (proxy, url), open_relay(database_url, url) as relay:
        await relay.settle()
        for _ in range(times):
            getattr(proxy, fault)(PUSH)
        ids = await add(relay.database, 3)

        await relay.turn_until(lambda: is_exactly(relay, entries(ids)), "the rows are there, each once")

        assert proxy.losses == min(times, proxy.losses)
        assert "losses" not in await relay.stats()


async def test_a_poll_whose_answer_gets_lost_ends_the_leader_and_the_next_one_brings_the_rows(
    database_url: str, redis_url: str
) -> None:
    async with postgres_proxy(database_url) as (proxy, through):
        async with open_relay(database_url, redis_url, relay_database_url=through) as relay:
            await relay.settle()
            ids = await add(relay.database, 3)
            proxy.lose_reply()
            with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)):
                await relay.turn(3)
            assert await relay.ready() == []
        async with open_relay(database_url, redis_url, relay_database_url=through) as relay:
            await relay.settle()
            assert await relay.ready() == entries(ids)


@pytest.mark.parametrize("part", ["poll", "push", "walk", "touch"])
async def test_a_relay_that_dies_at_any_step_is_followed_by_one_that_brings_everything_once(
    database_url: str, redis_url: str, part: str
) -> None:
    """Stop between two steps of a turn: what the leader had in hand is gone with it."""
    async with own_connection(database_url) as connection:
        ids = await add(connection, 5)
        async with open_relay(database_url, redis_url) as relay:
            leader = relay.leader
            await leader._timers.look_ahead()
            ids += await add(connection, 5)
            if part != "poll":
                await leader._poll()
            if part in ("walk", "touch"):
                await leader._walk.step()
            if part == "touch":
                await leader._touch_queues()
        async with open_relay(database_url, redis_url) as relay:
            await relay.settle()
            assert sorted(await relay.ready()) == entries(ids)


# --- everything at once


@asynccontextmanager
async def redis_client(url: str) -> AsyncIterator[AsyncClient]:
    client = connect(url)
    try:
        yield client
    finally:
        await client.aclose()


@dataclass
class World:
    """Both stores behind proxies, what was asked of them and what came of it."""

    chance: random.Random
    postgres: Proxy
    valkey: Proxy
    database_url: str
    redis_url: str
    written: set[UUID] = field(default_factory=set)
    completed: set[UUID] = field(default_factory=set)
    runs: int = 0
    is_over: bool = False

    async def write(self) -> None:
        """Write rows, some of them delayed, some rolled back."""
        async with own_connection(self.database_url) as connection:
            for _ in range(40):
                transaction = connection.transaction()
                await transaction.start()
                delay_s = self.chance.choice([None, None, 0.0, 0.02, 0.08])
                ids = await add(connection, self.chance.randint(1, 8), delay_s=delay_s)
                await connection.execute(f"SELECT pg_sleep({self.chance.choice([0, 0.002, 0.01])})")
                if self.chance.random() < 0.15:
                    await transaction.rollback()
                else:
                    await transaction.commit()
                    self.written |= set(ids)

    async def work(self) -> None:
        """Fetch, read, complete or retry, ack: a worker without faults of its own."""
        async with redis_client(self.redis_url) as client, own_connection(self.database_url) as connection:
            database_id = await connection.fetchval("SELECT database_id FROM jobq.meta")
            broker = Broker(client, UUID(bytes=database_id.bytes))
            counter = 0
            with connect_sync(self.redis_url) as sync_client:
                while not self.is_over:
                    counter += 1
                    beat(sync_client, broker.keys("default"), "w", counter=counter, info="{}", owned=[], put_back=[])
                    fetched = await broker.fetch("default", "w", 10)
                    if fetched is None or not fetched.entries:
                        await asyncio.sleep(0.002)
                        continue
                    await self._run(connection, broker, fetched.entries)

    async def _run(self, connection: asyncpg.Connection, broker: Broker, raws: list[bytes]) -> None:
        for raw in raws:
            id_, generation, _ = raw.decode().split(":")
            is_retried = self.chance.random() < 0.2 and int(generation) < 4
            if is_retried:
                delay_s = self.chance.choice([0.0, 0.03])
                await reschedule(connection, SCHEMA, [Reschedule(UUID(id_), int(generation), delay_s)])
            else:
                gone = await connection.fetchval(
                    "DELETE FROM jobq.outbox WHERE id = $1 AND generation = $2 RETURNING 1", UUID(id_), int(generation)
                )
                if gone:
                    assert UUID(id_) not in self.completed
                    self.completed.add(UUID(id_))
                    self.runs += 1
        await broker.ack("default", "w", raws)

    async def strike(self) -> None:
        """One fault after the other."""
        async with redis_client(self.redis_url) as client, own_connection(self.database_url) as connection:
            faults: list[Callable[[], Awaitable[object] | None]] = [
                self.postgres.cut,
                self.postgres.half_open_and_cut,
                self.postgres.lose_reply,
                self.postgres.lose_request,
                self.valkey.cut,
                self.valkey.half_open_and_cut,
                lambda: self.valkey.lose_reply(PUSH),
                lambda: self.valkey.lose_reply(PUSH),
                lambda: self.valkey.lose_request(PUSH),
                lambda: self.valkey.lose_reply(b"HMGET"),
                client.flushall,
                client.script_flush,
                lambda: connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'jobq:relay'"
                ),
            ]
            while not self.is_over:
                await asyncio.sleep(self.chance.uniform(0.005, 0.05))
                struck = self.chance.choice(faults)()
                if struck is not None:
                    await struck


@pytest.mark.parametrize("seed", range(3))
async def test_under_faults_of_every_kind_every_committed_row_is_run_and_none_twice(
    database_url: str, redis_url: str, seed: int
) -> None:
    async with (
        postgres_proxy(database_url) as (postgres, through_postgres),
        redis_proxy(redis_url) as (valkey, through_redis),
        own_connection(database_url) as connection,
    ):
        world = World(random.Random(seed), postgres, valkey, database_url, redis_url)
        database, stopping = Database.of(through_postgres), asyncio.Event()
        relay = Relay(database, through_redis, SCHEMA, FAST)

        async def is_drained() -> bool:
            assert not working.done(), working.exception()
            return bool(await connection.fetchval("SELECT count(*) FROM jobq.outbox") == 0)

        relaying = asyncio.ensure_future(relay.run(stopping))
        working = asyncio.ensure_future(world.work())
        striking = asyncio.ensure_future(world.strike())
        try:
            await asyncio.gather(*(world.write() for _ in range(3)))
            striking.cancel()
            await until(is_drained, "every row is completed", deadline=60)
        finally:
            world.is_over = True
            stopping.set()
            await asyncio.wait({relaying, working, striking}, timeout=5)
            await database.close()

    await working
    assert world.completed == world.written
    assert world.runs == len(world.written)
