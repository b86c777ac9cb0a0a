"""What grows with the jobs that wait, with those that are done, and with old snapshots; and what one job takes.

Sizes are for the default --jobs and follow it. Progress is read from the counter of acked entries, which costs the
same however many rows there are. Called by suite. Calls stage and enqueue.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import ExitStack

import redis.asyncio

from jobq.broker.keys import Keys

from . import cpu
from .enqueue import transactions
from .figures import Measure, Samples
from .stage import APP, Stage, counted

ROUNDS = 10
"""Of a tenth of the jobs, in `waiting`."""
SNAPSHOT_ROUNDS = 6
"""Of half of the jobs, in `snapshot`."""
_WORKER = ("worker", APP, "-q", "default")


async def waiting(stage: Stage) -> Samples:
    """Drain 10,000 at a time; 100,000; and the 100,000th to the 300,000th of 1,000,000, which keep the lists full."""
    keys = await stage.keys()
    async with stage.redis() as client:
        with stage.process("relay"), stage.process(*_WORKER):
            rates = [await _round(stage, client, keys, stage.jobs // 10) for _ in range(1 + ROUNDS)]
        ten = statistics.median(rates[1:])
        await stage.clear()
        with stage.process("relay"), stage.process(*_WORKER):
            await _round(stage, client, keys, stage.jobs // 10)  # what is opened on the way is open then
            hundred = await _round(stage, client, keys, stage.jobs)
        await stage.clear()
        await stage.fill(10 * stage.jobs)
        with stage.process("relay"), stage.process(*_WORKER):
            million = await _rate_between(stage, client, keys, stage.jobs, 3 * stage.jobs)
    return {"10k": ten, "100k": hundred, "1m": million, "100k-of-10k": hundred / ten, "1m-of-10k": million / ten}


async def snapshot(stage: Stage) -> Samples:
    """Rounds of 50,000, each filled and drained, after one whose rows are not kept; a snapshot keeps all others'."""
    keys = await stage.keys()
    rates = []
    async with stage.redis() as client, stage.database() as holder:
        with stage.process("relay"), stage.process(*_WORKER):
            await _round(stage, client, keys, stage.jobs // 10)
            await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            await holder.fetch("SELECT FROM jobq.outbox LIMIT 1")
            for _ in range(SNAPSHOT_ROUNDS):
                rates.append(await _round(stage, client, keys, stage.jobs // 2))
    return {"first": rates[0], "last": rates[-1], "ratio": rates[-1] / rates[0]}


async def relay_start(stage: Stage) -> Samples:
    """From the start of the relay's process until the first entry is there, and until the ready list is full."""
    keys = await stage.keys()
    async with stage.redis() as client:
        began_at = time.perf_counter()
        with stage.process("relay"):
            while await client.get(keys.relay) is None:
                await stage.breathe()
            empty_s = time.perf_counter() - began_at
        await stage.clear()
        await stage.fill(10 * stage.jobs)
        began_at = time.perf_counter()
        with stage.process("relay"):
            while not await client.llen(keys.ready[1]):
                await stage.breathe()
            first_s = time.perf_counter() - began_at
            while await client.llen(keys.ready[1]) < stage.jobs:
                await stage.breathe()
            full_s = time.perf_counter() - began_at
    return {"first-push": first_s, "full-list": full_s, "empty-outbox": empty_s}


async def redis_memory(stage: Stage) -> Samples:
    """Redis's memory for each of 100,000 waiting jobs; and at its highest while ten times as many are drained."""
    keys = await stage.keys()
    peaks = []
    async with stage.redis() as client, stage.database() as connection:
        for count in (stage.jobs, 10 * stage.jobs):
            await stage.clear()
            await stage.fill(count)
            empty = await _used_memory(client)
            with stage.process("relay"):
                while await client.llen(keys.ready[1]) < stage.jobs:
                    await stage.breathe()
                full = peak = await _used_memory(client)
                if count == stage.jobs:
                    job = (full - empty) / count
                with stage.process(*_WORKER):
                    while await connection.fetchval("SELECT id FROM jobq.outbox ORDER BY id DESC LIMIT 1"):
                        peak = max(peak, await _used_memory(client))
                        await asyncio.sleep(0.1)
            peaks.append(peak)
    return {"job": job, "beyond-cap": peaks[1] / peaks[0]}


async def wal(stage: Stage) -> Samples:
    """WAL and dead rows for a small job from its enqueue to its end: one a transaction, and 10,000 a transaction."""
    found: dict[str, float | list[float]] = {}
    async with stage.database() as connection:
        for name, batch, count in (("single", 1, stage.jobs // 5), ("many", 10_000, stage.jobs)):
            await stage.clear()
            before = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
            dead = await _dead_rows(stage)
            with stage.process("relay"), stage.process(*_WORKER):
                await transactions(stage, writers=16, batch=batch, jobs=count)
                await stage.until_empty(connection)
            after = "SELECT CAST(pg_wal_lsn_diff(pg_current_wal_insert_lsn(), $1) AS float8)"
            found[name] = await connection.fetchval(after, before) / count
            # The statistics of a session are there when it has ended.
            found[f"{name}-dead-rows"] = (await _dead_rows(stage) - dead) / count
    return found


async def memory(stage: Stage) -> Samples:
    """Resident memory of relay and worker when the jobs are drained, and at its highest until then."""
    await stage.fill(stage.jobs)
    found: dict[str, float | list[float]] = {}
    with ExitStack() as stack:
        processes = {
            "relay": stack.enter_context(stage.process("relay")),
            "worker": stack.enter_context(stage.process(*_WORKER)),
        }
        await stage.drain_rate()
        for role, process in processes.items():
            found[role] = _megabytes(process.pid)
            found[f"{role}-peak"] = _megabytes(process.pid, peak=True)
    return found


async def _round(stage: Stage, client: redis.asyncio.Redis, keys: Keys, count: int) -> float:
    """Jobs a second of `count`, filled beside a relay and a worker that have nothing else to do."""
    before = await counted(client, keys, "acked")
    await stage.fill(count)
    return await _rate_between(stage, client, keys, before + 1, before + count)


async def _rate_between(stage: Stage, client: redis.asyncio.Redis, keys: Keys, first: int, last: int) -> float:
    acked = begun = await counted(client, keys, "acked")
    began_at = time.perf_counter()
    while acked < first:
        begun, began_at = acked, time.perf_counter()
        await stage.breathe()
        acked = await counted(client, keys, "acked")
    while (ended := await counted(client, keys, "acked")) < last:
        await stage.breathe()
    return (ended - begun) / (time.perf_counter() - began_at)


async def _used_memory(client: redis.asyncio.Redis) -> int:
    return int((await client.info("memory"))["used_memory"])


async def _dead_rows(stage: Stage) -> int:
    """Rows of the outbox that were updated or deleted so far."""
    async with stage.database() as connection:
        return await connection.fetchval(
            "SELECT n_tup_upd + n_tup_del FROM pg_stat_user_tables WHERE relid = 'jobq.outbox'::regclass"
        )


def _megabytes(pid: int, *, peak: bool = False) -> float:
    return cpu.resident_bytes(pid, peak=peak) / 1_000_000


MEASURES = [
    Measure(
        "growth/waiting",
        "jobs/s",
        waiting,
        "drained with so many waiting, one worker process; of 1,000,000 the 100,000th to the 300,000th",
        is_slow=True,
        units={"100k-of-10k": "of the rate with 10,000", "1m-of-10k": "of the rate with 10,000"},
    ),
    Measure(
        "growth/snapshot",
        "jobs/s",
        snapshot,
        "the first and the last 50,000 of 300,000 under a REPEATABLE READ snapshot that stays open",
        is_slow=True,
        units={"ratio": "of the first"},
    ),
    Measure(
        "growth/relay-start",
        "s",
        relay_start,
        "with 1,000,000 waiting, from the start of the process, imports included",
        is_slow=True,
    ),
    Measure(
        "growth/redis",
        "bytes",
        redis_memory,
        "of Redis for each of 100,000 waiting jobs; and the peak with 1,000,000 waiting over that with 100,000",
        is_slow=True,
        units={"beyond-cap": "of the peak with 100,000"},
    ),
    Measure(
        "growth/wal",
        "bytes",
        wal,
        "WAL of PostgreSQL for a small job from enqueue to end, one a transaction or 10,000",
        is_slow=True,
        units={"single-dead-rows": "rows", "many-dead-rows": "rows"},
    ),
    Measure("growth/memory", "MB", memory, "resident after 100,000 jobs, and at its highest", is_slow=True),
]
