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

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from jobq.broker.client import connect, connect_sync
from jobq.broker.scripts import Beat, Broker, beat
from tests.redis_state import BASE, DATABASE_ID, QUEUE

T = TypeVar("T")
IDS = [UUID(int=n + 1) for n in range(6)]
SLOTS = [0, 1]
ids = st.sampled_from(IDS)
slots = st.sampled_from(SLOTS)
subsets = st.sets(ids)
lost = st.booleans()
which = st.integers(0, 9)
EXAMPLES = 60
NO_BEAT = Beat(True, [], [], [])


def entry(id_: UUID, generation: int) -> bytes:
    return b"%s:%d:%d" % (id_.hex.encode(), generation, 1 + id_.int % 4)


def parse(raw: bytes) -> tuple[UUID, int]:
    id_, generation, _ = raw.decode().split(":")
    return UUID(id_), int(generation)


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
        self.rows: dict[UUID, int] = {}
        self.done: set[UUID] = set()
        self.workers = {slot: Process(f"w{slot}") for slot in SLOTS}
        self.started = len(SLOTS)
        self.token, self.sequence = "*", 0
        self.polled: list[bytes] = []
        self.page: dict[UUID, int] = {}
        self.missing: list[UUID] = []
        self.sent: list[Callable[[], Awaitable[object]]] = []

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

    @rule(chosen=ids)
    def commit(self, chosen: UUID) -> None:
        if chosen not in self.rows and chosen not in self.done:
            self.rows[chosen] = 1
            self.polled.append(entry(chosen, 1))

    @rule(again=lost)
    def push_what_was_polled(self, again: bool) -> None:
        polled, self.polled = self.polled, []
        self.push(polled, again=again)

    @rule()
    def forget_what_was_polled(self) -> None:
        self.polled = []

    @rule()
    def touch(self) -> None:
        self.push([])

    def push(self, raws: list[bytes], *, again: bool = False) -> None:
        expected, self.sequence = self.token, self.sequence + 1
        token = f"r:{self.sequence}"
        pushed = self.send(lambda: self.broker.push(QUEUE, raws, expected=expected, token=token), again=again)
        self.token = token if pushed is not None else "*"

    @rule(chosen=subsets)
    def walk_reads_a_page(self, chosen: set[UUID]) -> None:
        self.page = {id_: generation for id_, generation in self.rows.items() if id_ in chosen}
        self.missing = []

    @rule()
    def walk_asks_redis(self) -> None:
        page = list(self.page)
        known = self.do(self.broker.known(QUEUE, page)) if page else []
        self.missing = [id_ for id_, generation in zip(page, known, strict=True) if generation < self.page[id_]]
        self.page = {}

    @rule(again=lost)
    def walk_reads_again_and_pushes(self, again: bool) -> None:
        self.push([entry(id_, self.rows[id_]) for id_ in self.missing if id_ in self.rows], again=again)
        self.missing = []

    # --- workers

    @rule(slot=slots, count=st.integers(1, 3), reply_lost=lost)
    def fetch(self, slot: int, count: int, reply_lost: bool) -> None:
        worker = self.workers[slot]
        if not worker.is_dead:
            fetched = self.do(self.broker.fetch(QUEUE, worker.name, count))
            if fetched is not None and not reply_lost:
                self.own(worker, fetched.entries)

    def own(self, worker: Process, raws: list[bytes]) -> None:
        """Read the rows; what is not at its generation is settled without a run."""
        for raw in raws:
            if raw not in worker.owned:
                worker.owned.add(raw)
                id_, generation = parse(raw)
                if self.rows.get(id_) != generation:
                    worker.settled.add(raw)

    @rule(slot=slots, number=which)
    def complete(self, slot: int, number: int) -> None:
        if raw := self.running(slot, number):
            id_, generation = parse(raw)
            if self.rows.get(id_) == generation:
                assert id_ not in self.done
                del self.rows[id_]
                self.done.add(id_)
            self.workers[slot].settled.add(raw)

    @rule(slot=slots, number=which)
    def reschedule(self, slot: int, number: int) -> None:
        if raw := self.running(slot, number):
            id_, generation = parse(raw)
            if self.rows.get(id_) == generation:
                self.rows[id_] = generation + 1
                self.polled.append(entry(id_, generation + 1))
            self.workers[slot].settled.add(raw)

    def running(self, slot: int, number: int) -> bytes | None:
        worker = self.workers[slot]
        running = sorted(worker.owned - worker.settled)
        return running[number % len(running)] if running and not worker.is_dead else None

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

    @rule(slot=slots, number=which, again=lost)
    def release(self, slot: int, number: int, again: bool) -> None:
        worker = self.workers[slot]
        if raw := self.running(slot, number):
            self.send(lambda: self.broker.release(QUEUE, worker.name, [raw]), again=again)
            worker.owned.discard(raw)

    @rule(slot=slots, number=which, again=lost)
    def park(self, slot: int, number: int, again: bool) -> None:
        worker = self.workers[slot]
        if raw := self.running(slot, number):
            self.send(lambda: self.broker.park(QUEUE, worker.name, "task", [raw]), again=again)
            worker.owned.discard(raw)

    @rule(limit=st.integers(1, 3), again=lost)
    def unpark(self, limit: int, again: bool) -> None:
        self.send(lambda: self.broker.unpark(QUEUE, ["task"], limit=limit), again=again)

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

    @rule(slot=slots)
    def die(self, slot: int) -> None:
        self.workers[slot].is_dead = True

    @rule(slot=slots)
    def start_another(self, slot: int) -> None:
        """A new process in the place of a dead one, with a name of its own."""
        if self.workers[slot].is_dead:
            self.started += 1
            self.workers[slot] = Process(f"w{self.started}")

    # --- the sweeper, whose victims may well be alive

    @rule(number=which, locked=subsets, dies=st.booleans(), again=lost)
    def sweep(self, number: int, locked: set[UUID], dies: bool, again: bool) -> None:
        beats = self.do(self.broker.beats(QUEUE))
        if beats:
            name = sorted(beats)[number % len(beats)]
            self.sweep_one(name, beats[name], locked=locked, dies=dies, again=again)

    def sweep_one(
        self,
        name: str,
        seen: bytes,
        *,
        locked: set[UUID] = frozenset(),
        dies: bool = False,
        again: bool = False,  # type: ignore[assignment]
    ) -> None:
        held = self.do(self.broker.working(QUEUE, name))
        standings = {}
        for raw in held:
            id_, generation = parse(raw)
            if self.rows.get(id_) == generation and id_ not in locked:
                self.rows[id_] = generation + 1
            standings[raw] = self.rows.get(id_, 0)
        if not dies:
            self.send(lambda: self.broker.sweep(QUEUE, name, seen, standings), again=again)

    # --- faults

    @rule()
    def lose_everything(self) -> None:
        self.do(self.client.flushall())

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
                    self.sweep_one(name, seen)
            last.counter += 1
            found: Any = self.do(self.make_beat(last)())
            self.own(last, found.unknown)
            self.do(self.broker.unpark(QUEUE, ["task"]))
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
