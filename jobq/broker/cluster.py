"""Clients of a cluster: each command goes to the node that has its keys.

Invariant: a command is sent once, but for redirections, which say that a node did nothing. Which node has a slot is
learned from redirections alone, and forgotten with the first trouble, so that a lost or emptied node cannot mislead
for long. redis-py's own cluster clients are not used: they send again up to 16 times, send ASKING on another
connection than the command, and close the connections of calls under way. Called by client. Calls url.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import redis
import redis.asyncio
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, NoPermissionError, TryAgainError

from .url import Host, RedisUrl

_REDIRECTIONS = 5
_SCRIPTS = frozenset({"EVAL", "EVALSHA"})
_WORDS: dict[str, Any] = {
    "ASK": AskError,
    "MOVED": MovedError,
    "TRYAGAIN": TryAgainError,
    "CLUSTERDOWN": ClusterDownError,
}
"""What redis-py before 6 knows in its own cluster clients only."""


class _Map:
    """Who has which slot, as far as anybody has told."""

    def __init__(self, hosts: Iterable[Host]):
        self._hosts = list(hosts)
        """Nodes to ask about a slot nobody has told about, the most promising first."""
        self._slots: dict[int, Host] = {}

    def find(self, slot: int | None) -> Host:
        return self._hosts[0] if slot is None else self._slots.get(slot, self._hosts[0])

    def learn(self, slot: int, host: Host) -> None:
        self._slots[slot] = host
        if host not in self._hosts:
            self._hosts.append(host)

    def forget(self, host: Host) -> None:
        """A call to this node came to no good end: ask others first."""
        self._slots = {slot: at for slot, at in self._slots.items() if at != host}
        if host in self._hosts:  # one that only had a command sent on to it is not
            self._hosts.remove(host)
            self._hosts.append(host)


class _Way:
    """One command's way through the cluster."""

    def __init__(self, nodes: _Map, command: Sequence[Any]):
        self._nodes = nodes
        self._left = _REDIRECTIONS
        self.host = nodes.find(_slot(command))
        self._is_bell = command[0] == "BLPOP"
        self.is_asking = False
        """Whether the slot is on the move, and this node takes commands that say they know."""

    def goes_on(self, error: BaseException) -> bool:
        """Whether this error says where to go next, since the node did nothing."""
        if isinstance(error, AskError) and self._left:  # a MovedError is one
            self._left -= 1
            self.host = (error.host or self.host[0], error.port)
            self.is_asking = not isinstance(error, MovedError)
            if not self.is_asking:
                self._nodes.learn(error.slot_id, self.host)
            return True
        has_answered = isinstance(error, redis.ResponseError) and not isinstance(error, (ClusterDownError, AskError))
        # A deadline that passed is a silent node; but whoever waits for a bell may be called off.
        if not has_answered and not (self._is_bell and isinstance(error, asyncio.CancelledError)):
            self._nodes.forget(self.host)
        return False


class AsyncCluster(redis.asyncio.Redis):
    """One ordinary client for each node."""

    def __init__(self, at: RedisUrl, kind: type[redis.asyncio.Redis], shared: dict[str, Any]):
        super().__init__()
        self._nodes = _Map(at.hosts)
        self._kind = kind
        self._options = {**at.options, **shared}
        self._clients: dict[Host, Any] = {}

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        way = _Way(self._nodes, args)
        while True:
            try:
                client = _of(self, way.host)
                if way.is_asking:
                    return _answer(await _asking(client, args, options).execute(raise_on_error=False))
                return await client.execute_command(*args, **options)
            except BaseException as error:
                named = _named(error)
                if way.goes_on(named):
                    continue
                if named is error:
                    raise
                raise named from None

    async def taken(self, lists: Sequence[str], *, within_s: float) -> set[str]:
        """Take an element of one list, as BLPOP does. Returns the lists that lost one, or may have."""
        slots: dict[int, list[str]] = {}
        for name in lists:
            slots.setdefault(key_slot(name.encode()), []).append(name)
        pops = [asyncio.ensure_future(self.blpop(names, timeout=within_s)) for names in slots.values()]
        try:
            for pop in asyncio.as_completed(pops):
                if await pop is not None:
                    break
        finally:
            for one in pops:
                one.cancel()
            ends: list[Any] = await asyncio.gather(*pops, return_exceptions=True)
        taken: set[str] = set()
        for names, end in zip(slots.values(), ends, strict=True):
            if isinstance(end, BaseException):
                taken |= set(names)  # interrupted, it may have taken any without telling
            elif end is not None:
                taken.add(end[0].decode())
        return taken

    async def sent_at_bell(self, bell: str, command: Sequence[Any], *, within_s: float) -> Any:
        """Send a command after a wait for an element of a list. Returns its reply, whether or not one came."""
        await self.taken([bell], within_s=within_s)
        return await self.execute_command(*command)

    async def masters(self) -> dict[str, Any]:
        """A client for each node that has slots, by a name for people."""
        asked = self._nodes.find(None)
        try:
            slots = await self.execute_command("CLUSTER SLOTS")
        except NoPermissionError:
            return {"one node of a cluster": self}
        except redis.ResponseError:
            return {"which is no cluster": self}
        hosts = sorted({(host.decode() or asked[0], port) for _, _, (host, port, *_), *_ in slots})
        return {f"{host}:{port}, one of {len(hosts)} masters": _of(self, (host, port)) for host, port in hosts}

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Any:
        """Commands one after the other: each may be for another node."""
        return _OneByOne(self)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        for client in self._clients.values():
            await client.aclose()


class _OneByOne:
    """What a pipeline without a transaction promises, and no more."""

    def __init__(self, client: AsyncCluster):
        self._client = client
        self._commands: list[tuple[Any, ...]] = []

    def execute_command(self, *command: Any) -> None:
        self._commands.append(command)

    async def execute(self, *, raise_on_error: bool) -> list[Any]:
        replies: list[Any] = []
        for command in self._commands:
            try:
                replies.append(await self._client.execute_command(*command))
            except redis.ResponseError as error:
                if raise_on_error:
                    raise
                replies.append(error)
        return replies


class Cluster(redis.Redis):
    """The same for the heartbeat's thread."""

    def __init__(self, at: RedisUrl, kind: type[redis.Redis], shared: dict[str, Any]):
        super().__init__()
        self._nodes = _Map(at.hosts)
        self._kind = kind
        self._options = {**at.options, **shared}
        self._clients: dict[Host, Any] = {}

    def execute_command(self, *args: Any, **options: Any) -> Any:
        way = _Way(self._nodes, args)
        while True:
            try:
                client = _of(self, way.host)
                if way.is_asking:
                    return _answer(_asking(client, args, options).execute(raise_on_error=False))
                return client.execute_command(*args, **options)
            except BaseException as error:
                named = _named(error)
                if way.goes_on(named):
                    continue
                if named is error:
                    raise
                raise named from None

    def close(self) -> None:
        for client in self._clients.values():
            client.close()


def _of(cluster: AsyncCluster | Cluster, host: Host) -> Any:
    """The client of one node."""
    if host not in cluster._clients:
        cluster._clients[host] = cluster._kind(host=host[0], port=host[1], **cluster._options)
    return cluster._clients[host]


def _asking(client: Any, command: Sequence[Any], options: dict[str, Any]) -> Any:
    """A command with the word that lets it through to a slot on the move; both on one connection."""
    together = client.pipeline(transaction=False)
    together.execute_command("ASKING")
    together.execute_command(*command, **options)
    return together


def _answer(replies: Sequence[Any]) -> Any:
    for reply in replies:
        if isinstance(reply, Exception):  # the first may be that this user must not say ASKING
            raise reply
    return replies[1]


def _named(error: BaseException) -> BaseException:
    """The error by its kind, whichever redis-py made it."""
    word, _, rest = str(error).partition(" ")
    if type(error) is redis.ResponseError and word in _WORDS:
        named: BaseException = _WORDS[word](rest)
        return named
    return error


def _slot(command: Sequence[Any]) -> int | None:
    """The slot of a command's first key; jobq's commands have all their keys in one."""
    if len(command) == 1:  # INFO, TIME: whichever node answers
        return None
    key = command[3 if command[0] in _SCRIPTS else 1]
    return key_slot(key if isinstance(key, bytes) else str(key).encode("utf-8", "surrogateescape"))
