"""A machine of hypothesis: an outbox, a relay, workers and a sweeper that follow the rules over the real scripts.

PostgreSQL is a dict of rows; Redis is real, beside its model. Replies get lost, calls are made again, old calls
arrive late, Redis loses everything, goes back in time or is full, PostgreSQL goes back in time, workers and sweepers
die half way. After every step Redis must hold what the model does, and all that is known must be in a list; in the
end every row must run, and Redis be empty. Called by test_scripts_model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.model.scripts import ADOPT, Beat, Entry

from .scripts_pair import Pair, Saved

T = TypeVar("T")
SLOTS = [0, 1]
masks = st.integers(0, 15)
slots = st.sampled_from(SLOTS)
lost = st.booleans()
which = st.integers(0, 9)
rarely = st.integers(0, 15).map(lambda number: number == 9)
FATES = ["complete", "complete", "reschedule", "reschedule", "release", "park", "hold", "hold"]
fates = st.lists(st.sampled_from(FATES), min_size=4, max_size=4)
LIVE = 8
NO_BEAT = Beat(True)


class Rows(NamedTuple):
    """PostgreSQL at one moment."""

    live: dict[str, int]
    done: set[str]


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


class ScriptsMachine(RuleBasedStateMachine):
    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(self.url)
        self.committed = 0
        self.rows: dict[str, int] = {}
        self.done: set[str] = set()
        self.undone: set[str] = set()
        self.saved: Saved | None = None
        self.old_rows: Rows | None = None
        self.started = 0
        self.workers: dict[int, Process] = {}
        self.token, self.sequence = ADOPT, 0
        self.seen_known: dict[str, int] = {}
        self.polled: list[Entry] = []
        self.walked = 0
        self.page: dict[str, int] = {}
        self.missing: list[str] = []
        self.sent: list[Callable[[], object]] = []
        for slot in SLOTS:
            self.start_worker(slot)
        self.commit(count=4, is_pushed=True, again=False)

    def send(self, call: Callable[[], T], *, again: bool = False) -> T:
        """Make a call, or make it twice because the first reply got lost; it may arrive once more later."""
        self.sent.append(call)
        if again:
            call()
        return call()

    # --- the application and the relay

    @rule(count=st.integers(1, 4), is_pushed=st.booleans(), again=lost)
    def commit(self, count: int, is_pushed: bool, again: bool) -> None:
        for _ in range(min(count, LIVE - len(self.rows))):
            self.committed += 1
            id_ = UUID(int=self.committed).hex
            self.rows[id_] = 1
            self.polled.append(entry(id_, 1))
        if is_pushed:
            self.push_what_was_polled(again=again)

    @rule(again=lost)
    def push_what_was_polled(self, again: bool) -> None:
        polled, self.polled = self.polled, []
        self.push(polled, again=again)

    @rule(really=rarely)
    def forget_what_was_polled(self, really: bool) -> None:
        if really:
            self.polled = []

    @rule()
    def touch(self) -> None:
        self.push([])

    def push(self, entries: list[Entry], *, again: bool = False) -> None:
        expected, self.sequence = self.token, self.sequence + 1
        token = f"r:{self.sequence}"
        pushed = self.send(lambda: self.pair.push(entries, expected=expected, token=token), again=again)
        self.token = token if pushed is not None else ADOPT

    @rule(mask=masks, again=lost)
    def walk_on(self, mask: int, again: bool) -> None:
        """The next of the walk's three parts, so that anything may happen in between."""
        self.walked += 1
        match self.walked % 3:
            case 1:
                self.page = {id_: generation for id_, generation in self.rows.items() if picks(mask, id_)}
            case 2:
                self.missing = self.lacking(self.page)
            case _:
                self.push([entry(id_, self.rows[id_]) for id_ in self.missing if id_ in self.rows], again=again)

    def lacking(self, rows: dict[str, int]) -> list[str]:
        return [id_ for id_, generation in rows.items() if self.pair.model.newest(id_) < generation]

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

    # --- faults

    @rule(really=rarely)
    def lose_everything(self, really: bool) -> None:
        if really:
            self.pair.flush()
            self.seen_known = {}

    @rule(really=rarely)
    def fall_behind(self, really: bool) -> None:
        """A replica of Redis lags from here on."""
        if really:
            self.saved = self.pair.save()

    @rule(really=rarely)
    def go_back_in_time(self, really: bool) -> None:
        if really and self.saved is not None:
            self.pair.go_back(self.saved)
            self.seen_known = {}

    @rule(really=rarely)
    def fall_behind_in_postgresql(self, really: bool) -> None:
        if really:
            self.old_rows = Rows(dict(self.rows), set(self.done))

    @rule(really=rarely)
    def go_back_in_postgresql(self, really: bool) -> None:
        """Its last commits are lost, and their effects with them. A relay begins anew; acks may be under way."""
        if really and self.old_rows is not None:
            changed = self.rows.items() ^ self.old_rows.live.items()
            self.undone |= {id_ for id_, _ in changed}
            self.rows, self.done = dict(self.old_rows.live), set(self.old_rows.done)
            self.polled, self.page, self.missing, self.token = [], {}, [], ADOPT

    @rule(is_full=rarely)
    def memory(self, is_full: bool) -> None:
        if is_full:
            self.pair.fill()
        else:
            self.pair.make_room()

    @rule(number=st.integers(0, 50))
    def an_old_call_arrives_late(self, number: int) -> None:
        if self.sent:
            self.sent[-1 - number % len(self.sent)]()

    # --- what must hold

    @invariant()
    def redis_holds_what_the_model_holds(self) -> None:
        self.pair.compare()
        self.what_is_known_is_in_a_list()
        self.live_jobs_stay_known()

    def what_is_known_is_in_a_list(self) -> None:
        redis = self.pair.model
        lists = [*redis.ready.values(), *redis.working.values(), *redis.parked.values()]
        reachable = {(one.id, one.generation) for entries in lists for one in entries}
        holes = [pair for pair in redis.known.items() if pair not in reachable]
        assert not holes, f"known and in no list: {holes}"

    def live_jobs_stay_known(self) -> None:
        """Nothing but a loss of data makes Redis forget a job at the generation that its row has."""
        known = self.pair.model.known
        at_hand = {id_ for id_, generation in self.rows.items() if known.get(id_) == generation}
        kept = {id_ for id_, seen in self.seen_known.items() if self.rows.get(id_) == seen} - self.undone
        assert kept <= at_hand, f"Redis forgot live jobs: {kept - at_hand}"
        self.seen_known = {id_: self.rows[id_] for id_ in at_hand}

    def teardown(self) -> None:
        try:
            self.drain()
        finally:
            self.pair.close()

    def drain(self) -> None:
        """No more faults: every worker that was there dies, and one that is new does the rest."""
        self.pair.make_room()
        last = Process("last")
        redis = self.pair.model
        for turn in range(12):
            self.token = ADOPT
            self.push([entry(id_, self.rows[id_]) for id_ in self.lacking(self.rows)])
            for name in list(map(str, redis.beats)):
                if name != last.name:
                    self.make_sweep(name)()
            self.own(last, self.make_beat(last)().unknown)
            self.own(last, self.pair.unpark(last.name, room=turn % 2, limit=100))
            fetched = self.pair.fetch(last.name, 100)
            assert fetched is not None
            self.own(last, fetched)
            for one in last.owned - last.settled:
                del self.rows[str(one.id)]
                self.done.add(str(one.id))
            if last.owned:
                self.pair.ack(last.name, sorted(last.owned))
            last.owned.clear()
            last.settled.clear()
            self.pair.compare()
            self.what_is_known_is_in_a_list()
            if turn > 1 and not self.rows and not redis.known and not self.listed():
                return
        raise AssertionError(f"left after the drain: rows {self.rows}, {redis}")

    def listed(self) -> list[Entry]:
        redis = self.pair.model
        lists = [*redis.ready.values(), *redis.working.values(), *redis.parked.values()]
        return [one for entries in lists for one in entries]
