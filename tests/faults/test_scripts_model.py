"""The real scripts against a small model, in every order hypothesis can think of.

The model is the outbox (a dict of rows) with a relay, workers and a sweeper that follow the rules; Redis is real.
Replies get lost, calls are made again, old calls arrive late, Redis loses everything, workers and sweepers die half
way. After every step Invariant R must hold; in the end every row must run, and Redis must be empty.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from jobq.broker.client import connect, connect_sync
from jobq.broker.scripts import Beat, Broker, beat
from tests.redis_state import BASE, DATABASE_ID, QUEUE

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
EXAMPLES = 60
NO_BEAT = Beat(True, [], [], [])


def entry(id_: UUID, generation: int) -> bytes:
    return b"%s:%d:%d" % (id_.hex.encode(), generation, 1 + id_.int % 4)


def parse(raw: bytes) -> tuple[UUID, int]:
    id_, generation, _ = raw.decode().split(":")
    return UUID(id_), int(generation)


def picks(mask: int, id_: UUID) -> bool:
    return bool(mask >> id_.int % 4 & 1)


@dataclass
class Process:
    """A worker: what it owns, what is settled in PostgreSQL and not acked yet."""

    name: str
    owned: set[bytes] = field(default_factory=set)
    settled: set[bytes] = field(default_factory=set)
    before: Beat = NO_BEAT
    counter: int = 0
    is_dead: bool = False


class ScriptsMachine(RuleBasedStateMachine):
    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.client = connect(self.url)
        self.sync_client = connect_sync(self.url)
        self.broker = Broker(self.client, DATABASE_ID)
        self.do(self.client.flushall())
        self.committed = 0
        self.rows: dict[UUID, int] = {}
        self.done: set[UUID] = set()
        self.started = 0
        self.workers: dict[int, Process] = {}
        self.token, self.sequence = "*", 0
        self.seen_known: dict[UUID, int] = {}
        self.polled: list[bytes] = []
        self.walked = 0
        self.page: dict[UUID, int] = {}
        self.missing: list[UUID] = []
        self.sent: list[Callable[[], Awaitable[object]]] = []
        for slot in SLOTS:
            self.start_worker(slot)
        self.commit(count=4, is_pushed=True, again=False)

    def do(self, call: Awaitable[T]) -> T:
        async def wait() -> T:
            return await call

        return self.runner.run(wait())

    def send(self, call: Callable[[], Awaitable[T]], *, again: bool = False) -> T:
        """Make a call, or make it twice because the first reply got lost; it may arrive once more later."""
        self.sent.append(call)
        if again:
            self.do(call())
        return self.do(call())

    # --- the application and the relay

    @rule(count=st.integers(1, 4), is_pushed=st.booleans(), again=lost)
    def commit(self, count: int, is_pushed: bool, again: bool) -> None:
        for _ in range(min(count, LIVE - len(self.rows))):
            self.committed += 1
            self.rows[UUID(int=self.committed)] = 1
            self.polled.append(entry(UUID(int=self.committed), 1))
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

    def push(self, raws: list[bytes], *, again: bool = False) -> None:
        expected, self.sequence = self.token, self.sequence + 1
        token = f"r:{self.sequence}"
        pushed = self.send(lambda: self.broker.push(QUEUE, raws, expected=expected, token=token), again=again)
        self.token = token if pushed is not None else "*"

    @rule(mask=masks, again=lost)
    def walk_on(self, mask: int, again: bool) -> None:
        """The next of the walk's three parts, so that anything may happen in between."""
        self.walked += 1
        match self.walked % 3:
            case 1:
                self.page = {id_: generation for id_, generation in self.rows.items() if picks(mask, id_)}
            case 2:
                page = list(self.page)
                known = self.do(self.broker.known(QUEUE, page)) if page else []
                self.missing = [id_ for id_, now in zip(page, known, strict=True) if now < self.page[id_]]
            case _:
                still_there = [id_ for id_ in self.missing if id_ in self.rows]
                self.push([entry(id_, self.rows[id_]) for id_ in still_there], again=again)

    # --- workers

    @rule(count=st.integers(1, 4), reply_lost=rarely, fates=fates, again=lost, is_acked=st.booleans())
    def work(self, count: int, reply_lost: bool, fates: list[str], again: bool, is_acked: bool) -> None:
        """Fetch, and run some of what is owned: settled first in PostgreSQL, then, or not yet, in Redis."""
        for slot, worker in self.workers.items():
            if not worker.is_dead:
                self.work_one(slot, count, reply_lost, fates[slot:], again, is_acked)

    def work_one(self, slot: int, count: int, reply_lost: bool, fates: list[str], again: bool, is_acked: bool) -> None:
        worker = self.workers[slot]
        fetched = self.do(self.broker.fetch(QUEUE, worker.name, count))
        if fetched is not None and not reply_lost:
            self.own(worker, fetched.entries)
        for raw, fate in zip(sorted(worker.owned - worker.settled), fates, strict=False):
            self.end(worker, raw, fate, again)
        if is_acked:
            self.ack(slot=slot, again=again, reply_lost=False)

    def own(self, worker: Process, raws: list[bytes]) -> None:
        """Read the rows; what is not at its generation is settled without a run."""
        for raw in raws:
            if raw not in worker.owned:
                worker.owned.add(raw)
                id_, generation = parse(raw)
                if self.rows.get(id_) != generation:
                    worker.settled.add(raw)

    def end(self, worker: Process, raw: bytes, fate: str, again: bool) -> None:
        id_, generation = parse(raw)
        is_current = self.rows.get(id_) == generation
        match fate:
            case "release":
                self.send(lambda: self.broker.release(QUEUE, worker.name, [raw]), again=again)
                worker.owned.discard(raw)
            case "park":
                self.send(lambda: self.broker.park(QUEUE, worker.name, "task", [raw]), again=again)
                worker.owned.discard(raw)
            case "complete" | "reschedule":
                worker.settled.add(raw)
                if is_current and fate == "complete":
                    assert id_ not in self.done
                    del self.rows[id_]
                    self.done.add(id_)
                elif is_current:
                    self.rows[id_] = generation + 1
                    self.polled.append(entry(id_, generation + 1))

    @rule(slot=slots, again=lost, reply_lost=lost)
    def ack(self, slot: int, again: bool, reply_lost: bool) -> None:
        worker = self.workers[slot]
        if worker.is_dead or not worker.settled:
            return
        settled = sorted(worker.settled)
        self.send(lambda: self.broker.ack(QUEUE, worker.name, settled), again=again)
        if not reply_lost:
            worker.owned -= worker.settled
            worker.settled.clear()

    @rule(slot=slots, room=st.integers(0, 2), limit=st.integers(1, 3), again=lost, reply_lost=lost)
    def unpark(self, slot: int, room: int, limit: int, again: bool, reply_lost: bool) -> None:
        worker = self.workers[slot]
        if worker.is_dead:
            return
        name = worker.name
        taken = self.send(lambda: self.broker.unpark(QUEUE, name, ["task"], room=room, limit=limit), again=again)
        if not reply_lost:
            self.own(worker, taken.entries)

    @rule(slot=slots, again=lost, reply_lost=lost)
    def beat(self, slot: int, again: bool, reply_lost: bool) -> None:
        worker = self.workers[slot]
        if worker.is_dead:
            return
        worker.counter += 1
        found = self.send(self.make_beat(worker), again=again)
        if reply_lost:
            worker.before = NO_BEAT
            return
        agreed = set(worker.before.unknown)
        self.own(worker, [raw for raw in found.unknown if raw in agreed])
        worker.before = found

    def make_beat(self, worker: Process) -> Callable[[], Awaitable[Beat]]:
        owned = sorted(worker.owned)
        back = [raw for raw in worker.before.missing if raw in worker.owned]
        counter, keys = worker.counter, self.broker.keys(QUEUE)

        async def call() -> Beat:
            return beat(self.sync_client, keys, worker.name, counter=counter, info="{}", owned=owned, put_back=back)

        return call

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
        beats = self.do(self.broker.beats(QUEUE))
        if beats:
            name = sorted(beats)[number % len(beats)]
            sweep = self.make_sweep(name, beats[name], locked=locked, not_due=not_due)
            if then == "late":
                # The sweeper dies half way, or Redis sees its call much later.
                self.sent.append(sweep)
                return
            if then == "fetch":
                # The worker is not so dead, and takes more before the sweep comes.
                fetched = self.do(self.broker.fetch(QUEUE, name, 2))
                for worker in self.workers.values():
                    if worker.name == name and not worker.is_dead and fetched is not None:
                        self.own(worker, fetched.entries)
            self.send(sweep, again=again)

    def make_sweep(
        self, name: str, seen: bytes, *, locked: int = 0, not_due: int = 0
    ) -> Callable[[], Awaitable[object]]:
        """Read the working list, count the crashes in PostgreSQL, and make the call that is to follow."""
        standings = {}
        for raw in self.do(self.broker.working(QUEUE, name)):
            id_, generation = parse(raw)
            if self.rows.get(id_) == generation and not picks(locked, id_):
                self.rows[id_] = generation + 1
            standings[raw] = self.rows.get(id_, 0)
            if standings[raw] != generation and picks(not_due, id_):
                standings[raw] = 0
        return lambda: self.broker.sweep(QUEUE, name, seen, standings)

    # --- faults

    @rule(really=rarely)
    def lose_everything(self, really: bool) -> None:
        if really:
            self.do(self.client.flushall())
            self.seen_known = {}

    @rule(number=st.integers(0, 50))
    def an_old_call_arrives_late(self, number: int) -> None:
        if self.sent:
            self.do(self.sent[-1 - number % len(self.sent)]())

    # --- what must hold

    @invariant()
    def what_is_known_is_in_a_list(self) -> None:
        known, lists = self.do(self.look())
        reachable = {tuple(raw.split(b":")[:2]) for raws in lists.values() for raw in raws}
        holes = [pair for pair in known.items() if pair not in reachable]
        assert not holes, f"known and in no list: {holes}"
        self.live_jobs_stay_known({UUID(id_.decode()): int(generation) for id_, generation in known.items()})

    def live_jobs_stay_known(self, known: dict[UUID, int]) -> None:
        """No call but the loss of everything makes Redis forget a job at the generation that its row has."""
        at_hand = {id_ for id_, generation in self.rows.items() if known.get(id_) == generation}
        forgotten = [id_ for id_, seen in self.seen_known.items() if self.rows.get(id_) == seen and id_ not in at_hand]
        assert not forgotten, f"Redis forgot live jobs: {forgotten}"
        self.seen_known = {id_: self.rows[id_] for id_ in at_hand}

    async def look(self) -> tuple[dict[bytes, bytes], dict[bytes, list[bytes]]]:
        keys = [key async for key in self.client.scan_iter(count=1000)]
        kinds = (b"ready:", b"working:", b"parked:")
        named = [key for key in keys if key.removeprefix(BASE.encode()).startswith(kinds)]
        async with self.client.pipeline(transaction=False) as pipeline:
            pipeline.hgetall(self.broker.keys(QUEUE).known)
            for key in named:
                pipeline.lrange(key, 0, -1)
            known, *lists = await pipeline.execute()
        return known, dict(zip(named, lists, strict=True))

    def teardown(self) -> None:
        try:
            self.drain()
        finally:
            self.sync_client.close()
            self.do(self.client.aclose())
            self.runner.close()

    def drain(self) -> None:
        """No more faults: every worker that was there dies, and one that is new does the rest."""
        last = Process("last")
        for turn in range(12):
            self.push_what_is_missing()
            for name, seen in self.do(self.broker.beats(QUEUE)).items():
                if name != last.name:
                    self.do(self.make_sweep(name, seen)())
            last.counter += 1
            found: Any = self.do(self.make_beat(last)())
            self.own(last, found.unknown)
            self.own(last, self.do(self.broker.unpark(QUEUE, last.name, ["task"], room=turn % 2)).entries)
            fetched = self.do(self.broker.fetch(QUEUE, last.name, 100))
            assert fetched is not None
            self.own(last, fetched.entries)
            for raw in last.owned - last.settled:
                id_, _ = parse(raw)
                del self.rows[id_]
                self.done.add(id_)
            if last.owned:
                self.do(self.broker.ack(QUEUE, last.name, sorted(last.owned)))
            last.owned.clear()
            last.settled.clear()
            self.what_is_known_is_in_a_list()
            known, lists = self.do(self.look())
            if turn > 1 and not self.rows and not known and not lists:
                return
        raise AssertionError(f"left after the drain: rows {self.rows}, known {known}, lists {lists}")

    def push_what_is_missing(self) -> None:
        """Walk over everything, with whatever token is there."""
        self.token = "*"
        page = list(self.rows)
        known = self.do(self.broker.known(QUEUE, page)) if page else []
        self.push([entry(i, self.rows[i]) for i, now in zip(page, known, strict=True) if now < self.rows[i]])


@pytest.mark.timeout(600)  # what fails is made smaller, which takes its time
def test_the_scripts_keep_every_job_reachable_whatever_happens(redis_url: str) -> None:
    machine = type("Machine", (ScriptsMachine,), {"url": redis_url})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
