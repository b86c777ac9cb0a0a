"""Several hosts in one database URL: which of them a connection leads to, and what a dead one costs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from jobq.errors import ConfigurationError
from jobq.outbox.database import Database, is_unavailable
from tests.commands import Commands
from tests.faults.proxy import Proxy, proxy_before
from tests.postgres_pair import Pair, postgres_pair, query, socket_of
from tests.waiting import until


@pytest.fixture(scope="module")
async def pair() -> AsyncIterator[Pair]:
    async with postgres_pair() as pair:
        yield pair


@asynccontextmanager
async def hosts(pair: Pair, *, first: str) -> AsyncIterator[tuple[Proxy, str]]:
    """The proxy of the first host, and a URL with those of both."""
    nodes = [pair.primary, pair.replica] if first == "primary" else [pair.replica, pair.primary]
    async with proxy_before(socket_of(nodes[0])) as one, proxy_before(socket_of(nodes[1])) as other:
        yield one, f"postgresql://postgres@127.0.0.1:{one.port},127.0.0.1:{other.port}/postgres"


async def data_folder_behind(url: str) -> str:
    database = Database.of(url)
    connection = await database.connect(schema="jobq", name="jobq:test")
    try:
        return str(await connection.fetchval("SHOW data_directory"))
    finally:
        connection.terminate()
        await database.close()


@pytest.mark.parametrize("first", ["primary", "replica"])
async def test_of_several_hosts_the_primary_is_found_wherever_it_stands(pair: Pair, first: str) -> None:
    async with hosts(pair, first=first) as (_, url):
        assert await data_folder_behind(url) == str(pair.primary.postgres.data)


@pytest.mark.parametrize(
    "form",
    [
        "postgresql://postgres@/postgres?host={replica},{primary}",
        "postgresql://postgres@/postgres?host={replica},{primary}&port=5432",
        "postgresql://postgres@/postgres?port=5432,5432&host={replica},{primary}&target_session_attrs=read-write",
        "postgresql+asyncpg:///postgres?user=postgres&host={replica}%2C{primary}&prepared_statement_cache_size=0",
    ],
)
async def test_hosts_may_stand_in_the_query_as_libpq_has_it(pair: Pair, form: str) -> None:
    folders = {"replica": socket_of(pair.replica).parent, "primary": socket_of(pair.primary).parent}
    assert await data_folder_behind(form.format(**folders)) == str(pair.primary.postgres.data)


async def test_what_the_url_says_of_the_server_it_wants_stands(pair: Pair) -> None:
    async with hosts(pair, first="primary") as (_, url):
        database = Database.of(f"{url}?target_session_attrs=standby")
        async with database.engine.connect() as connection:
            folder = (await connection.exec_driver_sql("SHOW data_directory")).scalar()
        await database.close()
    assert folder == str(pair.replica.postgres.data)


async def test_a_host_that_answers_nothing_takes_its_own_time_only_and_is_asked_last_from_then_on(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobq.outbox.database._CONNECT_TIMEOUT_S", 6.0)
    async with hosts(pair, first="primary") as (dead, _), proxy_before(socket_of(pair.primary)) as living:
        dead.is_black_hole = True
        database = Database.of(f"postgresql://postgres@127.0.0.1:{dead.port},127.0.0.1:{living.port}/postgres")
        for _ in range(2):
            (await database.connect(schema="jobq", name="jobq:test")).terminate()
        await database.close()
        assert (dead.accepted, living.accepted) == (1, 2)


async def test_a_host_that_shuts_down_is_left_for_the_next(pair: Pair) -> None:
    """It tells everybody so for as long as somebody is connected; one that starts up does likewise."""
    async with postgres_pair() as other, hosts(other, first="primary") as (_, url):
        await other.promote()
        keeper = await asyncpg.connect(other.primary.database_url)
        os.kill(other.primary.postgres.pid, signal.SIGTERM)

        async def shuts_down() -> bool:
            try:
                await query(other.primary, "SELECT 1")
            except asyncpg.CannotConnectNowError as error:
                return is_unavailable(error)
            return False

        await until(shuts_down, "it takes nobody any more")
        assert await data_folder_behind(url) == str(other.replica.postgres.data)
        await keeper.close()


async def test_an_old_primary_that_comes_back_draws_nobody_away_from_the_new_one() -> None:
    async with postgres_pair() as pair, hosts(pair, first="primary") as (_, url):
        database = Database.of(url)

        async def behind() -> str:
            connection = await database.connect(schema="jobq", name="jobq:test")
            folder = await connection.fetchval("SHOW data_directory")
            connection.terminate()
            return str(folder)

        assert await behind() == str(pair.primary.postgres.data)
        await pair.fail_over()
        assert await behind() == str(pair.replica.postgres.data)
        await pair.return_of_the_old_primary()
        assert not await query(pair.primary, "SELECT pg_is_in_recovery()")
        assert await behind() == str(pair.replica.postgres.data)
        await database.close()


async def test_where_no_host_takes_writes_it_says_why(pair: Pair) -> None:
    async with hosts(pair, first="replica") as (replica, _):
        nowhere = f"127.0.0.1:{await _closed_port()}"
        for url, kind in (
            (f"127.0.0.1:{replica.port},127.0.0.1:{replica.port}", asyncpg.TargetServerAttributeNotMatched),
            (f"{nowhere},127.0.0.1:{replica.port}", ConnectionRefusedError),
            (f"127.0.0.1:{replica.port},{nowhere}", ConnectionRefusedError),
        ):
            database = Database.of(f"postgresql://postgres@{url}/postgres")
            with pytest.raises(kind) as caught:
                await database.connect(schema="jobq", name="jobq:test")
            await database.close()
            assert is_unavailable(caught.value)


async def _closed_port() -> int:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    return port


def test_hosts_and_ports_that_do_not_match_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="3 hosts and 2 ports"):
        Database.of("postgresql://shop@/shop?host=a,b,c&port=1,2")


async def test_a_dead_host_is_missed_soon_by_jobqs_connections_and_its_pool(pair: Pair) -> None:
    async with hosts(pair, first="primary") as (_, url):
        database = Database.of(url)
        own = await database.connect(schema="jobq", name="jobq:test")
        async with database.engine.connect() as pooled:
            driver = (await pooled.get_raw_connection()).driver_connection
            for connection in (own, driver):
                sock = connection._transport.get_extra_info("socket")
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                if hasattr(socket, "TCP_USER_TIMEOUT"):
                    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
        own.terminate()
        await database.close()


async def test_commands_take_several_hosts_and_mask_the_password_before_them(pair: Pair) -> None:
    async with hosts(pair, first="replica") as (proxy, url):
        commands = Commands(url, pair.redis_url)
        current = await commands.run("migrate", "current")
        assert "jobq_0002" in current.output
        assert (await commands.run("migrate", "upgrade")).exit_code == 0
        assert (await commands.run("status")).exit_code == 0

        nowhere = f"postgresql://shop:tiger@127.0.0.1:{await _closed_port()},127.0.0.1:{proxy.port}/shop"
        failed = await Commands(nowhere, pair.redis_url).run("status")
        assert failed.exit_code == 4
        assert "cannot reach PostgreSQL" in failed.output
        assert "shop:***@127.0.0.1" in failed.output
        assert "tiger" not in failed.output

        only_replicas = f"postgresql://postgres@127.0.0.1:{proxy.port},127.0.0.1:{proxy.port}/postgres"
        refused = await Commands(only_replicas, pair.redis_url).run("status")
        assert refused.exit_code == 4
        assert "cannot reach PostgreSQL" in refused.output

        replica = await Commands(pair.replica.database_url, pair.redis_url).run("status")
        assert replica.exit_code == 1
        assert "leads to a replica" in replica.output
