"""Two PostgreSQL servers, one an asynchronous replica of the other, and the failover to it.

Invariant: what the replica had not received when it was cut off is lost with the primary. Used by the tests of
PostgreSQL's failover.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import jobq.migrate
from jobq import embedded
from jobq.embedded.account import Account
from tests.waiting import until

_NODE = {"hot_standby": "on", "wal_retrieve_retry_interval": "50ms"}


class Pair:
    """1. `cut_off` the replica: it receives nothing more. 2. `crash` the primary. 3. `promote` the replica.

    The primary comes with a Valkey. Both have jobq's tables.
    """

    def __init__(self, primary: embedded.Servers, replica: embedded.Servers):
        self.primary = primary
        self.replica = replica

    @property
    def redis_url(self) -> str:
        return self.primary.redis_url

    async def caught_up(self) -> None:
        """Wait until the replica has all that was committed."""
        written = await query(self.primary, "SELECT pg_current_wal_insert_lsn()::text")

        async def has_all() -> bool:
            return bool(await query(self.replica, f"SELECT pg_last_wal_replay_lsn() >= '{written}'"))

        await until(has_all, "the replica has caught up")

    async def cut_off(self) -> None:
        """From here on nothing reaches the replica. What is committed now is lost by a failover."""
        await self.caught_up()
        await query(self.replica, "ALTER SYSTEM SET primary_conninfo = ''")
        await query(self.replica, "SELECT pg_reload_conf()")

        async def is_cut_off() -> bool:
            receivers = await query(self.replica, "SELECT count(*) FROM pg_stat_wal_receiver")
            return receivers == 0 and await query(self.primary, "SELECT count(*) FROM pg_stat_replication") == 0

        await until(is_cut_off, "the replica receives nothing more")

    async def crash(self) -> None:
        """SIGKILL: the primary is gone without a word."""
        await asyncio.to_thread(self.primary.postgres.kill)

    async def promote(self) -> None:
        assert await query(self.replica, "SELECT pg_promote()")

    async def fail_over(self) -> None:
        await self.crash()
        await self.promote()

    async def return_of_the_old_primary(self) -> None:
        """It comes up as it was: nobody told it that there is another primary."""
        await asyncio.to_thread(self.primary.postgres.start, _NODE)


@asynccontextmanager
async def postgres_pair() -> AsyncIterator[Pair]:
    """Start both, the replica with all that the primary has."""
    with ExitStack() as stack:
        pair = await asyncio.to_thread(_start, stack)
        try:
            await pair.caught_up()
            yield pair
        finally:
            await asyncio.to_thread(stack.close)


@asynccontextmanager
async def connection_to(node: embedded.Servers) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(node.database_url)
    try:
        yield connection
    finally:
        connection.terminate()


async def query(node: embedded.Servers, statement: str) -> Any:
    """Run one statement on one node; returns its first value."""
    async with connection_to(node) as connection:
        return await connection.fetchval(statement)


def socket_of(node: embedded.Servers) -> Path:
    return Path(str(make_url(node.database_url).query["host"])) / ".s.PGSQL.5432"


def _start(stack: ExitStack) -> Pair:
    primary = stack.enter_context(embedded.start())
    asyncio.run(make_tables(primary.database_url))
    # A copy made while nothing runs: that needs no program beside the server's.
    primary.postgres.stop()
    account, copy = Account.choose(), primary.directory / "replica"
    shutil.copytree(primary.postgres.data, copy / "postgres")
    for path in (copy, *copy.rglob("*")):
        account.own(path)
    primary.postgres.start(_NODE)
    (copy / "postgres" / "standby.signal").touch()
    source = f"host={socket_of(primary).parent} port=5432 user=postgres"
    with (copy / "postgres" / "postgresql.auto.conf").open("a") as settings:
        settings.write(f"primary_conninfo = '{source}'\n")
    return Pair(primary, stack.enter_context(embedded.start(copy, valkey=False, postgres_config=_NODE)))


async def make_tables(url: str) -> None:
    """Bring jobq's tables into the database of a server that was started for a test."""
    engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"), poolclass=NullPool)
    await jobq.migrate.upgrade(engine)
    await engine.dispose()
