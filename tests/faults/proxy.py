"""A small proxy that stands before PostgreSQL or Redis and breaks connections on order.

A request is what a client sends in one piece, the reply what comes next. Of the protocols it knows one thing: which
statement a client of PostgreSQL executes, since that is sent once and has a name from then on. Both sides may be TCP or
a unix socket. Nothing goes wrong unless a test says so.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

Address = Path | tuple[str, int]
_CHUNK = 1 << 20
_RESET = struct.pack("ii", 1, 0)
_LONGEST_REPLY_S = 5.0


class Fault(enum.Enum):
    """What can happen to a connection when a certain request is under way."""

    LOSE_REQUEST = "the request is lost, the connection reset"
    LOSE_REPLY = "the reply is lost, the connection reset"
    SWALLOW_REQUEST = "the request is lost, the client not told"
    SWALLOW_REPLY = "the reply is lost, the client not told"
    DROP_BEFORE = "closed in order before the request"
    DROP_AFTER = "closed in order after the request and before its reply"
    BLACK_HOLE = "for a while nothing passes, and those who were connected do not hear of each other again"
    LATE = "the request arrives late, be the client still there or not"
    HALF_OPEN = "the server has closed every connection, the clients are not told"
    RESET = "every connection is reset"


_OF_REPLIES = (Fault.LOSE_REPLY, Fault.SWALLOW_REPLY, Fault.DROP_AFTER)


@dataclass(frozen=True)
class _Strike:
    """A fault that waits for a request with all of `match` in it."""

    fault: Fault
    match: tuple[bytes, ...]


class _Statements:
    """The statements of one connection to PostgreSQL."""

    def __init__(self) -> None:
        self._texts: dict[bytes, bytes] = {}
        self._transaction: list[bytes] = []

    def said(self, data: bytes) -> bytes:
        """What a piece asks for: the texts of the statements it executes, with their arguments.

        A COMMIT comes with all that its transaction executed; a statement that is only prepared is none yet.
        """
        if data[:1] == b"\0":
            return data  # the first message of a connection has no kind
        said: list[bytes] = []
        while len(data) >= 5:
            kind, end = data[:1], 1 + int.from_bytes(data[1:5], "big")
            body, data = data[5:end], data[end:]
            if kind == b"P":
                name, text, _ = body.split(b"\0", 2)
                self._texts[name] = text
            elif kind == b"B":
                _, name, arguments = body.split(b"\0", 2)
                said += [self._texts.get(name, b""), arguments]
            elif kind == b"Q":
                said += [body, *(self._transaction if body.startswith(b"COMMIT") else ())]
        self._transaction = [] if any(text.startswith(b"BEGIN") for text in said) else self._transaction + said
        return b"\n".join(said)


@dataclass(eq=False)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    statements: _Statements | None = None
    listen: Callable[[bytes], None] | None = None
    is_silent: bool = False
    """Whether the client hears nothing more, and is not told so."""
    has_client: bool = True
    lost: _Strike | None = None
    """The loss of a reply that is on its way."""
    replied: asyncio.Event = field(default_factory=asyncio.Event)

    def said(self, data: bytes) -> bytes:
        return data if self.statements is None else self.statements.said(data)

    def close(self) -> None:
        self.client.close()
        self.server.close()

    def cut(self) -> None:
        for writer in (self.client, self.server):
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.family != socket.AF_UNIX and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


@dataclass
class Proxy:
    """Passes bytes between clients and one server.

    1. `latency_s` delays every piece, 2. `arm`, `lose_request` and `lose_reply` strike once at the next request that
    contains some bytes, 3. `cut`, `half_open` and `is_black_hole` strike every connection there is.
    """

    target: Address
    is_postgres: bool = False
    latency_s: float = 0.0
    late_s: float = 2.0
    """How late a request is that arrives late."""
    black_hole_s: float = 2.0
    """How long a black hole lasts that was armed."""
    is_black_hole: bool = False
    """Nothing passes in either direction; connections stay open and new ones are taken. What came meanwhile is
    lost, so end it together with cut()."""
    is_refusing: bool = False
    """New connections are closed at once."""
    accepted: int = 0
    """Connections taken so far."""
    losses: int = 0
    """Requests and replies struck so far."""
    requests: list[bytes] | None = None
    """Every request, for a test that has put a list here."""
    listener: Callable[[], Callable[[bytes], None]] | None = None
    """Makes, for each connection, what is called with every piece that its client sends."""
    port: int = 0
    _server: asyncio.Server | None = None
    _armed: list[_Strike] = field(default_factory=list)
    _connections: set[_Connection] = field(default_factory=set)
    _handlers: set[asyncio.Task[None]] = field(default_factory=set)

    def arm(self, fault: Fault, *match: bytes) -> None:
        """Strike at the next request with every `match` in it."""
        self._armed.append(_Strike(fault, match))

    def lose_request(self, match: bytes = b"", *, silent: bool = False) -> None:
        """The next request with `match` in it never arrives; the connection is cut, or silent for ever."""
        self.arm(Fault.SWALLOW_REQUEST if silent else Fault.LOSE_REQUEST, match)

    def lose_reply(self, match: bytes = b"", *, silent: bool = False) -> None:
        """The server does the next request with `match` in it, and its reply never arrives; then likewise."""
        self.arm(Fault.SWALLOW_REPLY if silent else Fault.LOSE_REPLY, match)

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

    @property
    def clients(self) -> int:
        """Connections that a client has not closed, be they of use or not."""
        return sum(connection.has_client for connection in self._connections)

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
        connection = _Connection(writer, server_writer, _Statements() if self.is_postgres else None)
        if self.listener is not None:
            connection.listen = self.listener()
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
            if connection.listen is not None:
                connection.listen(data)
            said = connection.said(data)
            if self.requests is not None:
                self.requests.append(said)
            strike = next((strike for strike in self._armed if all(match in said for match in strike.match)), None)
            if strike is not None:
                self._armed.remove(strike)
                await self._strike(strike, connection)
            if not self.is_black_hole and not connection.is_silent:
                connection.replied.clear()
                connection.server.write(data)
                if strike is not None and strike.fault is Fault.LATE:
                    await self._reply_to(connection)
        connection.has_client = False
        if connection.lost is not None:
            self._armed.append(connection.lost)  # the client did not wait for the reply that was to be lost
            connection.lost = None
        if not (self.is_black_hole or connection.is_silent):
            connection.server.close()

    async def _pass_replies(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        while data := await _read(reader):
            await asyncio.sleep(self.latency_s)
            connection.replied.set()
            if connection.lost is not None:
                self._lose(connection, connection.lost)
                connection.lost = None
            elif not self.is_black_hole and not connection.is_silent and connection.has_client:
                connection.client.write(data)
        if not connection.is_silent:
            connection.client.close()

    async def _strike(self, strike: _Strike, connection: _Connection) -> None:
        if strike.fault in _OF_REPLIES:
            connection.lost = strike
            return
        match strike.fault:
            case Fault.BLACK_HOLE:
                self.is_black_hole = True
                asyncio.get_running_loop().call_later(self.black_hole_s, self._end_black_hole)
            case Fault.LATE:
                await asyncio.sleep(self.late_s)
            case Fault.HALF_OPEN:
                self.half_open()
            case Fault.RESET:
                connection.is_silent = True
                self.cut()
            case _:
                self._lose(connection, strike)
                return
        self.losses += 1

    def _lose(self, connection: _Connection, strike: _Strike) -> None:
        self.losses += 1
        connection.is_silent = True
        if strike.fault in (Fault.LOSE_REQUEST, Fault.LOSE_REPLY):
            connection.cut()
        elif strike.fault in (Fault.DROP_BEFORE, Fault.DROP_AFTER):
            connection.close()

    def _end_black_hole(self) -> None:
        self.is_black_hole = False
        for connection in self._connections:
            connection.is_silent = True
            connection.server.close()  # whose keepalives were not answered

    async def _reply_to(self, connection: _Connection) -> None:
        """Wait for what a late request came to: closed before, the server might not do it at all."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_REPLY_S):
                await connection.replied.wait()


@asynccontextmanager
async def proxy_before(target: Address, at: Path | None = None, *, is_postgres: bool = False) -> AsyncIterator[Proxy]:
    """Run a proxy before a server."""
    proxy = Proxy(target, is_postgres)
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
    async with proxy_before(target, is_postgres=True) as proxy:
        login = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
        yield proxy, f"postgresql://{login}127.0.0.1:{proxy.port}{parts.path}?sslmode=disable"


async def _read(reader: asyncio.StreamReader) -> bytes:
    with suppress(OSError):
        return await reader.read(_CHUNK)
    return b""
