"""The hosts of a database URL: a connection to the first of them that takes writes.

Invariant: no host takes the time of another, and none is gone without being missed. Called by database. Calls nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlencode

import asyncpg

from ..errors import ConfigurationError

_ELSEWHERE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.TargetServerAttributeNotMatched,
)
"""What another host may do better. A refused login, say, is none of it."""

# In the words of Linux; other systems know some of them. They find a dead host within ten seconds, asked or not.
_MISSED_SOON = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}


class Hosts:
    """Opens connections to one URL, `postgresql://` left off.

    1. Hosts are tried in their order, the one that served last before all others: an old primary that comes back,
    and does not know that it was replaced, draws nobody away from the new one.
    2. Of several hosts one is wanted that takes writes, unless the URL says otherwise.
    """

    def __init__(self, rest: str, *, timeout_s: float, statement_cache_size: int):
        self._urls = list(_apart(rest))
        self._timeout_s = timeout_s
        self._statement_cache_size = statement_cache_size

    async def open(self) -> asyncpg.Connection:
        """Open a connection. Raises what the first host raised that was not merely of the wrong kind."""
        errors: list[Exception] = []
        for url in self._urls:
            try:
                connection = await asyncpg.connect(
                    f"postgresql://{url}",
                    timeout=self._timeout_s / len(self._urls),
                    statement_cache_size=self._statement_cache_size,
                )
            except _ELSEWHERE as error:
                errors.append(error)
            else:
                self._urls.sort(key=lambda other: other != url)
                return connection
        errors.sort(key=lambda error: isinstance(error, asyncpg.TargetServerAttributeNotMatched))
        raise errors[0]


def miss_soon(connection: Any) -> None:
    """Have this end of a connection notice within about ten seconds that the other is gone without a word."""
    sock = connection._transport.get_extra_info("socket")  # asyncpg has no other way to it
    if sock is None or sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _MISSED_SOON.items():
        if (option := getattr(socket, name, None)) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _apart(rest: str) -> Iterator[str]:
    """The URL of each host, in the two forms of libpq: `h1:5432,h2:5433/db`, and `/db?host=h1,h2&port=5432,5433`."""
    place, _, words = rest.partition("?")
    netloc, slash, database = place.partition("/")
    login, at, listed = netloc.rpartition("@")
    query = dict(parse_qsl(words, keep_blank_values=True))
    hosts = (listed or query.pop("host", "")).split(",")
    if len(hosts) < 2:
        yield rest
        return
    ports = query.pop("port").split(",") if query.get("port") else []
    if len(ports) not in (0, 1, len(hosts)):
        raise ConfigurationError(f"the database URL names {len(hosts)} hosts and {len(ports)} ports")
    if "PGTARGETSESSIONATTRS" not in os.environ:
        query.setdefault("target_session_attrs", "read-write")
    for number, host in enumerate(hosts):
        words = urlencode(
            query | ({} if listed else {"host": host}) | ({"port": ports[number % len(ports)]} if ports else {})
        )
        yield f"{login}{at}{host if listed else ''}{slash}{database}?{words}"
