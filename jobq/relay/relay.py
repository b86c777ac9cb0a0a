"""The relay: brings committed intents from PostgreSQL to Redis, and writes nothing per job.

One relay leads, by an advisory lock on its only connection; others stand by. The lock saves work, the token of
each push gives safety. A leader's turn:

1. look ahead: read the jobs that come due soon;
2. poll: ask for the rows that the last poll's snapshot did not show, and push them;
3. push the jobs whose time has come;
4. walk: compare one page of rows with Redis, and push what is missing there;
5. touch each queue now and then: a token that is not ours means that Redis lost its data;
6. rest: nothing new for a few turns, and it sleeps until a commit wakes it.

Whatever breaks, a new leader starts from a new snapshot and walks the whole table; nothing else needs keeping.
Called by cli. Calls outbox.follow, push, timers, walk and wake_up.
"""

from __future__ import annotations

import time

import asyncpg

from ..broker.scripts import Broker
from ..outage import Outage
from ..outbox import follow
from ..outbox.follow import NewRows, Snapshot
from ..settings import RelaySettings
from .backlog import Backlog
from .push import ReliablePush
from .timers import Timers
from .wake_up import WakeUp
from .walk import Walk

_ANNOUNCE_EVERY_S = 30.0
_FULL_LIST_EVERY_S = 0.05


class Leader:
    """A relay that leads, for as long as its connection lives."""

    def __init__(
        self,
        connection: asyncpg.Connection,
        broker: Broker,
        schema: str,
        settings: RelaySettings,
        *,
        since: Snapshot,
        timers: Timers,
        wake_up: WakeUp,
    ):
        self._connection = connection
        self._schema = schema
        self._settings = settings
        self._since = since
        self._timers = timers
        self._wake_up = wake_up
        self.woken = wake_up.woken
        """Set when the pause that step() asked for is to end."""
        self._backlog = Backlog(settings.ready_limit)
        self._push = ReliablePush(broker, self._backlog, settings)
        self._walk = Walk(connection, schema, broker, self._push, self._backlog, settings)
        self._next_touch = 0.0
        self._next_announce = 0.0
        self._idle_turns = 0

    @classmethod
    async def start(
        cls, connection: asyncpg.Connection, broker: Broker, schema: str, settings: RelaySettings
    ) -> Leader:
        """Begin at a new snapshot. What was committed before is left to a walk over everything."""
        wake_up = await WakeUp.open(connection, schema, settings)
        since, now = await follow.take_snapshot(connection, schema)
        timers = Timers(connection, schema, settings, start=now)
        leader = cls(connection, broker, schema, settings, since=since, timers=timers, wake_up=wake_up)
        leader._backlog.mark_all()
        return leader

    @property
    def redis_outage(self) -> Outage:
        return self._push.outage

    async def step(self) -> float:
        """Take one turn. Returns the seconds that may pass before the next, unless `woken` is set before."""
        self.woken.clear()
        await self._timers.look_ahead()
        found = await self._poll()
        await self._push_due()
        await self._walk.step()
        await self._touch_queues()
        return await self._rest(found)

    async def _poll(self) -> bool:
        # Crash here: the next leader's snapshot is later, and its walk finds the rows.
        self._since, lists, is_cut = await follow.poll(
            self._connection,
            self._schema,
            self._since,
            horizon=self._timers.horizon,
            limit=self._settings.poll_limit,
        )
        # The snapshot has moved on: from here each row is pushed, or held, or marked for the walk.
        self._push.confirm_leadership()
        if is_cut:
            # Before the walk: what is not due when it looks must be read by the timers.
            await self._timers.look_again()
            self._backlog.mark_all()
        for new in lists:
            await self._push_new(new)
        return bool(lists)

    async def _push_new(self, new: NewRows) -> None:
        now: list[str] = []
        again: list[str] = []
        is_full = self._backlog.is_full(new.queue, new.priority)
        for entry, is_again, delay_s in zip(new.entries, new.again, new.delays, strict=True):
            if delay_s is not None and delay_s > 0:
                self._timers.add(new.queue, new.priority, entry, delay_s)
            elif is_again and is_full:
                again.append(entry)
            else:
                now.append(entry)
        if now and is_full:
            self._push.leave(new.queue, new.priority, now)
        elif now:
            await self._push.push(new.queue, new.priority, now)
        if again:
            await self._push_beyond_limit(new.queue, new.priority, again)

    async def _push_due(self) -> None:
        # Crash here, with what is due out of the heap: the next leader's walk finds it.
        for (queue, priority), entries in self._timers.take_due().items():
            await self._push_beyond_limit(queue, priority, entries)
        if self._timers.take_crowd():
            self._backlog.mark_all()

    async def _push_beyond_limit(self, queue: str, priority: int, entries: list[str]) -> None:
        """Retries and jobs whose time has come are not starved by a full list of new ones."""
        await self._push.push(queue, priority, entries, limit=2 * self._settings.ready_limit)

    async def _touch_queues(self) -> None:
        now = time.monotonic()
        if now >= self._next_announce:
            await self._push.announce()
            self._next_announce = now + _ANNOUNCE_EVERY_S
        if now < self._next_touch:
            return
        for queue in self._push.queues:
            await self._push.touch(queue)
        has_full_lists = self._backlog.has_full_lists
        self._next_touch = now + (_FULL_LIST_EVERY_S if has_full_lists else self._settings.detect_loss_every)

    async def _rest(self, found: bool) -> float:
        """Seconds until the next turn: none after work, then 2 ms and longer, then asleep until a commit."""
        if found or self._walk.is_repairing or not self._backlog.is_clean:
            await self._wake_up.get_up()
        if found or self._walk.is_repairing:
            self._idle_turns = 0
            return 0.0
        self._idle_turns += 1
        if self._wake_up.is_asleep:
            next_touch_in_s = self._next_touch - time.monotonic()
            return max(0.0, min(self._settings.sleep_longest, next_touch_in_s, self._next_known_in_s))
        may_sleep = self._idle_turns > self._settings.sleep_after and self._backlog.is_clean
        if may_sleep and await self._wake_up.fall_asleep():
            # Once more before it sleeps: what was committed before the lock was had has notified nobody (MUST).
            return 0.0
        idle = self._settings.poll_shortest * 1.1 ** min(self._idle_turns, 100)
        return max(0.0, min(idle, self._settings.poll_longest, self._next_known_in_s))

    @property
    def _next_known_in_s(self) -> float:
        return min(self._timers.next_in_s, self._walk.next_in_s)
