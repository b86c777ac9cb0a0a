"""What something costs, counted and not timed: round trips and statements, Redis commands, bytes of WAL.

1. A `Wire` stands before PostgreSQL and counts what its clients send: statements by the names of their SQL files.
2. Redis counts its commands itself, those of scripts among them; so does PostgreSQL its WAL. Both servers are this
   module's own, since somebody else's commands and bytes would be counted too.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import asyncpg

import jobq
from jobq import embedded
from tests.faults.proxy import postgres_proxy
from tests.postgres_pair import make_tables

_SSL_REQUEST = 80877103
_PLACEHOLDER = re.compile(r"\$\d+(::[A-Z ]+)?|(?<![:\w]):[a-z_]+")
_CONNECTING = {"info", "hello", "auth", "select", "ping", "client|setinfo", "client|setname"}
"""What a new connection says, and what the count itself costs."""

QUIET = {"autovacuum": "off", "checkpoint_timeout": "1h", "max_wal_size": "8GB", "full_page_writes": "off"}
"""Nothing but what the clients ask for is written; images of whole pages depend on when a checkpoint was."""


@dataclass
class Cost:
    """What a block has cost; filled in at its end."""

    statements: list[str] = field(default_factory=list)
    """In their order: the name of the SQL file, or the text of any other statement."""
    round_trips: int = 0
    """How often a client of PostgreSQL waited for an answer."""
    commands: dict[str, int] = field(default_factory=dict)
    """Redis commands by name, those that scripts call among them."""
    wal_bytes: int = 0


class Wire:
    """What clients have asked of PostgreSQL, as a proxy before it hears them."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.round_trips = 0

    @classmethod
    @asynccontextmanager
    async def before(cls, url: str) -> AsyncIterator[tuple[Wire, str]]:
        """Run a proxy, and give the URL that leads through it."""
        wire = cls()
        async with postgres_proxy(url) as (proxy, through):
            proxy.listener = lambda: _Requests(wire).take
            yield wire, through.partition("?")[0]  # SQLAlchemy passes on what asyncpg does not take


class _Requests:
    """The messages of one client, in whatever pieces they come."""

    def __init__(self, wire: Wire):
        self._wire = wire
        self._rest = b""
        self._has_begun = False
        self._texts: dict[bytes, bytes] = {}
        self._bound: dict[bytes, bytes] = {}

    def take(self, data: bytes) -> None:
        self._rest += data
        while (message := self._next()) is not None:
            self._count(*message)

    def _next(self) -> tuple[bytes, bytes] | None:
        """Cut the next whole message off: its kind and its body. The first of a connection has no kind."""
        kind_end = 1 if self._has_begun else 0
        if len(self._rest) < kind_end + 4:
            return None
        end = kind_end + int.from_bytes(self._rest[kind_end : kind_end + 4], "big")
        if len(self._rest) < end:
            return None
        kind, body = self._rest[:kind_end], self._rest[kind_end + 4 : end]
        self._rest = self._rest[end:]
        if not self._has_begun:
            self._has_begun = int.from_bytes(body[:4], "big") != _SSL_REQUEST
        return kind, body

    def _count(self, kind: bytes, body: bytes) -> None:
        match kind:
            case b"P":  # Parse
                name, text, _ = body.split(b"\0", 2)
                self._texts[name] = text
            case b"B":  # Bind
                portal, name, _ = body.split(b"\0", 2)
                self._bound[portal] = self._texts[name]
            case b"E":  # Execute
                self._wire.statements.append(_named(self._bound[body.partition(b"\0")[0]]))
            case b"Q":  # Query: text that goes and is answered by itself
                self._wire.statements.append(_named(body.rstrip(b"\0")))
                self._wire.round_trips += 1
            case b"S" | b"H":  # Sync, Flush: the client waits for what it has sent so far
                self._wire.round_trips += 1


def _named(text: bytes) -> str:
    said = text.decode().strip().rstrip(";")
    return _names().get(_without_placeholders(said), said)


@cache
def _names() -> dict[str, str]:
    """Names of jobq's statements by their texts."""
    names = {}
    for path in (Path(jobq.__file__).parent / "outbox" / "sql").glob("*.sql"):
        lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("--")]
        names[_without_placeholders("\n".join(lines).replace("{schema}", '"jobq"'))] = path.stem
    return names


def _without_placeholders(text: str) -> str:
    return " ".join(_PLACEHOLDER.sub("?", text).split())


@dataclass
class Meter:
    """Reads all counters before and after a block."""

    wire: Wire
    url: str
    """Of the database, through the wire."""
    direct_url: str
    redis_url: str
    redis: Any
    database: asyncpg.Connection
    """A connection that is not counted."""

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Cost]:
        cost = Cost()
        commands, wal_at = await self._commands(), await self._wal_at()
        statements, round_trips = len(self.wire.statements), self.wire.round_trips
        yield cost
        cost.statements = self.wire.statements[statements:]
        cost.round_trips = self.wire.round_trips - round_trips
        cost.wal_bytes = await self._wal_at() - wal_at
        cost.commands = dict(await self._commands() - commands)

    async def _commands(self) -> Counter[str]:
        found = await self.redis.info("commandstats")
        calls = Counter({name.removeprefix("cmdstat_"): stat["calls"] for name, stat in found.items()})
        return Counter({name: count for name, count in calls.items() if name not in _CONNECTING})

    async def _wal_at(self) -> int:
        return int(await self.database.fetchval("SELECT pg_current_wal_insert_lsn() - '0/0'"))


@contextmanager
def quiet_servers() -> Iterator[embedded.Servers]:
    """Servers that do nothing of their own accord, with jobq's tables."""
    with embedded.start(postgres_config=QUIET) as servers:
        asyncio.run(make_tables(servers.database_url))
        yield servers
