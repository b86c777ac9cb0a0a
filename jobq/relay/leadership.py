"""Who leads: connect, stand by, lead, and start again when something breaks.

Invariant: a leader's connection is closed before anything is tried again, so that its lock goes with it. Called
by cli. Calls relay and janitor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

import anyio
import asyncpg

from ..broker.client import TROUBLE, UNAVAILABLE, check_server, connect
from ..broker.scripts import Broker
from ..errors import ConfigurationError
from ..health import Check, Pulse, store_check
from ..migrate import check as check_tables
from ..outage import Outage
from ..outbox import follow
from ..outbox.database import Database, is_unavailable
from ..settings import RelaySettings
from .janitor import Janitor
from .push import ALWAYS_WATCHED
from .relay import Leader

log = logging.getLogger(__name__)

_PAUSE_AFTER_BUG_S = 1.0


class Relay:
    """One relay process.

    1. connects to both stores, 2. stands by until it holds the leader's lock, 3. leads, turn after turn.
    A lost connection, or any error, ends the leadership: the next one starts from a new snapshot.
    """

    def __init__(self, database: Database, redis_url: str, schema: str, settings: RelaySettings | None = None):
        self._database = database
        self._schema = schema
        self._settings = settings or RelaySettings()
        self._client = connect(redis_url)
        self._outage = Outage("postgresql", "relay")
        self._redis_outage = Outage("redis", "standby")
        self._leader: Leader | None = None
        self._has_checked = False
        self.is_leading = False
        self._is_standing_by = False
        self.pulse = Pulse("relay", self._settings.frozen_after)

    async def check(self) -> None:
        """Reach both stores once. Raises what keeps a relay from working."""
        connection = await self._connect()
        await connection.close()
        await check_server(self._client)

    async def run(self, stopping: asyncio.Event) -> None:
        """Serve until `stopping` is set."""
        self.pulse.begin()
        async with anyio.create_task_group() as group:
            janitor = Janitor(self._database, self._schema, self._settings)
            group.start_soon(janitor.run, lambda: self.is_leading)
            group.start_soon(self._wake_at, stopping)
            while not stopping.is_set():
                self.pulse.tick()
                try:
                    await self._serve(stopping)
                except Exception as error:  # noqa: BLE001  the loop runner: whatever broke, start again
                    await pause(self._trouble(error), stopping)
            group.cancel_scope.cancel()
        self.pulse.rest()
        await self._client.aclose()

    async def _wake_at(self, stopping: asyncio.Event) -> None:
        """Have a leader that rests look up when it is to stop."""
        await stopping.wait()
        if self._leader is not None:
            self._leader.woken.set()

    def checks(self) -> list[Check]:
        """What keeps this relay from its work, as far as it knows. Safe from any thread; asks nobody."""
        # A leader that took no turn for as long is ended by a standby.
        turns = self.pulse.check(longest_s=self._settings.takeover_after)
        if self.is_leading and (leader := self._leader) is not None:
            role = Check("role", True, "it leads")
            return [turns, role, store_check("redis", leader.redis_outage), store_check("postgresql", self._outage)]
        says = "it stands by for the relay that leads" if self._is_standing_by else "not connected yet"
        role = Check("role", self._is_standing_by, says)
        return [turns, role, store_check("redis", self._redis_outage), store_check("postgresql", self._outage)]

    async def _serve(self, stopping: asyncio.Event) -> None:
        connection = await self._connect()
        self._outage.end()
        try:
            async with asyncio.timeout(follow.ANSWER_TIMEOUT_S):
                database_id = await self._database.database_id(connection, self._schema)
            broker = Broker(self._client, database_id)
            log.info("relay stands by", extra={"fields": {"schema": self._schema}})
            self._is_standing_by = True
            if not await stand_by(
                connection,
                broker,
                self._schema,
                self._settings,
                stopping,
                pulse=self.pulse,
                outage=self._redis_outage,
            ):
                return
            self._leader = leader = await Leader.start(connection, broker, self._schema, self._settings)
            self.is_leading = True
            log.info("relay leads", extra={"fields": {"schema": self._schema}})
            while not stopping.is_set():
                self.pulse.tick()
                await pause(await leader.step(), leader.woken)
        finally:
            self.is_leading = False
            self._is_standing_by = False
            connection.terminate()

    async def _connect(self) -> asyncpg.Connection:
        connection = await self._database.connect(schema=self._schema, name="jobq:relay", holds_locks=True)
        try:
            await self._check_tables(connection)
            await follow.keep_alive(connection, self._schema)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _check_tables(self, connection: asyncpg.Connection) -> None:
        """Once: a newer release may bring its tables while the relays of this one still serve."""
        if not self._has_checked:
            async with asyncio.timeout(follow.ANSWER_TIMEOUT_S):
                await check_tables(connection, self._schema)
            self._has_checked = True

    def _trouble(self, error: Exception) -> float:
        """Report what broke; returns the seconds to wait."""
        if is_unavailable(error) or isinstance(error, (*UNAVAILABLE, ConfigurationError)):
            return self._outage.begin(error)
        log.error("relay broke off", extra={"fields": {"error": type(error).__name__}}, exc_info=error)
        return _PAUSE_AFTER_BUG_S


async def stand_by(
    connection: asyncpg.Connection,
    broker: Broker,
    schema: str,
    settings: RelaySettings,
    stopping: asyncio.Event,
    *,
    pulse: Pulse,
    outage: Outage,
) -> bool:
    """Wait until this relay leads (True) or is to stop (False).

    The leader moves a token at least once a second. When none moved for `takeover_after` seconds of this
    process's own clock, though Redis could be read all the while and written to in the end, the leader's session
    is ended.
    """
    watched: dict[str, bytes | None] = {}
    still_since = time.monotonic()
    while not stopping.is_set():
        pulse.tick()
        if await follow.try_lead(connection, schema):
            return True
        # Before it reads: a standby that is held up while it looks has seen nothing of the time that goes by.
        looked_at = time.monotonic()
        tokens = await _read_tokens(broker, outage)
        if tokens is None or tokens != watched:
            watched, still_since = tokens or {}, time.monotonic()
        elif looked_at - still_since > settings.takeover_after and await _takes_writes(broker):
            ended = await follow.end_leader(connection, schema)
            log.warning("ended a leader that did nothing", extra={"fields": {"sessions": ended}})
            still_since = time.monotonic()
            continue
        await pause(settings.detect_loss_every, stopping)
    return False


async def pause(seconds: float, until: asyncio.Event) -> None:
    """Wait `seconds`, or until the event is set."""
    if seconds <= 0:
        await asyncio.sleep(0)
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await until.wait()


async def _read_tokens(broker: Broker, outage: Outage) -> dict[str, bytes | None] | None:
    try:
        tokens = {queue: await broker.token(queue) for queue in {ALWAYS_WATCHED, *await broker.queues()}}
    except TROUBLE as error:
        outage.begin(error)
        return None
    outage.end()
    return tokens


async def _takes_writes(broker: Broker) -> bool:
    """Whether a leader could have moved its token: not in a Redis that is full or read-only."""
    try:
        await broker.announce([ALWAYS_WATCHED])
    except TROUBLE:
        return False
    return True
