"""The Lua scripts, one typed method each. Their contracts stand at the head of each file in lua/.

Invariant: every call has a deadline and may be repeated. Called by relay and worker. Calls client and keys.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any
from uuid import UUID

import redis
from redis.exceptions import NoScriptError, ResponseError

from ..model import Entry
from .client import CALL_TIMEOUT_S, AsyncClient
from .keys import Keys, queue_names

log = logging.getLogger(__name__)

ADOPT_TOKEN = "*"  # noqa: S105
"""Expected token of a relay that does not know what was there before."""

UNPARKED_A_CALL = 1000
"""Entries."""
QUEUES_LOOKED_AT = 1000
"""Names in the hint of queues."""

_GENERATION = re.compile(rb"[1-9][0-9]{0,9}")
_QUEUE = re.compile(rb"[a-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Pushed:
    pushed: int
    ready: tuple[int, int, int, int]
    """Lengths of the ready lists of priority 1 to 4."""


@dataclass(frozen=True, slots=True)
class Fetched:
    entries: list[bytes]
    left: int
    """Entries that stayed in the ready lists."""


@dataclass(frozen=True, slots=True)
class Unparked:
    entries: list[bytes]
    """What is now in the worker's working list."""
    back: int
    """Entries that went into the ready lists, and garbage that was dropped."""


@dataclass(frozen=True, slots=True)
class Beat:
    registered: bool
    """Whether Redis knew this worker before the beat."""
    unknown: list[bytes]
    lost: list[bytes]
    missing: list[bytes]


class Script:
    """One Lua file, sent by its hash."""

    def __init__(self, name: str):
        self.source = resources.files("jobq.broker").joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()

    async def run(self, client: AsyncClient, keys: Sequence[str], args: Iterable[Any]) -> Any:
        words = [*keys, *args]
        try:
            return await client.execute_command(*self.command(words, keys=len(keys)))
        except NoScriptError:
            return await client.eval(self.source, len(keys), *words)

    def command(self, words: Iterable[Any], *, keys: int) -> tuple[Any, ...]:
        """How Redis is asked to run it; the first `keys` of the words are keys."""
        return ("EVALSHA", self.sha, keys, *words)

    def run_sync(self, client: redis.Redis, keys: Sequence[str], args: Iterable[Any]) -> Any:
        words = [*keys, *args]
        try:
            return client.evalsha(self.sha, len(keys), *words)
        except NoScriptError:
            return client.eval(self.source, len(keys), *words)


script = cache(Script)


class Broker:
    """Everything jobq does in Redis for one database, queue by queue.

    A call that finds a key of the wrong type removes it (mend.lua) and raises the ResponseError: callers log it
    and try again, and the relay rebuilds the queue.
    """

    def __init__(self, client: AsyncClient, database_id: UUID):
        self.client = client
        self.database_id = database_id
        self._keys: dict[str, Keys] = {}

    def keys(self, queue: str) -> Keys:
        """The key names of a queue."""
        if queue not in self._keys:
            self._keys[queue] = Keys(self.database_id, queue)
        return self._keys[queue]

    async def push(
        self,
        queue: str,
        entries: Sequence[str | bytes],
        *,
        expected: str,
        token: str,
        counter: str = "pushed",
    ) -> Pushed | None:
        """Push entries if the relay's last token is still there; None if it is not. See push.lua."""
        keys = self.keys(queue)
        names = [keys.relay, keys.known, keys.bell, keys.stats, *keys.ready]
        reply = await self._run("push", queue, names, [expected, token, counter, *entries])
        if reply[0] < 0:
            return None
        return Pushed(reply[0], (reply[1], reply[2], reply[3], reply[4]))

    async def fetch(self, queue: str, worker: str, count: int) -> Fetched | None:
        """Take up to `count` entries; None for a worker that is fenced. See fetch.lua."""
        return _fetched(await self._run("fetch", queue, self._fetch_names(queue, worker), [worker, count]))

    async def fetch_at_bell(self, queue: str, worker: str, count: int, wait_s: float) -> Fetched | None:
        """The same after a wait for the queue's bell, in one round trip. Fetches also when no bell came."""
        names = self._fetch_names(queue, worker)
        fetch = script("fetch").command([*names, worker, count], keys=len(names))
        try:
            return _fetched(await self.client.sent_at_bell(self.keys(queue).bell, fetch, within_s=wait_s))
        except NoScriptError:
            return await self.fetch(queue, worker, count)
        except ResponseError as error:
            await self._mend_wrong_types(error, queue, names)
            raise

    def _fetch_names(self, queue: str, worker: str) -> list[str]:
        """The keys of fetch.lua, and the first ones of unpark.lua."""
        keys = self.keys(queue)
        return [keys.known, keys.beats, keys.bell, keys.stats, keys.working(worker), *keys.ready]

    async def ack(self, queue: str, worker: str, entries: Sequence[Entry | bytes], counter: str = "acked") -> int:
        """Forget settled entries, after their commit. See ack.lua."""
        keys = self.keys(queue)
        names = [keys.known, keys.stats, keys.working(worker)]
        return int(await self._run("ack", queue, names, [counter, *_raw(entries)]))

    async def release(self, queue: str, worker: str, entries: Sequence[Entry | bytes]) -> int:
        """Give entries back unrun. See release.lua."""
        keys = self.keys(queue)
        names = [keys.bell, keys.stats, keys.working(worker), *keys.ready]
        return int(await self._run("release", queue, names, _raw(entries)))

    async def park(self, queue: str, worker: str, task: str, entries: Sequence[Entry | bytes]) -> int:
        """Set entries of a task aside that this worker does not know. See park.lua."""
        keys = self.keys(queue)
        names = [keys.working(worker), keys.parked(task), keys.stats]
        return int(await self._run("park", queue, names, _raw(entries)))

    async def unpark(
        self, queue: str, worker: str, tasks: Sequence[str], *, room: int = 0, limit: int = UNPARKED_A_CALL
    ) -> Unparked:
        """Take up parked entries of tasks, `limit` a call: `room` by this worker, the rest by any. See unpark.lua."""
        names = [*self._fetch_names(queue, worker), *map(self.keys(queue).parked, tasks)]
        reply = await self._run("unpark", queue, names, [worker, limit, room])
        return Unparked(reply[1:], reply[0])

    async def sweep(
        self, queue: str, worker: str, seen: bytes, standings: Mapping[bytes, int]
    ) -> tuple[int, int] | None:
        """Take a dead worker's entries back: (taken back, dropped), or None if it lives. See sweep.lua."""
        keys = self.keys(queue)
        names = [
            keys.known,
            keys.beats,
            keys.workers,
            keys.bell,
            keys.stats,
            keys.working(worker),
            *keys.ready,
        ]
        pairs = [word for pair in standings.items() for word in pair]
        reply = await self._run("sweep", queue, names, [worker, seen, *pairs])
        return None if reply[0] < 0 else (reply[0], reply[1])

    async def mend(self, queue: str, names: Sequence[str] = ()) -> None:
        """Remove the keys of a queue, and `names`, that have another type than jobq gives them. See mend.lua."""
        types = _types(self.keys(queue), names)
        async with asyncio.timeout(CALL_TIMEOUT_S):
            removed = await script("mend").run(self.client, list(types), types.values())
        _report_mended(queue, removed)

    async def count(self, queue: str, counter: str, by: int = 1) -> None:
        """Count something that no script counts."""
        async with self._careful(queue):
            await self.client.hincrby(self.keys(queue).stats, counter, by)

    async def known(self, queue: str, ids: Sequence[UUID]) -> list[int]:
        """The generation Redis knows of each id; 0 for none, and for what no script of ours wrote."""
        async with self._careful(queue):
            found = await self.client.hmget(self.keys(queue).known, [id_.hex for id_ in ids])
        return list(map(_generation, found))

    async def beats(self, queue: str) -> dict[str, bytes]:
        """Each worker's counter as Redis holds it; empty for a worker that has a name there and no counter."""
        keys = self.keys(queue)
        async with self._careful(queue):
            counters, names = await asyncio.gather(self.client.hgetall(keys.beats), self.client.hkeys(keys.workers))
        silent = {name: b"" for name in names if name not in counters}
        return {_text(name): counter for name, counter in (counters | silent).items()}

    async def check_writable(self, queue: str) -> None:
        """Write nothing, also into a full Redis. Raises what refuses writes."""
        async with self._careful(queue):
            await self.client.hdel(self.keys(queue).beats, "")

    async def working(self, queue: str, worker: str) -> list[bytes]:
        """The entries in a worker's working list, as they stand."""
        working = self.keys(queue).working(worker)
        async with self._careful(queue, [working]):
            found: list[bytes] = await self.client.lrange(working, 0, -1)
        return found

    async def token(self, queue: str) -> bytes | None:
        """What the relay left at its last push."""
        async with self._careful(queue):
            token: bytes | None = await self.client.get(self.keys(queue).relay)
        return token

    async def listen(self, queues: Iterable[str], wait_s: float) -> set[str]:
        """Wait for the bell of one queue. Returns the queues whose bell was taken, or may have been."""
        bells = {self.keys(queue).bell: queue for queue in queues}
        taken: set[str] = await self.client.taken(list(bells), within_s=wait_s)
        return {bells[bell] for bell in taken}

    async def announce(self, queues: Iterable[str]) -> None:
        """Add queue names to the hint that sweepers and `status` read."""
        names = list(queues)
        if names:
            async with self._careful(None):
                await self.client.sadd(queue_names(self.database_id), *names)

    async def queues(self) -> set[str]:
        """Queue names anybody announced; of very many about QUEUES_LOOKED_AT, for who reads them reads each queue."""
        async with self._careful(None):
            _, names = await self.client.sscan(queue_names(self.database_id), count=QUEUES_LOOKED_AT)
        return {name.decode() for name in names if _QUEUE.fullmatch(name)}

    async def _run(self, name: str, queue: str, keys: Sequence[str], args: Iterable[Any]) -> Any:
        async with self._careful(queue, keys):
            return await script(name).run(self.client, keys, args)

    @asynccontextmanager
    async def _careful(self, queue: str | None, names: Sequence[str] = ()) -> AsyncIterator[None]:
        """Call Redis within CALL_TIMEOUT_S; what it finds to be of a wrong type is removed before it raises."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                yield
        except ResponseError as error:
            await self._mend_wrong_types(error, queue, names)
            raise

    async def _mend_wrong_types(self, error: ResponseError, queue: str | None, names: Sequence[str]) -> None:
        if _is_wrong_type(error) and queue is not None:
            await self.mend(queue, names)
        elif _is_wrong_type(error):
            await self.client.delete(queue_names(self.database_id))


def beat(
    client: redis.Redis,
    keys: Keys,
    worker: str,
    *,
    counter: int,
    info: str,
    owned: Sequence[bytes],
    put_back: Sequence[bytes],
) -> Beat:
    """Renew a lease from the heartbeat thread. See beat.lua."""
    names = [keys.known, keys.beats, keys.workers, keys.stats, keys.working(worker)]
    args = [worker, counter, info, len(put_back), *put_back, *owned]
    try:
        reply = script("beat").run_sync(client, names, args)
    except ResponseError as error:
        if _is_wrong_type(error):
            types = _types(keys, names)
            _report_mended(keys.queue, script("mend").run_sync(client, list(types), types.values()))
        raise
    lists, at = [], 1
    for _ in range(3):
        lists.append(reply[at + 1 : at + 1 + reply[at]])
        at += 1 + reply[at]
    return Beat(bool(reply[0]), *lists)


def _fetched(reply: Any) -> Fetched | None:
    return None if reply[0] < 0 else Fetched(reply[1:], reply[0])


def _generation(value: bytes | None) -> int:
    """A value of `known`, read as the scripts read it."""
    number = int(value) if value is not None and _GENERATION.fullmatch(value) else 0
    return number if number < 2**31 else 0


def _is_wrong_type(error: ResponseError) -> bool:
    return "WRONGTYPE" in str(error)


def _types(keys: Keys, names: Iterable[str]) -> dict[str, str]:
    """The type each key of a queue must have; the first three are those mend.lua names."""
    types = {keys.relay: "string", keys.known: "hash", keys.stats: "hash", keys.beats: "hash"}
    types |= {keys.workers: "hash", keys.bell: "list"} | dict.fromkeys(keys.ready, "list")
    return types | {name: "list" for name in names if name not in types}


def _report_mended(queue: str, removed: int) -> None:
    if removed:
        log.error(
            "removed redis keys of a wrong type: somebody else writes into this name space",
            extra={"fields": {"queue": queue, "removed": removed}},
        )


def _raw(entries: Iterable[Entry | bytes]) -> list[bytes]:
    return [entry.raw if isinstance(entry, Entry) else entry for entry in entries]


def _text(name: bytes) -> str:
    """Names of ours are ASCII; another's bytes survive the way back into a key."""
    return name.decode("utf-8", "surrogateescape")
