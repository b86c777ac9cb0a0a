"""Many writers against a relay that sleeps as often as it can: no commit is slept through.

The relay looks up by itself only after ten minutes here, and writers wait at the end of each round until everything
is pushed: a commit that woke nobody, with none after it that does, ends the test.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from uuid import UUID

import asyncpg
import pytest

from jobq.broker.client import connect
from jobq.broker.scripts import Broker
from jobq.model import new_job_id
from jobq.outbox.database import Database
from jobq.relay.leadership import Relay
from jobq.settings import RelaySettings
from tests.relay_rows import add, own_connection
from tests.waiting import until

WRITERS = 6
ROUNDS = 500
DEADLINE_S = 30
ISOLATION = ("read_committed", "repeatable_read", "serializable")
NEVER_S = 600.0


@asynccontextmanager
async def sleepy_relay(database_url: str, redis_url: str) -> AsyncIterator[None]:
    """A relay that tries to sleep after every poll that found nothing."""
    database = Database.of(database_url)
    settings = RelaySettings(
        sleep_after=0, sleep_longest=NEVER_S, detect_loss_every=NEVER_S, scrub_every=NEVER_S, look_ahead=2 * NEVER_S
    )
    relay = Relay(database, redis_url, "jobq", settings)
    stopping = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(relay.run(stopping))
        await until(lambda: relay.is_leading, "the relay leads")
        try:
            yield
        finally:
            stopping.set()
    await database.close()


async def write(connection: asyncpg.Connection, chance: random.Random) -> list[UUID]:
    """Commit or roll back a few times in every way an application does; returns the ids that were committed."""
    committed: list[UUID] = []
    for _ in range(chance.randint(1, 3)):
        with suppress(asyncpg.SerializationError):
            committed += await _one_transaction(connection, chance)
        if chance.random() < 0.2:
            await asyncio.sleep(chance.random() * 0.004)  # so that the relay finds time to fall asleep
    return committed


async def _one_transaction(connection: asyncpg.Connection, chance: random.Random) -> list[UUID]:
    kept: list[UUID] = []
    transaction = connection.transaction(isolation=chance.choice(ISOLATION))
    await transaction.start()
    try:
        for _ in range(chance.randint(1, 3)):
            kept += await _one_statement(connection, chance)
        if chance.random() < 0.1:
            await transaction.rollback()
            return []
        await transaction.commit()
    except BaseException:
        if connection.is_in_transaction():
            await transaction.rollback()
        raise
    return kept


async def _one_statement(connection: asyncpg.Connection, chance: random.Random) -> list[UUID]:
    """A row, by itself or inside a savepoint that is kept or not."""
    ids = [UUID(int=new_job_id().int)]
    if chance.random() < 0.5:
        return await add(connection, ids=ids)
    savepoint = connection.transaction()
    await savepoint.start()
    await add(connection, ids=ids)
    if chance.random() < 0.5:
        await savepoint.rollback()
        return []
    await savepoint.commit()
    return ids


@pytest.mark.timeout(300)
async def test_no_commit_is_slept_through(database_url: str, redis_url: str) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    woken: list[object] = []
    rows = 0
    async with AsyncExitStack() as stack:
        own = await stack.enter_async_context(own_connection(database_url))
        writers = [await stack.enter_async_context(own_connection(database_url)) for _ in range(WRITERS)]
        client = connect(redis_url)
        stack.push_async_callback(client.aclose)
        broker = Broker(client, UUID(bytes=(await own.fetchval("SELECT database_id FROM jobq.meta")).bytes))
        await own.add_listener("jobq", lambda *heard: woken.append(heard))
        await stack.enter_async_context(sleepy_relay(database_url, redis_url))
        for number in range(ROUNDS):
            busy = chance.sample(writers, chance.randint(1, WRITERS))
            written = await asyncio.gather(*(write(writer, chance) for writer in busy))
            ids = [id_ for committed in written for id_ in committed]
            rows += len(ids)
            await until(partial(_are_pushed, broker, ids), f"round {number} of seed {seed} is pushed", DEADLINE_S)
    assert rows > ROUNDS * 4
    assert len(woken) > ROUNDS / 10


async def _are_pushed(broker: Broker, ids: list[UUID]) -> bool:
    return not ids or set(await broker.known("default", ids)) == {1}
