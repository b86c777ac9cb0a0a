"""The walk: one pass over both stores that pushes what Redis lacks.

1. Read a page of rows by id, in a short statement.
2. After the next poll, so that every row of the page has been through one: ask Redis what it knows of them.
3. Read the missing ones in PostgreSQL again, and push those that are still there.

PostgreSQL, Redis, PostgreSQL: acks follow commits, so a row that is still there after Redis did not know it is in
no list. Start, loss of Redis, big backlogs and the endless scrub are this one mechanism; it never looks at xid.
Called by relay. Calls outbox.follow, push and backlog.
"""

from __future__ import annotations

import time
from uuid import UUID

import asyncpg

from ..broker.client import TROUBLE
from ..broker.scripts import Broker
from ..outbox import follow
from ..outbox.follow import Page
from ..settings import RelaySettings
from .backlog import START, Backlog, ReadyList, Repair
from .push import ReliablePush

_SCRUB_OVERDUE_S = 2.0
"""The scrub leaves alone what has only just come due: a timer is about to push it."""


class Walk:
    """The walk of one leader."""

    def __init__(
        self,
        connection: asyncpg.Connection,
        schema: str,
        broker: Broker,
        push: ReliablePush,
        backlog: Backlog,
        settings: RelaySettings,
    ):
        self._connection = connection
        self._schema = schema
        self._broker = broker
        self._push = push
        self._backlog = backlog
        self._settings = settings
        self._repair: Repair | None = None
        self._position = START
        self._page: Page | None = None
        self._next_scrub = time.monotonic() + settings.scrub_every

    @property
    def is_repairing(self) -> bool:
        return self._repair is not None and not self._push.is_away

    @property
    def next_in_s(self) -> float:
        """Seconds until there is something to do. A page that was read waits for the poll of the next turn."""
        if self._page is not None:
            return 0.0
        return float("inf") if self._push.is_away else self._next_scrub - time.monotonic()

    async def step(self) -> None:
        """Compare the page read last time with Redis, and read the next one."""
        if self._page is not None:
            page, self._page = self._page, None
            try:
                await self._compare(page)
            except TROUBLE as error:
                self._push.note_trouble(error)
                self._break_off()
            else:
                if page.is_last or (self._repair is not None and self._repair.is_given_up):
                    self._finish()
        if not self._push.is_away:
            await self._read_on()

    async def _read_on(self) -> None:
        if self._repair is None and (repair := self._backlog.take()) is not None:
            self._repair = repair
            self._position = repair.start
        elif self._repair is None and time.monotonic() < self._next_scrub:
            return
        overdue_s = 0.0 if self._repair is not None else _SCRUB_OVERDUE_S
        page = await follow.page(
            self._connection, self._schema, after=self._position, overdue_s=overdue_s, limit=self._settings.page
        )
        if page.is_empty:
            self._finish()
        else:
            self._page = page
            self._position = page.last
            self._next_scrub = time.monotonic() + self._settings.scrub_pause

    def _finish(self) -> None:
        if self._repair is not None:
            self._backlog.caught_up(self._repair)
            self._repair = None
        self._start_over()

    def _break_off(self) -> None:
        if self._repair is not None:
            self._backlog.give_back(self._repair)
            self._repair = None
        self._start_over()

    def _start_over(self) -> None:
        self._position = START
        self._next_scrub = time.monotonic() + self._settings.scrub_every

    async def _compare(self, page: Page) -> None:
        for queue in {queue for queue, _ in page.lists}:
            await self._push.meet(queue)
        for at, rows in page.lists.items():
            if self._is_wanted(at, page):
                await self._bring(at, rows)

    def _is_wanted(self, at: ReadyList, page: Page) -> bool:
        """Whether to compare what a page has of a list; of one that is held, it is left to a later walk.

        A repair may begin inside the page. What lies before comes along: Redis knows it, or lacks it as well.
        """
        is_held = self._backlog.is_held(at[0])
        if self._repair is None:
            return not is_held and not self._backlog.is_full(*at)
        if not self._repair.covers(at, page.last):
            return False
        if is_held:
            self._repair.left.add(at)
            self._backlog.mark(*at, before=page.lists[at][0][0])
        return not is_held

    async def _bring(self, at: ReadyList, rows: list[tuple[UUID, int]]) -> None:
        queue, priority = at
        known = await self._broker.known(queue, [id_ for id_, _ in rows])
        missing = [id_ for (id_, generation), has in zip(rows, known, strict=True) if has < generation]
        if not missing:
            return
        entries = await follow.reread(self._connection, self._schema, missing)
        # Crash here, or anywhere in a walk: the next leader's begins at the start.
        sent = await self._push.push(queue, priority, entries, counter=self._counter(queue))
        if sent < len(entries) and self._repair is not None:
            # The list is full, or Redis refused: push() has marked where the next walk begins.
            self._repair.left.add(at)

    def _counter(self, queue: str) -> str:
        """What another path should have pushed, or had pushed before a loss, is counted as a repair."""
        if self._repair is None:
            return "repushed" if self._backlog.is_clean else "pushed"
        return "repushed" if queue in self._repair.lost else "pushed"
