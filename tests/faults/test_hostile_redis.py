"""Somebody who may write to Redis, and does: what they can do is what SECURITY.md says, and no more.

Whatever they write, effects are made once, no job is lost, nothing runs for a row that is not there, and no process
ends or comes to hold all of it in memory.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from jobq import Context
from jobq.broker.keys import prefix, queue_names
from jobq.model import Entry
from jobq.settings import WorkerSettings
from jobq.worker import sweeper as sweeper_module
from jobq.worker.worker import Worker
from tests.builders import Bench, any_id, running, turn, write_effect
from tests.commands import Commands
from tests.faults.leading import leading
from tests.roles import roles_of
from tests.waiting import until

FLOOD = 200_000
MEBIBYTE = 1024 * 1024


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


class Shop:
    """A task whose runs and effects are counted, and jobs of it."""

    def __init__(self, bench: Bench):
        self.runs: Counter[UUID] = Counter()
        self._bench = bench

        @bench.app.task(name="book")
        async def book(ctx: Context, note: str) -> None:
            self.runs[ctx.id] += 1
            async with ctx.complete() as session:
                await write_effect(session, ctx, note)

        self.book = book

    async def jobs(self, count: int, *, queue: str = "default") -> list[UUID]:
        """Commit and push some."""
        ids = [await self._bench.enqueue(self.book, "n", queue=queue) for _ in range(count)]
        await self._bench.relay()
        return ids

    async def all_done(self, count: int, *, but: int = 0) -> None:
        """Every job, or all but some, has had its effect, once; and none is dead."""

        async def is_empty() -> bool:
            return await self._bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == but

        await until(is_empty, "all jobs are done")
        assert await self._bench.effects() == count
        assert await self._bench.db.fetchval("SELECT count(*) FROM jobq.dead") == 0


@pytest.fixture
def shop(bench: Bench) -> Shop:
    return Shop(bench)


async def flood(bench: Bench, key: str, count: int, text: str) -> None:
    """Push many into a list; `%d` in the text is their number."""
    script = "for i = 1, ARGV[1] do redis.call('RPUSH', KEYS[1], string.format(ARGV[2], i)) end"
    for _ in range(count // 10_000):
        await bench.redis.eval(script, 1, key, 10_000, text)


def memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def test_forged_entries_run_nothing_and_real_ones_have_their_effect_once(bench: Bench, shop: Shop) -> None:
    ids = await shop.jobs(4)
    other = await shop.jobs(1, queue="other")
    real, twin, future, past = ids
    keys = bench.broker.keys("default")
    absent = [any_id() for _ in range(100)]
    forged = [
        *(Entry.of(id_, 1, 2).raw for id_ in absent),
        *(
            b"%s:%s:2" % (real.hex.encode(), word)
            for word in (b"2", b"2147483647", b"2147483648", b"-1", b"0", b"9" * 99)
        ),
        *(Entry.of(real, 1, priority).raw for priority in (1, 3, 4)),
        Entry.of(future, 7, 2).raw,
        Entry.of(other[0], 1, 2).raw,
        *[Entry.of(twin, 1, 2).raw] * 10_000,
    ]
    await bench.redis.lpush(keys.ready[1], *forged)
    await bench.redis.hset(keys.known, mapping={id_.hex: 1 for id_ in [*absent, *other]} | {future.hex: 7})
    await bench.db.execute("UPDATE jobq.outbox SET generation = 3 WHERE id = $1", past)

    async with running(Worker(bench.app, WorkerSettings(queues=("default",), beat=0.1))):
        await until(lambda: {real, twin} <= shop.runs.keys(), "the real ones ran")
        async with leading(bench):

            async def is_read() -> bool:
                return not await bench.ready()

            await until(is_read, "every forged entry has been read")
            await bench.redis.hdel(keys.known, future.hex)  # they have gone; see below for what they leave
            await until(lambda: set(ids) <= shop.runs.keys(), "all real ones ran")
            await shop.all_done(4, but=1)
    assert set(shop.runs) == set(ids), "the queue of a job is none of this worker's, whoever says so"
    assert max(shop.runs.values()) <= 2
    async with running(Worker(bench.app, WorkerSettings(queues=("other",)))):
        await shop.all_done(5)


@pytest.mark.parametrize("text", ["garbage %d", "00000000000070008000%012x:1:2"], ids=["garbage", "absent"])
@pytest.mark.parametrize("place", ["ready", "working", "parked"])
async def test_a_flood_neither_stops_a_worker_nor_fills_its_memory(
    bench: Bench, shop: Shop, place: str, text: str
) -> None:
    worker = Worker(bench.app, WorkerSettings(beat=0.1, lease=30.0))
    keys = bench.broker.keys("default")
    key = {"ready": keys.ready[0], "working": keys.working(worker.name), "parked": keys.parked("book")}[place]
    before = memory()
    await flood(bench, key, FLOOD, text)

    async with running(worker):
        ids = await shop.jobs(20)
        await until(lambda: shop.runs.keys() >= set(ids), "the real jobs ran")
        await shop.all_done(20)
    assert memory() - before < 100 * MEBIBYTE


async def test_huge_values_are_dropped(bench: Bench, shop: Shop) -> None:
    worker = Worker(bench.app, WorkerSettings(beat=0.1, lease=30.0))
    keys = bench.broker.keys("default")
    huge = b"x" * 50 * MEBIBYTE
    for key in (keys.ready[0], keys.working(worker.name), keys.parked("book"), keys.bell):
        await bench.redis.lpush(key, huge)
    for key in (keys.known, keys.beats, keys.workers, keys.stats):
        await bench.redis.hset(key, "huge", huge)
    await bench.redis.set(keys.relay, huge)
    del huge

    async with running(worker), leading(bench):
        ids = await shop.jobs(3)
        await until(lambda: shop.runs.keys() >= set(ids), "the real jobs ran")
        await shop.all_done(3)


async def test_keys_of_a_wrong_type_one_after_the_other_lose_no_job(bench: Bench, shop: Shop) -> None:
    worker = Worker(bench.app, WorkerSettings(beat=0.1, lease=30.0))
    keys = bench.broker.keys("default")
    names = [keys.relay, keys.known, *keys.ready, keys.beats, keys.workers, keys.bell, keys.stats]
    names += [keys.working(worker.name), keys.parked("book"), queue_names(bench.broker.database_id)]
    async with running(worker), leading(bench):
        for name in names:
            await bench.enqueue(shop.book, "n")
            await bench.redis.pipeline().delete(name).zadd(name, {"a sorted set": 1}).execute()  # one transaction
            await bench.enqueue(shop.book, "n")
        await shop.all_done(2 * len(names))


async def test_forged_workers_hold_up_no_sweep(bench: Bench, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(sweeper_module, "monotonic", lambda: now)
    ids = await shop.jobs(2)
    keys = bench.broker.keys("default")
    names = [b"relay", b"w-1:read", b"\xff\xfe", b"a\0b", b"\x1b[2J", b"", b"x" * 1000, b"%s", b"jobq:relay"]
    for name in names:
        await bench.redis.hset(keys.beats, name, b"\xff junk")
        working = keys.base.encode() + b"working:" + name
        await bench.redis.rpush(working, b"junk", Entry.of(any_id(), 1, 2).raw)
    fetched = await bench.broker.fetch("default", "w-gone", 5) or await _fetch_as(bench, "w-gone")
    assert len(fetched.entries) == 2
    worker = await bench.worker(lease=10.0)
    sessions = await bench.leader()

    for _ in range(12):
        await worker.sweeper.step()
        now += 1.0
    counters = await bench.broker.beats("default")

    assert set(counters) == {worker.name}
    assert await sessions.step() >= 0, "the relay's session was ended on the word of Redis"
    await turn(worker)
    await shop.all_done(2)
    assert set(shop.runs) == set(ids)


async def _fetch_as(bench: Bench, name: str) -> Any:
    await bench.redis.hset(bench.broker.keys("default").beats, name, "1")
    return await bench.broker.fetch("default", name, 5)


async def test_hostile_queue_names_hold_up_no_sweep_and_reach_no_other_keys(bench: Bench, shop: Shop) -> None:
    hint = queue_names(bench.broker.database_id)
    await bench.redis.set("sessions:7", "keep")
    odd = [b"", b"}x{", b"\xff", b"../..", b"A", b"a" * 65, b"x}:relay", b"\x1b[31m"]
    await bench.redis.sadd(hint, *odd)
    for start in range(0, 100_000, 10_000):
        await bench.redis.sadd(hint, *(f"q{number}" for number in range(start, start + 10_000)))
    worker = await bench.worker()

    names = await bench.broker.queues()
    await asyncio.wait_for(worker.sweeper.step(), 5)

    assert len(names) <= 2_000
    assert not {name.decode("utf-8", "surrogateescape") for name in odd} & names
    assert await bench.redis.get("sessions:7") == b"keep"


@pytest.fixture
def commands(shared_database_url: str, redis_url: str) -> Commands:
    return Commands(shared_database_url, redis_url)


BOMBS = [
    "[" * 100_000,
    '{"host": "\\u001b[2J\\u009b31m\\u202e", "tasks": [1, {}], "pid": 1e999, "slots": -1e400, "version": "\\ud800"}',
    '{"host": "' + "h" * 100_000 + '", "pid": "' + "9" * 5_000 + '"}',
    '{"pid": NaN, "slots": [], "host": {"a": "\\n"}}',
    "9" * 100_000,
    "\udcff",
]


@pytest.mark.parametrize("command", ["status", "doctor"])
async def test_what_workers_say_of_themselves_moves_no_cursor_and_ends_no_command(
    bench: Bench, commands: Commands, command: str
) -> None:
    keys = bench.broker.keys("default")
    for number, bomb in enumerate(BOMBS):
        name = f"w-\x1b]0;title\x07\u202e\x9b{number}\n"
        await bench.redis.hset(keys.workers, name, bomb.encode("utf-8", "surrogateescape"))
        await bench.redis.hset(keys.beats, name, "junk")
    await bench.redis.hset(keys.stats, mapping={"pushed": "1e400", "ghost": "9" * 5_000, "acked": "\x1b[2J"})
    await bench.broker.announce(["default", "bad\x1b[2J"])

    shown = await commands.run(command)

    assert shown.exception is None or isinstance(shown.exception, SystemExit)
    assert shown.exit_code in (0, 1)
    assert all(line.isprintable() for line in shown.output.split("\n"))
    assert max(map(len, shown.output.split("\n"))) < 2_000
    if command == "status":
        assert len((await commands.json(command))["workers"]) == len(BOMBS)


async def test_jobs_that_redis_says_it_knows_wait_until_the_queues_keys_are_removed(bench: Bench, shop: Shop) -> None:
    ids = await shop.jobs(3)
    keys = bench.broker.keys("default")
    await bench.redis.delete(*keys.ready)
    await bench.redis.hset(keys.known, ids[0].hex, 2**31 - 1)

    async with running(Worker(bench.app, WorkerSettings(beat=0.1, lease=30.0))), leading(bench):
        await shop.jobs(1)
        await until(lambda: len(shop.runs) == 1, "only what is pushed after it runs")
        own = [name async for name in bench.redis.scan_iter(match=f"{prefix(bench.broker.database_id)}*")]
        await bench.redis.delete(*own)
        await shop.all_done(4)


async def test_a_forged_token_costs_a_rebuild_and_no_job(bench: Bench, shop: Shop) -> None:
    async with running(Worker(bench.app, WorkerSettings(beat=0.1, lease=30.0))), leading(bench):
        for number in range(5):
            await bench.enqueue(shop.book, "n")
            await bench.redis.set(bench.broker.keys("default").relay, f"forged {number}")
        await bench.redis.script_flush()
        await shop.all_done(5)


async def test_a_full_redis_keeps_no_worker_from_starting_and_draining_it(bench: Bench, shop: Shop) -> None:
    await shop.jobs(3)
    try:
        await bench.redis.config_set("maxmemory", "1mb")
        async with running(Worker(bench.app, WorkerSettings(beat=0.1, lease=30.0))):
            await shop.all_done(3)
    finally:
        await bench.redis.config_set("maxmemory", "0")


async def test_crashes_that_were_made_up_bury_a_job_which_dead_retry_brings_back(
    bench: Bench, shop: Shop, commands: Commands
) -> None:
    (job_id,) = await shop.jobs(1)
    keys = bench.broker.keys("default")
    worker = await bench.worker()
    for generation in (1, 2, 3):
        await bench.redis.hset(keys.beats, "w-made-up", "1")
        await bench.redis.rpush(keys.working("w-made-up"), Entry.of(job_id, generation, 2).raw)
        await worker.sweeper.sweep("default", "w-made-up", b"1")
    dead = await bench.dead(job_id)
    assert dead is not None
    assert dead["reason"] == "poison"

    assert (await commands.run("dead", "retry", job_id)).exit_code == 0
    await bench.relay()
    await turn(worker)
    await shop.all_done(1)


async def test_a_worker_whose_session_may_not_be_ended_holds_up_no_sweep(
    shared_database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(sweeper_module, "monotonic", lambda: now)
    async with (
        roles_of(shared_database_url) as roles,
        Bench.open(shared_database_url, redis_url, database=roles.urls["worker"]) as bench,
    ):
        await bench.db.execute("SET application_name = 'jobq:w-first'")  # a session of another role
        keys = bench.broker.keys("default")
        for name in ("w-first", "w-gone"):
            await bench.redis.hset(keys.beats, name, "1")
            await bench.redis.rpush(keys.working(name), Entry.of(any_id(), 1, 2).raw)
        worker = await bench.worker(lease=10.0)
        for _ in range(12):
            await worker.sweeper.step()
            now += 1.0

        assert set(await bench.broker.beats("default")) == {"w-first", worker.name}
