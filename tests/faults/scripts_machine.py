"""A machine of hypothesis: an outbox, a relay, workers and a sweeper that follow the rules over the real scripts.

PostgreSQL is a dict of rows; Redis is real, beside its model. Replies get lost, calls are made again, old calls
arrive late, Redis loses everything, goes back in time or is full, PostgreSQL goes back in time, workers and sweepers
die half way. After every step Redis must hold what the model does, and all that is known must be in a list; in the
end every row must run, and Redis be empty. Called by test_scripts_model.
"""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from tests.model.scripts import ADOPT, Entry

from .scripts_pair import Saved
from .scripts_workers import Process, Workers, entry, lost, masks, picks, rarely

LIVE = 8
seldom = st.sampled_from([True, False, False])


class Rows(NamedTuple):
    """PostgreSQL at one moment."""

    live: dict[str, int]
    done: set[str]


class ScriptsMachine(Workers):
    def __init__(self) -> None:
        super().__init__()
        self.committed = 0
        self.undone: set[str] = set()
        self.saved: Saved | None = None
        self.old_rows: Rows | None = None
        self.token, self.sequence = ADOPT, 0
        self.seen_known: dict[str, int] = {}
        self.walked = 0
        self.page: dict[str, int] = {}
        self.missing: list[str] = []
        self.commit(count=4, is_pushed=True, again=False)

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

    # --- faults

    @rule(really=rarely)
    def lose_everything(self, really: bool) -> None:
        if really:
            self.pair.flush()
            self.seen_known = {}

    @rule()
    def fall_behind(self) -> None:
        """A replica of Redis lags from here on."""
        self.saved = self.pair.save()

    @rule(really=seldom)
    def go_back_in_time(self, really: bool) -> None:
        if really and self.saved is not None:
            self.pair.go_back(self.saved)
            self.seen_known = {}

    @rule()
    def fall_behind_in_postgresql(self) -> None:
        self.old_rows = Rows(dict(self.rows), set(self.done))

    @rule(really=seldom)
    def go_back_in_postgresql(self, really: bool) -> None:
        """Its last commits are lost, and their effects with them. A relay begins anew; acks may be under way."""
        if really and self.old_rows is not None:
            changed = self.rows.items() ^ self.old_rows.live.items()
            self.undone |= {id_ for id_, _ in changed}
            self.rows, self.done = dict(self.old_rows.live), set(self.old_rows.done)
            self.polled, self.page, self.missing, self.token = [], {}, [], ADOPT

    @rule(is_full=st.sampled_from([True, False, False]))
    def reach_the_memory_limit_or_not(self, is_full: bool) -> None:
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
