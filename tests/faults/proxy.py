"""A small proxy that stands before PostgreSQL or Redis and breaks connections on order.

It knows nothing of either protocol: a request is what a client sends in one piece, the reply what comes next. Both
sides may be TCP or a unix socket. Nothing goes wrong unless a test says so.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

Address = Path | tuple[str, int]
_CHUNK = 1 << 20
_RESET = struct.pack("ii", 1, 0)


@dataclass
class _Loss:
    """One request to come whose request or reply gets lost."""

    match: bytes
    reply: bool
    silent: bool


@dataclass(eq=False)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    is_silent: bool = False
    """Whether the client hears nothing more, and is not told so."""
    lost: _Loss | None = None
    """The loss of a reply that is on its way."""

    def cut(self) -> None:
        for writer in (self.client, self.server):
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.family != socket.AF_UNIX and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


@dataclass
class Proxy:
    """Passes bytes between clients and one server.

    1. `latency_s` delays every piece, 2. `lose_request` and `lose_reply` strike once at the next request that
    contains some bytes, 3. `cut`, `half_open` and `is_black_hole` strike every connection there is.
    """

    target: Address
    latency_s: float = 0.0
    is_black_hole: bool = False
    """Nothing passes in either direction; connections stay open and new ones are taken. What came meanwhile is
    lost, so end it together with cut()."""
    is_refusing: bool = False
    """New connections are closed at once."""
    accepted: int = 0
    """Connections taken so far."""
    losses: int = 0
    """Requests and replies lost so far."""
    port: int = 0
    _server: asyncio.Server | None = None
    _losses: list[_Loss] = field(default_factory=list)
    _connections: set[_Connection] = field(default_factory=set)
    _handlers: set[asyncio.Task[None]] = field(default_factory=set)

    def lose_request(self, match: bytes = b"", *, silent: bool = False) -> None:
        """The next request with `match` in it never arrives; the connection is cut, or silent for ever."""
        self._losses.append(_Loss(match, reply=False, silent=silent))

    def lose_reply(self, match: bytes = b"", *, silent: bool = False) -> None:
        """The server does the next request with `match` in it, and its reply never arrives; then likewise."""
        self._losses.append(_Loss(match, reply=True, silent=silent))

    def cut(self) -> None:
        """Reset every connection."""
        for connection in list(self._connections):
            connection.cut()

    def say(self, data: bytes) -> None:
        """Send every client what the server never said: a reply that comes twice, or late."""
        for connection in self._connections:
            connection.client.write(data)

    def half_open(self) -> None:
        """Close every connection towards the server; the clients are not told."""
        for connection in self._connections:
            connection.is_silent = True
            connection.server.close()

    def half_open_and_cut(self) -> None:
        """Half open, then reset a moment later: as when a firewall forgets, and the kernel gives up."""
        self.half_open()
        asyncio.get_running_loop().call_later(0.02, self.cut)

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    async def listen(self, at: Path | None = None) -> None:
        """Take connections at a unix socket, or at a free TCP port of this machine."""
        if at is not None:
            self._server = await asyncio.start_unix_server(self._serve, at, limit=_CHUNK)
        else:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_CHUNK)
            self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Cut everything and stop listening."""
        assert self._server is not None
        self._server.close()
        self.cut()
        for handler in self._handlers:
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        try:
            await self._connect(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._handlers.discard(handler)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self.is_refusing:
            return
        if isinstance(self.target, Path):
            server_reader, server_writer = await asyncio.open_unix_connection(self.target, limit=_CHUNK)
        else:
            server_reader, server_writer = await asyncio.open_connection(*self.target, limit=_CHUNK)
        connection = _Connection(writer, server_writer)
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_requests(reader, connection))
                group.create_task(self._pass_replies(server_reader, connection))
        finally:
            self._connections.discard(connection)
            server_writer.transport.abort()

    async def _pass_requests(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        while data := await _read(reader):
            await asyncio.sleep(self.latency_s)
            loss = next((loss for loss in self._losses if loss.match in data), None)
            if loss is not None:
                self._losses.remove(loss)
                if not loss.reply:
                    self._lose(connection, loss)
                    continue
                connection.lost = loss
            if not self.is_black_hole and not connection.is_silent:
                connection.server.write(data)
        connection.server.close()

    async def _pass_replies(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        while data := await _read(reader):
            await asyncio.sleep(self.latency_s)
            if connection.lost is not None:
                self._lose(connection, connection.lost)
                connection.lost = None
            elif not self.is_black_hole and not connection.is_silent:
                connection.client.write(data)
        if not connection.is_silent:
            connection.client.close()

    def _lose(self, connection: _Connection, loss: _Loss) -> None:
        self.losses += 1
        connection.is_silent = True
        if not loss.silent:
            connection.cut()


@asynccontextmanager
async def proxy_before(target: Address, at: Path | None = None) -> AsyncIterator[Proxy]:
    """Run a proxy before a server."""
    proxy = Proxy(target)
    await proxy.listen(at)
    try:
        yield proxy
    finally:
        await proxy.close()


@asynccontextmanager
async def redis_proxy(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """Run a proxy before a Redis, and give the URL that leads through it."""
    parts = urlsplit(url)
    target: Address = (
        Path(parts.path) if parts.scheme == "unix" else (parts.hostname or "localhost", parts.port or 6379)
    )
    async with proxy_before(target) as proxy:
        path = "" if parts.scheme == "unix" else parts.path
        login = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
        yield proxy, f"redis://{login}127.0.0.1:{proxy.port}{path}"


@asynccontextmanager
async def postgres_proxy(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """Run a proxy before a PostgreSQL, and give the URL that leads through it."""
    parts = urlsplit(url)
    host = parts.hostname or parse_qs(parts.query).get("host", ["localhost"])[0]
    port = parts.port or 5432
    target: Address = Path(host) / f".s.PGSQL.{port}" if host.startswith("/") else (host, port)
    async with proxy_before(target) as proxy:
        login = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
        yield proxy, f"postgresql://{login}127.0.0.1:{proxy.port}{parts.path}?sslmode=disable"


async def _read(reader: asyncio.StreamReader) -> bytes:
    with suppress(OSError):
        return await reader.read(_CHUNK)
    return b""
