"""Who leads: one relay at a time, and another as soon as that one does not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from jobq.broker.client import connect
from jobq.broker.scripts import Broker
from jobq.health import Pulse
from jobq.outage import Outage
from jobq.outbox import follow
from jobq.outbox.database import Database
from jobq.relay import leadership
from jobq.relay.leadership import Relay, stand_by
from jobq.settings import RelaySettings
from tests.faults.proxy import postgres_proxy, redis_proxy
from tests.relay_rows import SCHEMA, RelayUnderTest, add, delete, entries, open_relay, own_connection
from tests.waiting import until

FAST: dict[str, Any] = {"detect_loss_every": 0.01, "takeover_after": 0.2, "beat": 0.001, "look_ahead": 0.2}


@pytest.fixture
def database_url(shared_database_url: str) -> str:
    """These tests leave jobq's tables as they are, and share a database."""
    return shared_database_url


class RunningRelay:
    """A relay that serves in a task, as a process would."""

    def __init__(self, database_url: str, redis_url: str, **settings: Any):
        self.database = Database.of(database_url)
        self.relay = Relay(self.database, redis_url, SCHEMA, RelaySettings(**(FAST | settings)))
        self._stopping = asyncio.Event()
        self._task = asyncio.ensure_future(self.relay.run(self._stopping))

    @property
    def leads(self) -> bool:
        return self.relay.is_leading

    async def stop(self) -> None:
        """Stop as a process does that was told to."""
        self._stopping.set()
        await asyncio.wait_for(self._task, 5)
        await self.database.close()

    async def die(self) -> None:
        """End as a process does that was killed: its connection closes."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.relay._client.aclose()
        await self.database.close()


@asynccontextmanager
async def running(database_url: str, redis_url: str, **settings: Any) -> AsyncIterator[RunningRelay]:
    relay = RunningRelay(database_url, redis_url, **settings)
    try:
        yield relay
    finally:
        await relay.stop()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    async with own_connection(database_url) as connection:
        yield connection


async def leader_pids(database: asyncpg.Connection) -> list[int]:
    rows = await database.fetch(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = CAST($1 AS oid) "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        follow.LEADER_LOCK,
    )
    return [row[0] for row in rows]


async def pushed(redis_url: str, database: asyncpg.Connection) -> set[str]:
    found = await database.fetchval("SELECT database_id FROM jobq.meta")
    client = connect(redis_url)
    raws = await client.lrange(f"jobq:1:{found.hex[:8]}:{{default}}:ready:2", 0, -1)
    await client.aclose()
    return {raw.decode() for raw in raws}


async def until_pushed(redis_url: str, database: asyncpg.Connection, ids: Any) -> None:
    wanted = set(entries(ids))

    async def are_there() -> bool:
        return wanted <= await pushed(redis_url, database)

    await until(are_there, "every row is pushed")


async def test_one_relay_of_two_leads_and_the_other_follows_when_it_stops(
    database_url: str, redis_url: str, database: asyncpg.Connection
) -> None:
    first = RunningRelay(database_url, redis_url)
    await until(lambda: first.leads, "the first leads")
    async with running(database_url, redis_url) as second:
        await until_pushed(redis_url, database, await add(database, 3))
        assert not second.leads
        await first.stop()
        await until(lambda: second.leads, "the second leads")
        await until_pushed(redis_url, database, await add(database, 3))


async def test_a_relay_whose_process_dies_is_followed_at_once(
    database_url: str, redis_url: str, database: asyncpg.Connection
) -> None:
    first = RunningRelay(database_url, redis_url)
    await until(lambda: first.leads, "the first leads")
    async with running(database_url, redis_url, takeover_after=1000) as second:
        await first.die()
        await until(lambda: second.leads, "the second leads")


async def test_the_lead_passes_on_whenever_its_session_is_ended(
    database_url: str, redis_url: str, database: asyncpg.Connection
) -> None:
    async with running(database_url, redis_url), running(database_url, redis_url):
        for _ in range(5):
            (pid,) = await until(lambda: leader_pids(database), "one leads")
            await database.fetchval("SELECT pg_terminate_backend($1)", pid)
            await until(lambda pid=pid: has_another_leader(database, pid), "another session leads")


async def has_another_leader(database: asyncpg.Connection, before: int) -> bool:
    return [pid for pid in await leader_pids(database) if pid != before] != []


async def test_a_relay_whose_session_was_ended_begins_anew_and_misses_nothing(
    database_url: str, redis_url: str, database: asyncpg.Connection
) -> None:
    async with running(database_url, redis_url):
        ids = []
        for _ in range(5):
            (pid,) = await until(lambda: leader_pids(database), "it leads")
            ids += await add(database, 2)
            await database.fetchval("SELECT pg_terminate_backend($1)", pid)
            ids += await add(database, 2)
            ids += await add(database, 2, delay_s=0.05)
        await until_pushed(redis_url, database, ids)


async def test_a_silent_leader_is_ended_and_its_pushes_are_refused(
    database_url: str, redis_url: str, database: asyncpg.Connection
) -> None:
    async with open_relay(database_url, redis_url) as silent:
        assert await follow.try_lead(silent.connection, SCHEMA)
        await silent.settle()
        stale = await add(database)
        await delete(database, stale)

        async with running(database_url, redis_url) as standby:
            await until(lambda: standby.leads, "the standby leads")
            await until(silent.connection.is_closed, "the old session is gone")
            await until_pushed(redis_url, database, await add(database))

            # The old leader wakes up in the middle of its turn, with rows in hand that it read before.
            assert await silent.leader._push.push("default", 2, entries(stale)) == 0
            assert not set(entries(stale)) & await pushed(redis_url, database)
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
                await silent.leader.step()


class SetClock:
    """A monotonic clock that the test sets: a slow machine makes no leader seem silent."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


async def test_a_leader_that_moves_its_token_is_left_alone(
    database_url: str, redis_url: str, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SetClock()
    monkeypatch.setattr(leadership, "time", clock)
    async with open_relay(database_url, redis_url, detect_loss_every=1e-6) as leader:
        assert await follow.try_lead(leader.connection, SCHEMA)
        async with standing_by(leader, database):
            for _ in range(50):
                await leader.leader.step()
                clock.now += 0.06
                await asyncio.sleep(0.01)
        assert not leader.connection.is_closed()


async def test_a_leader_is_left_alone_by_a_standby_that_was_stopped_while_it_looked(
    database_url: str, redis_url: str, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looks, read_tokens = SetClock(), 0, leadership._read_tokens

    async def read(broker: Broker, outage: Outage) -> dict[str, bytes | None] | None:
        nonlocal looks
        looks += 1
        tokens = await read_tokens(broker, outage)
        if looks == 2:
            clock.now += 60
            await leader.leader.step()
        return tokens

    monkeypatch.setattr(leadership, "time", clock)
    monkeypatch.setattr(leadership, "_read_tokens", read)
    async with open_relay(database_url, redis_url, detect_loss_every=1e-6) as leader:
        assert await follow.try_lead(leader.connection, SCHEMA)
        await leader.turn()
        async with standing_by(leader, database):
            await until(lambda: looks > 4, "it has looked again")
        assert not leader.connection.is_closed()


async def test_no_leader_is_ended_because_redis_is_full(
    database_url: str, redis_url: str, database: asyncpg.Connection
) -> None:
    async with open_relay(database_url, redis_url) as leader:
        assert await follow.try_lead(leader.connection, SCHEMA)
        await leader.turn()
        await leader.broker.client.config_set("maxmemory", 1)
        try:
            await stand_by_for(leader, database, seconds=1.0)
        finally:
            await leader.broker.client.config_set("maxmemory", 0)
        assert not leader.connection.is_closed()
        assert await follow.try_lead(leader.connection, SCHEMA), "it leads still"


async def test_no_leader_is_ended_because_redis_cannot_be_read(
    database_url: str, redis_url: str, database: asyncpg.Connection
) -> None:
    async with redis_proxy(redis_url) as (proxy, url), open_relay(database_url, url) as leader:
        assert await follow.try_lead(leader.connection, SCHEMA)
        await leader.turn()
        proxy.is_refusing = True
        proxy.cut()
        await stand_by_for(leader, database, seconds=1.0)
        assert not leader.connection.is_closed()


async def test_a_leader_has_its_time_again_after_redis_was_away(
    database_url: str, redis_url: str, database: asyncpg.Connection
) -> None:
    async with redis_proxy(redis_url) as (proxy, url), open_relay(database_url, url) as leader:
        assert await follow.try_lead(leader.connection, SCHEMA)
        await leader.turn()
        later = asyncio.get_running_loop().call_later
        later(0.3, setattr, proxy, "is_refusing", True)
        later(0.3, proxy.cut)
        later(1.8, setattr, proxy, "is_refusing", False)
        await stand_by_for(leader, database, seconds=2.1, takeover_after=1.2)
        assert not leader.connection.is_closed()


async def stand_by_for(
    leader: RelayUnderTest, connection: asyncpg.Connection, *, seconds: float, takeover_after: float = 0.1
) -> None:
    """Stand by for some seconds beside a leader that takes no turns, then stop."""
    async with standing_by(leader, connection, takeover_after=takeover_after) as standby:
        await asyncio.wait({standby}, timeout=seconds)


@asynccontextmanager
async def standing_by(
    leader: RelayUnderTest, connection: asyncpg.Connection, *, takeover_after: float = 0.1
) -> AsyncIterator[asyncio.Future[bool]]:
    """Stand by during the block, which must leave the lead where it is."""
    stopping = asyncio.Event()
    standby = asyncio.ensure_future(
        stand_by(
            connection,
            leader.broker,
            SCHEMA,
            RelaySettings(**(FAST | {"takeover_after": takeover_after})),
            stopping,
            pulse=Pulse("relay", 300.0),
            outage=Outage("redis", "standby"),
        )
    )
    try:
        yield standby
    finally:
        stopping.set()
        leads = await standby
    assert not leads


async def test_both_stores_may_go_away_and_come_back(
    database_url: str, redis_url: str, database: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        postgres_proxy(database_url) as (postgres, through_postgres),
        redis_proxy(redis_url) as (valkey, through_redis),
        running(through_postgres, through_redis) as relay,
    ):
        await until(lambda: relay.leads, "it leads")
        ids = await add(database, 3)
        for proxy in (postgres, valkey):
            proxy.is_refusing = True
            proxy.cut()
        ids += await add(database, 3)
        await until(lambda: not relay.leads, "it has noticed")
        refused = postgres.accepted
        await until(lambda: postgres.accepted > refused, "it tries again")
        valkey.is_refusing = False
        ids += await add(database, 3)
        postgres.is_refusing = False
        await until_pushed(redis_url, database, ids)

    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.count("store away") <= 3
    assert "relay broke off" not in said


async def test_a_relay_stops_at_once_while_it_leads_stands_by_or_cannot_connect(
    database_url: str, redis_url: str
) -> None:
    first = RunningRelay(database_url, redis_url)
    await until(lambda: first.leads, "the first leads")
    second = RunningRelay(database_url, redis_url)
    async with postgres_proxy(database_url) as (proxy, url):
        proxy.is_refusing = True
        third = RunningRelay(url, redis_url)
        await until(lambda: proxy.accepted > 0, "it has tried")
        for relay in (third, second, first):
            await relay.stop()


async def test_relays_of_two_schemas_do_not_know_each_other(database_url: str, database: asyncpg.Connection) -> None:
    async with own_connection(database_url) as other:
        assert await follow.try_lead(database, SCHEMA)
        assert await follow.try_lead(other, "another")
