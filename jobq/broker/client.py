"""Connections to Redis or Valkey, made so that nothing is sent twice behind our back.

Invariant: no retries inside the client (redis-py re-sends a write up to 11 times by default; ours are over
idempotent scripts), no socket timeout (on Python 3.11 it swallows cancellation; callers put a deadline around
each call), and connections with unread replies are never reused. Called by scripts, relay, worker, cli.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

import hiredis
import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)
from redis.retry import Retry

from . import sentinel
from .cluster import AsyncCluster, Cluster
from .url import read

__all__ = [
    "TROUBLE",
    "UNAVAILABLE",
    "AsyncClient",
    "OutOfMemoryError",
    "ResponseError",
    "check_server",
    "connect",
    "connect_sync",
]

AsyncClient: TypeAlias = Any
"""redis.asyncio.Redis: its own annotations cannot say that replies are bytes."""

log = logging.getLogger(__name__)

_DEMOTED = (ReadOnlyError, MasterDownError)
"""What a server says that has become a replica."""

UNAVAILABLE: tuple[type[Exception], ...] = (
    redis.ConnectionError,
    redis.TimeoutError,
    BusyLoadingError,
    *_DEMOTED,
    ClusterDownError,
    TryAgainError,  # a slot on the move, with some of a queue's keys here and some there
    AskError,
    OSError,
    asyncio.TimeoutError,
)
"""What is raised when Redis cannot be had just now; trying again is the remedy."""

TROUBLE: tuple[type[Exception], ...] = (*UNAVAILABLE, ResponseError)
"""Also what a script raises over keys that somebody else wrote to; the keys are mended by then."""

CALL_TIMEOUT_S = 5.0
"""Longest wait for one reply; then the connection is dropped and the outcome is unknown."""
SYNC_TIMEOUT_S = 3.0
_AS_THEY_COME = ("EVALSHA", "BLPOP")
"""Commands that every job waits for, and whose replies need no reading by redis-py."""


class _Packing:
    """A connection whose commands hiredis packs: redis-py does so for blocking connections only."""

    def pack_command(self, *words: Any) -> list[bytes]:
        first, *rest = words
        names = first.encode().split() if isinstance(first, str) else [first]
        rest = [word.encode("utf-8", "surrogateescape") if isinstance(word, str) else word for word in rest]
        packed: Any = (*names, *rest)
        return [hiredis.pack_command(packed)]


@cache
def _packing(kind: type) -> type:
    return type(f"Packing{kind.__name__}", (_Packing, kind), {})


class _Client(redis.asyncio.Redis):
    """A client that leaves a server which takes no writes any more."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.connection_pool.connection_class = _packing(self.connection_pool.connection_class)  # type: ignore[arg-type]
        self._kept: list[Any] = []
        """Connections of the pool that wait for the next of _AS_THEY_COME."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            if args[0] in _AS_THEY_COME:
                return await self._send(args)
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except _DEMOTED:
            await self._leave_server()
            raise

    async def _leave_server(self) -> None:
        """Its idle connections lead to the same server; a new one leads to where the URL leads now."""
        while self._kept:
            await self.connection_pool.release(self._kept.pop())
        await self.connection_pool.disconnect(inuse_connections=False)

    async def _send(self, *commands: Sequence[Any]) -> Any:
        """Send commands at once on a connection that is kept for such. Returns the last reply, as it comes.

        Around each command redis-py counts, times and hands connections to and fro: longer than most of ours take.
        """
        connection = self._kept.pop() if self._kept else await self.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        is_last = False
        try:
            await self.connection_pool.ensure_connection(connection)
            packed = [part for command in commands for part in connection.pack_command(*command)]
            await connection.send_packed_command(packed, check_health=False)
            for _ in commands[1:]:
                await connection.read_response()
            is_last = True
            reply = await connection.read_response()
        except BaseException as error:
            if is_last and isinstance(error, ResponseError):
                self._kept.append(connection)
                raise
            # A reply may still come, or nothing any more.
            await connection.disconnect(nowait=True)
            await self.connection_pool.release(connection)
            raise
        self._kept.append(connection)
        return reply

    async def taken(self, lists: Sequence[str], *, within_s: float) -> set[str]:
        """Take an element of one list, as BLPOP does. Returns the list that lost one."""
        popped: Any = await self.blpop(list(lists), timeout=within_s)
        return set() if popped is None else {popped[0].decode()}

    async def sent_at_bell(self, bell: str, command: Sequence[Any], *, within_s: float) -> Any:
        """Send a command behind a wait for an element of a list. Returns its reply, whether or not one came."""
        try:
            return await self._send(("BLPOP", bell, within_s), command)
        except _DEMOTED:
            await self._leave_server()
            raise

    async def masters(self) -> dict[str, AsyncClient]:
        """Who takes writes, by a name for people; empty where the URL says it."""
        await self.info("server")  # which its user may ask
        address = getattr(self.connection_pool, "master_address", None)
        return {f"{address[0]}:{address[1]}, whom the Sentinels name" if address else "": self}


class _SyncClient(redis.Redis):
    """The same for the heartbeat's thread."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except _DEMOTED:
            self.connection_pool.disconnect(inuse_connections=False)
            raise


def connect(url: str) -> AsyncClient:
    """Make a client for one process. Opens nothing yet. Raises ConfigurationError for a bad URL."""
    at = read(url)
    shared = _options(AsyncRetry(NoBackoff(), 0), None)
    if at.kind == "sentinel":
        return _Client.from_pool(sentinel.async_pool(at, shared))
    if at.kind == "cluster":
        return AsyncCluster(at, _Client, shared)
    return _Client.from_url(url, **shared)


def connect_sync(url: str) -> redis.Redis:
    """Make the heartbeat thread's client: one connection, SYNC_TIMEOUT_S for each call."""
    at = read(url)
    shared = _options(Retry(NoBackoff(), 0), SYNC_TIMEOUT_S)
    if at.kind == "sentinel":
        return _SyncClient.from_pool(sentinel.pool(at, shared))
    if at.kind == "cluster":
        return Cluster(at, _SyncClient, shared)
    return _SyncClient.from_url(url, **shared)


async def check_server(client: AsyncClient) -> dict[str, Any]:
    """Say loudly what makes this server unfit. Returns version, eviction policy and persistence as found."""
    info: dict[str, Any] = {}
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            info = await client.info()
    except NoPermissionError:
        pass  # a user that may not ask can work all the same
    policy = info.get("maxmemory_policy", "unknown")
    if policy == "unknown":
        log.warning("redis does not tell this user its settings (+info): see that `maxmemory-policy` is noeviction")
    elif policy != "noeviction" and info.get("maxmemory", 0):
        log.error(
            "redis evicts keys: set `maxmemory-policy noeviction`, or whole queues vanish when memory is full "
            "and are rebuilt over and over",
            extra={"fields": {"maxmemory_policy": policy}},
        )
    elif policy != "noeviction":
        log.warning(
            "redis would evict keys if it had a memory limit: set `maxmemory-policy noeviction`",
            extra={"fields": {"maxmemory_policy": policy}},
        )
    return {
        "version": info.get("valkey_version") or info.get("redis_version", "unknown"),
        "server": "valkey" if "valkey_version" in info else "redis",
        "maxmemory": info.get("maxmemory", 0),
        "maxmemory_policy": policy,
        "aof_enabled": bool(info.get("aof_enabled", 0)),
    }


def _options(retry: AsyncRetry | Retry, timeout_s: float | None) -> dict[str, Any]:
    """What every connection of jobq's has, whichever kind of URL it comes from."""
    return {
        "retry": retry,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "encoding_errors": "surrogateescape",
        **_quiet_maintenance(),
    }


def _quiet_maintenance() -> dict[str, Any]:
    # Where it exists, its default switches off the check for unread replies on a pooled connection.
    try:
        from redis.maint_notifications import MaintNotificationsConfig
    except ImportError:
        return {}
    return {"maint_notifications_config": MaintNotificationsConfig(enabled=False)}
