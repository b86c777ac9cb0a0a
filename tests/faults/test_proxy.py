"""The proxy breaks what it is told to break, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
import redis

from jobq.broker.client import connect
from tests.faults.proxy import Proxy, postgres_proxy, proxy_before, redis_proxy
from tests.waiting import until

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Echo:
    """A server that answers each line with itself, and remembers it."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.opened = self.closed = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            while line := await reader.readline():
                self.lines.append(line)
                writer.write(line)
        except ConnectionError:
            pass
        self.closed += 1
        writer.transport.abort()


class Clients:
    """Connections to a proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._streams: list[Streams] = []

    async def open(self) -> Streams:
        streams = await asyncio.open_connection("127.0.0.1", self._proxy.port)
        self._streams.append(streams)
        return streams

    async def close(self) -> None:
        for _, writer in self._streams:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@asynccontextmanager
async def echo_behind_proxy(directory: Path) -> AsyncIterator[tuple[Echo, Proxy, Clients]]:
    echo = Echo()
    server = await asyncio.start_unix_server(echo.serve, directory / "echo")
    async with proxy_before(directory / "echo") as proxy:
        clients = Clients(proxy)
        yield echo, proxy, clients
        await clients.close()
    await until(lambda: echo.closed == echo.opened, "the server has seen every connection end")
    server.close()


async def ask(streams: Streams, line: bytes) -> bytes:
    streams[1].write(line)
    return await streams[0].readline()


async def test_what_is_sent_comes_through_both_ways(tmp_path: Path) -> None:
    async with echo_behind_proxy(tmp_path) as (echo, proxy, clients):
        client = await clients.open()
        assert await ask(client, b"one\n") == b"one\n"
        assert await ask(client, b"x" * 50_000 + b"\n") == b"x" * 50_000 + b"\n"
        assert (echo.lines[0], proxy.accepted, proxy.losses) == (b"one\n", 1, 0)
        client[1].close()
        await until(lambda: proxy.open_connections == 0, "the proxy has let go")


async def test_a_lost_request_never_arrives_and_the_client_is_cut(tmp_path: Path) -> None:
    async with echo_behind_proxy(tmp_path) as (echo, proxy, clients):
        client = await clients.open()
        proxy.lose_request(b"two")
        assert await ask(client, b"one\n") == b"one\n"
        with pytest.raises(ConnectionResetError):
            await ask(client, b"two\n")
        assert (echo.lines, proxy.losses) == ([b"one\n"], 1)


async def test_a_lost_reply_leaves_the_request_done(tmp_path: Path) -> None:
    async with echo_behind_proxy(tmp_path) as (echo, proxy, clients):
        client = await clients.open()
        proxy.lose_reply(b"two")
        with pytest.raises(ConnectionResetError):
            await ask(client, b"two\n")
        assert echo.lines == [b"two\n"]
        again = await clients.open()
        assert await ask(again, b"two\n") == b"two\n"


async def test_a_silent_loss_leaves_the_client_waiting(tmp_path: Path) -> None:
    async with echo_behind_proxy(tmp_path) as (_, proxy, clients):
        client = await clients.open()
        proxy.lose_reply(silent=True)
        waiting = asyncio.ensure_future(ask(client, b"one\n"))
        await until(lambda: proxy.losses == 1, "the reply is lost")
        assert not waiting.done()
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await waiting


async def test_a_half_open_connection_is_gone_for_the_server_only(tmp_path: Path) -> None:
    async with echo_behind_proxy(tmp_path) as (echo, proxy, clients):
        client = await clients.open()
        assert await ask(client, b"one\n") == b"one\n"
        proxy.half_open()
        await until(lambda: echo.closed == 1, "the server sees the end")
        waiting = asyncio.ensure_future(ask(client, b"two\n"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.05)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await waiting
        assert echo.lines == [b"one\n"]


async def test_a_black_hole_takes_connections_and_answers_nothing(tmp_path: Path) -> None:
    async with echo_behind_proxy(tmp_path) as (echo, proxy, clients):
        proxy.is_black_hole = True
        waiting = asyncio.ensure_future(ask(await clients.open(), b"one\n"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.05)
        proxy.is_black_hole = False
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await waiting
        assert await ask(await clients.open(), b"two\n") == b"two\n"
        assert echo.lines == [b"two\n"]


async def test_a_refusing_proxy_closes_new_connections(tmp_path: Path) -> None:
    async with echo_behind_proxy(tmp_path) as (echo, proxy, clients):
        proxy.is_refusing = True
        assert await (await clients.open())[0].read() == b""
        proxy.is_refusing = False
    assert echo.opened == 0


async def test_latency_delays_both_ways(tmp_path: Path) -> None:
    async with echo_behind_proxy(tmp_path) as (_, proxy, clients):
        client = await clients.open()
        proxy.latency_s = 0.05
        started = asyncio.get_running_loop().time()
        await ask(client, b"one\n")
        assert asyncio.get_running_loop().time() - started >= 0.1


async def test_it_stands_before_redis_at_a_port_or_a_socket(redis_url: str, tmp_path: Path) -> None:
    async with redis_proxy(redis_url) as (proxy, url):
        client = connect(url)
        await client.set("a", "1")
        proxy.cut()
        with pytest.raises(redis.ConnectionError):
            await client.get("a")
        assert await client.get("a") == b"1"
        await client.aclose()
        async with proxy_before(("127.0.0.1", proxy.port), at=tmp_path / "socket"):
            client = connect(f"unix://{tmp_path / 'socket'}")
            assert await client.get("a") == b"1"
            await client.aclose()


async def test_it_stands_before_postgresql(database_url: str) -> None:
    async with postgres_proxy(database_url) as (proxy, url):
        connection = await asyncpg.connect(url)
        assert await connection.fetchval("SELECT 1") == 1
        proxy.lose_reply(b"SELECT 2")
        with pytest.raises((asyncpg.PostgresConnectionError, ConnectionError)):
            await connection.fetchval("SELECT 2")
        assert connection.is_closed()
