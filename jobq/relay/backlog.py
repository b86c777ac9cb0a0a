"""What the relay knows to be missing from Redis: dirty lists, and where the walk must begin for each.

Invariant: a row that a poll answered was pushed, or is covered by a dirty list from before its id. No I/O.
Called by push, walk and relay. Calls nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from uuid import UUID

from ..model import PRIORITIES

START, END = UUID(int=0), UUID(int=2**128 - 1)
ReadyList = tuple[str, int]
"""(queue, priority)"""

_REFUSED_PAUSE_S = 0.5


@dataclass(slots=True)
class _State:
    length: int = 0
    is_full: bool = False


@dataclass(slots=True)
class Backlog:
    """Which ready lists lack something, and why nothing may be pushed there just now."""

    ready_limit: int
    _dirty: dict[ReadyList, UUID] = field(default_factory=dict)
    _states: dict[ReadyList, _State] = field(default_factory=dict)
    _held_until: dict[str, float] = field(default_factory=dict)
    _lost: set[str] = field(default_factory=set)
    _all_dirty: bool = False

    def length(self, queue: str, priority: int) -> int:
        """Entries in the list when Redis last told."""
        return self._state(queue, priority).length

    def is_full(self, queue: str, priority: int) -> bool:
        """Whether the list has reached its limit and the walk has not yet caught up."""
        return self._state(queue, priority).is_full

    def note_length(self, queue: str, priority: int, length: int) -> None:
        self._state(queue, priority).length = length

    def mark(self, queue: str, priority: int, *, before: UUID) -> None:
        """Rows of the list from `before` on may be missing in Redis."""
        start = UUID(int=max(before.int - 1, 0))
        self._dirty[queue, priority] = min(self._dirty.get((queue, priority), start), start)

    def mark_full(self, queue: str, priority: int) -> None:
        self._state(queue, priority).is_full = True

    def mark_all(self) -> None:
        """Anything may be missing: at the start, and when a poll was cut short."""
        self._all_dirty = True

    def mark_lost(self, queue: str, *, hold_s: float) -> None:
        """Everything of the queue may be missing; leave it alone for `hold_s` seconds."""
        for priority in PRIORITIES:
            self._dirty[queue, priority] = START
            self._states.pop((queue, priority), None)
        self._held_until[queue] = time.monotonic() + hold_s
        self._lost.add(queue)

    def refuse(self, queue: str) -> None:
        """Redis is out of memory: try this queue again a little later."""
        self._held_until[queue] = max(self._held_until.get(queue, 0.0), time.monotonic() + _REFUSED_PAUSE_S)

    def take(self) -> Repair | None:
        """What a walk can repair now; it is the walk's to give back if it does not finish."""
        now = time.monotonic()
        lists = {at: start for at, start in self._dirty.items() if self._is_open(at, now)}
        if not lists and not self._all_dirty:
            return None
        for at in lists:
            del self._dirty[at]
        everything, self._all_dirty = self._all_dirty, False
        lost = {queue for queue, _ in lists} & self._lost
        self._lost -= lost
        return Repair(lists, everything, lost)

    def give_back(self, repair: Repair) -> None:
        """A walk broke off: what it had taken is dirty again."""
        for (queue, priority), start in repair.lists.items():
            self.mark(queue, priority, before=UUID(int=start.int + 1))
        self._all_dirty = self._all_dirty or repair.everything
        self._lost |= repair.lost

    def caught_up(self, repair: Repair) -> None:
        """A walk came to the end of the table for these lists."""
        for at, state in self._states.items():
            if repair.covers(at, END):
                state.is_full = False

    @property
    def has_full_lists(self) -> bool:
        return any(state.is_full for state in self._states.values())

    @property
    def is_clean(self) -> bool:
        return not self._dirty and not self._all_dirty

    def is_held(self, queue: str) -> bool:
        return self._held_until.get(queue, 0.0) > time.monotonic()

    def _is_open(self, at: ReadyList, now: float) -> bool:
        state = self._state(*at)
        has_room = not state.is_full or state.length <= self.ready_limit // 2
        return has_room and self._held_until.get(at[0], 0.0) <= now

    def _state(self, queue: str, priority: int) -> _State:
        return self._states.setdefault((queue, priority), _State())


@dataclass(slots=True)
class Repair:
    """What one walk is to put right: lists, each from an id on, or everything."""

    lists: dict[ReadyList, UUID]
    everything: bool
    lost: set[str]
    """Queues that Redis had lost."""
    left: set[ReadyList] = field(default_factory=set)
    """Lists that this walk gave up; the backlog has them again."""

    @property
    def is_given_up(self) -> bool:
        """Whether nothing of it is left to this walk."""
        return not self.everything and self.lists.keys() <= self.left

    @property
    def start(self) -> UUID:
        return START if self.everything else min(self.lists.values())

    def covers(self, at: ReadyList, row_id: UUID) -> bool:
        start = START if self.everything else self.lists.get(at)
        return start is not None and row_id > start and at not in self.left
