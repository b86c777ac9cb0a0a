"""Connections to the master that Sentinels name.

Invariant: every new connection asks the Sentinels and is then told by the server itself that it is the master, so
that a demoted one is left. Nothing is remembered between two connections. Called by client. Calls url.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncPool
from redis.asyncio.sentinel import SentinelManagedConnection as AsyncManaged
from redis.sentinel import SentinelConnectionPool, SentinelManagedConnection

from .url import Host, RedisUrl

ASK_S = 1.0
"""Longest wait for one Sentinel; then the next one is asked, and this one last from then on."""


class _Sentinels:
    """The Sentinels of a URL; the one that answered last comes first."""

    def __init__(self, at: RedisUrl, shared: dict[str, Any]):
        self.hosts = list(at.hosts)
        self._options = {**at.sentinel_options, **shared, "decode_responses": True}

    def client(self, kind: Callable[..., Any], host: Host) -> Any:
        return kind(host=host[0], port=host[1], **self._options)

    def put_last(self, host: Host) -> None:
        self.hosts.remove(host)
        self.hosts.append(host)


class AsyncSentinels(_Sentinels):
    """Finds the master for redis-py's pool."""

    async def discover_master(self, service: str) -> Host:
        """Ask one Sentinel after the other. Raises ConnectionError when none names a master."""
        problems = []
        for host in list(self.hosts):
            try:
                async with asyncio.timeout(ASK_S), self.client(redis.asyncio.Redis, host) as client:
                    found: Host | None = await client.sentinel_get_master_addr_by_name(service)
            except (redis.RedisError, OSError) as error:
                problems.append(_problem(host, error))
            else:
                if found is not None:
                    return found
                problems.append(f"{host[0]}:{host[1]} knows no service {service!r}")
            self.put_last(host)
        raise redis.ConnectionError(f"no Sentinel names a master: {', '.join(problems)}")


class Sentinels(_Sentinels):
    """The same for the heartbeat's thread."""

    def discover_master(self, service: str) -> Host:
        problems = []
        for host in list(self.hosts):
            try:
                with self.client(redis.Redis, host) as client:
                    found: Host | None = client.sentinel_get_master_addr_by_name(service)
            except (redis.RedisError, OSError) as error:
                problems.append(_problem(host, error))
            else:
                if found is not None:
                    return found
                problems.append(f"{host[0]}:{host[1]} knows no service {service!r}")
            self.put_last(host)
        raise redis.ConnectionError(f"no Sentinel names a master: {', '.join(problems)}")


class AsyncMasterConnection(AsyncManaged):
    """Asks the Sentinels, connects, and asks the server for its role."""

    async def connect_to(self, address: Host) -> None:
        await super().connect_to(address)  # type: ignore[no-untyped-call]
        try:
            # HELLO without an argument changes nothing, and needs no more rights than a login does; ROLE would.
            await self.send_command("HELLO", check_health=False)
            _check_role(await self.read_response(), address)
        except BaseException:
            await self.disconnect(nowait=True)
            raise


class AsyncMasterSSLConnection(AsyncMasterConnection, redis.asyncio.SSLConnection):
    """The same, encrypted."""


class MasterConnection(SentinelManagedConnection):
    """The same for the heartbeat's thread."""

    def connect_to(self, address: Host) -> None:
        super().connect_to(address)  # type: ignore[no-untyped-call]
        try:
            self.send_command("HELLO", check_health=False)  # type: ignore[no-untyped-call]
            _check_role(self.read_response(), address)
        except BaseException:
            self.disconnect()  # type: ignore[no-untyped-call]
            raise


class MasterSSLConnection(MasterConnection, redis.SSLConnection):
    """The same, encrypted."""


def async_pool(at: RedisUrl, shared: dict[str, Any]) -> AsyncPool:
    options = {**at.options, **shared}
    encrypted = options.pop("ssl", False)
    kind = AsyncMasterSSLConnection if encrypted else AsyncMasterConnection
    sentinels = AsyncSentinels(at, shared)
    return AsyncPool(at.service, sentinels, connection_class=kind, **options)  # type: ignore[no-untyped-call]


def pool(at: RedisUrl, shared: dict[str, Any]) -> SentinelConnectionPool:
    options = {**at.options, **shared}
    encrypted = options.pop("ssl", False)
    kind = MasterSSLConnection if encrypted else MasterConnection
    sentinels = Sentinels(at, {**shared, "socket_timeout": ASK_S, "socket_connect_timeout": ASK_S})
    return SentinelConnectionPool(at.service, sentinels, connection_class=kind, **options)  # type: ignore[no-untyped-call]


def _check_role(reply: Any, host: Host) -> None:
    """`reply` to HELLO: a map, or the same flat."""
    told = reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=False))
    if told.get(b"role") != b"master":
        raise redis.ConnectionError(
            f"{host[0]}:{host[1]}, which the Sentinels name, is not the master yet, or any more"
        )


def _problem(host: Host, error: Exception) -> str:
    return f"{host[0]}:{host[1]}: {str(error) or type(error).__name__}"
