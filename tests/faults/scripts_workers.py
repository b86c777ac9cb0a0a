"""The workers and the sweeper of the machine: what they own, and what they do over the real scripts.

Called by scripts_machine, which adds the application, the relay, the faults and what must hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.model.scripts import Beat, Entry

from .scripts_pair import Pair

T = TypeVar("T")
SLOTS = [0, 1]
masks = st.integers(0, 15)
slots = st.sampled_from(SLOTS)
lost = st.booleans()
which = st.integers(0, 9)
rarely = st.integers(0, 15).map(lambda number: number == 9)
FATES = ["complete", "complete", "reschedule", "reschedule", "release", "park", "hold", "hold"]
fates = st.lists(st.sampled_from(FATES), min_size=4, max_size=4)
NO_BEAT = Beat(True)


@dataclass
class Process:
    """A worker: what it owns, what is settled in PostgreSQL and not acked yet."""

    name: str
    owned: set[Entry] = field(default_factory=set)
    settled: set[Entry] = field(default_factory=set)
    before: Beat = NO_BEAT
    counter: int = 0
    is_dead: bool = False


def picks(mask: int, id_: str) -> bool:
    return bool(mask >> int(id_, 16) % 4 & 1)


def entry(id_: str, generation: int) -> Entry:
    return Entry(id_, generation, 1 + int(id_, 16) % 4)


class Workers(RuleBasedStateMachine):
    """PostgreSQL as a dict of rows, Redis beside its model, and the workers."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(self.url)
        self.rows: dict[str, int] = {}
        self.done: set[str] = set()
        self.polled: list[Entry] = []
        self.sent: list[Callable[[], object]] = []
        self.workers: dict[int, Process] = {}
        self.started = 0
        for slot in SLOTS:
            self.start_worker(slot)

    def send(self, call: Callable[[], T], *, again: bool = False) -> T:
        """Make a call, or make it twice because the first reply got lost; it may arrive once more later."""
        self.sent.append(call)
        if again:
            call()
        return call()

    # --- workers

    @rule(count=st.integers(1, 4), reply_lost=rarely, fates=fates, again=lost, is_acked=st.booleans())
    def work(self, count: int, reply_lost: bool, fates: list[str], again: bool, is_acked: bool) -> None:
        """Fetch, and run some of what is owned: settled first in PostgreSQL, then, or not yet, in Redis."""
        for slot, worker in self.workers.items():
            if not worker.is_dead:
                self.work_one(slot, count, reply_lost, fates[slot:], again, is_acked)

    def work_one(self, slot: int, count: int, reply_lost: bool, fates: list[str], again: bool, is_acked: bool) -> None:
        worker = self.workers[slot]
        fetched = self.pair.fetch(worker.name, count)
        if fetched is not None and not reply_lost:
            self.own(worker, fetched)
        for one, fate in zip(sorted(worker.owned - worker.settled), fates, strict=False):
            self.end(worker, one, fate, again)
        if is_acked:
            self.ack(slot=slot, again=again, reply_lost=False)

    def own(self, worker: Process, entries: tuple[Entry, ...] | list[Entry]) -> None:
        """Read the rows; what is not at its generation is settled without a run."""
        for one in entries:
            if one not in worker.owned:
                worker.owned.add(one)
                if self.rows.get(str(one.id)) != one.generation:
                    worker.settled.add(one)

    def end(self, worker: Process, one: Entry, fate: str, again: bool) -> None:
        id_ = str(one.id)
        is_current = self.rows.get(id_) == one.generation
        match fate:
            case "release":
                self.send(lambda: self.pair.release(worker.name, [one]), again=again)
                worker.owned.discard(one)
            case "park":
                self.send(lambda: self.pair.park(worker.name, [one]), again=again)
                worker.owned.discard(one)
            case "complete" | "reschedule":
                worker.settled.add(one)
                if is_current and fate == "complete":
                    assert id_ not in self.done
                    del self.rows[id_]
                    self.done.add(id_)
                elif is_current:
                    self.rows[id_] = one.generation + 1
                    self.polled.append(entry(id_, one.generation + 1))

    @rule(slot=slots, again=lost, reply_lost=lost)
    def ack(self, slot: int, again: bool, reply_lost: bool) -> None:
        worker = self.workers[slot]
        if worker.is_dead or not worker.settled:
            return
        settled = sorted(worker.settled)
        self.send(lambda: self.pair.ack(worker.name, settled), again=again)
        if not reply_lost:
            worker.owned -= worker.settled
            worker.settled.clear()

    @rule(slot=slots, room=st.integers(0, 2), limit=st.integers(1, 3), again=lost, reply_lost=lost)
    def unpark(self, slot: int, room: int, limit: int, again: bool, reply_lost: bool) -> None:
        worker = self.workers[slot]
        if worker.is_dead:
            return
        taken = self.send(lambda: self.pair.unpark(worker.name, room=room, limit=limit), again=again)
        if not reply_lost:
            self.own(worker, taken)

    @rule(slot=slots, again=lost, reply_lost=lost)
    def beat(self, slot: int, again: bool, reply_lost: bool) -> None:
        worker = self.workers[slot]
        if worker.is_dead:
            return
        found = self.send(self.make_beat(worker), again=again)
        if reply_lost:
            worker.before = NO_BEAT
            return
        agreed = set(worker.before.unknown)
        self.own(worker, [one for one in found.unknown if one in agreed])
        worker.before = found

    def make_beat(self, worker: Process) -> Callable[[], Beat]:
        worker.counter += 1
        owned = sorted(worker.owned)
        back = [one for one in worker.before.missing if one in worker.owned]
        counter = worker.counter
        return lambda: self.pair.beat(worker.name, counter, owned, back)

    @rule(slot=slots, really=rarely)
    def die(self, slot: int, really: bool) -> None:
        self.workers[slot].is_dead |= really

    @rule(slot=slots)
    def start_another(self, slot: int) -> None:
        """A new process in the place of a dead one, with a name of its own."""
        if self.workers[slot].is_dead:
            self.start_worker(slot)

    def start_worker(self, slot: int) -> None:
        self.started += 1
        self.workers[slot] = Process(f"w{self.started}")
        self.beat(slot=slot, again=False, reply_lost=False)

    # --- the sweeper, whose victims may well be alive

    @rule(number=which, locked=masks, not_due=masks, then=st.sampled_from(["", "fetch", "late"]), again=lost)
    def sweep(self, number: int, locked: int, not_due: int, then: str, again: bool) -> None:
        beats = self.pair.model.beats
        if beats:
            name = sorted(map(str, beats))[number % len(beats)]
            sweep = self.make_sweep(name, locked=locked, not_due=not_due)
            if then == "late":
                # The sweeper dies half way, or Redis sees its call much later.
                self.sent.append(sweep)
                return
            if then == "fetch":
                # The worker is not so dead, and takes more before the sweep comes.
                fetched = self.pair.fetch(name, 2)
                for worker in self.workers.values():
                    if worker.name == name and not worker.is_dead and fetched is not None:
                        self.own(worker, fetched)
            self.send(sweep, again=again)

    def make_sweep(self, name: str, *, locked: int = 0, not_due: int = 0) -> Callable[[], object]:
        """Read the working list, count the crashes in PostgreSQL, and make the call that is to follow."""
        seen = self.pair.model.beats[name]
        assert isinstance(seen, bytes)
        entries = self.pair.model.working.get(name, [])
        standings = {}
        before = dict(self.rows)
        for one in entries:
            id_ = str(one.id)
            if before.get(id_) == one.generation and not picks(locked, id_):
                self.rows[id_] = one.generation + 1
        for one in entries:
            id_ = str(one.id)
            standings[one] = self.rows.get(id_, 0)
            if standings[one] != one.generation and picks(not_due, id_):
                standings[one] = 0
        return lambda: self.pair.sweep(name, seen, standings)
