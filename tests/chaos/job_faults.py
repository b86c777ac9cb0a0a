"""The faults that jobs bring with them, and the loss of Redis with a backlog; entered into the table of `faults`."""

from __future__ import annotations

import random
import signal
import time
from typing import Any
from uuid import UUID

import anyio

from tests.chaos import app
from tests.chaos.faults import NONE, Death, Strike, death_of, fault
from tests.chaos.stage import KILLED, Stage
from tests.chaos.store_faults import ALL_RUNNING

BACKLOG = 10_000
REPAIR_S = 120.0


@fault("a job that kills its process, beside innocents", bound="what each killed worker held")
async def killer_job(stage: Stage, choose: random.Random) -> Strike:
    """Three workers die of it; then it is dead, and it alone."""
    _, job = await _order(stage, choose, "die", app.die)
    deaths: list[Death] = []
    ends_at = time.monotonic() + REPAIR_S
    while not await stage.observer.rows("SELECT FROM jobq.dead WHERE id = $1", job):
        assert time.monotonic() < ends_at, f"job {job} has killed {len(deaths)} workers, and is not dead"
        for worker in [worker for worker in stage.workers if worker.has_ended]:
            assert await worker.ends() == KILLED, worker.last_words()
            stage.names |= await stage.observer.names()  # one that was just started may be the next to die
            deaths.append(await death_of(stage, worker))
            stage.replace(worker)
        await anyio.sleep(0.05)
    return Strike.of_deaths(*deaths)


@fault("a job that blocks the event loop for two leases", bound=NONE)
async def block_loop(stage: Stage, choose: random.Random) -> Strike:
    seconds = 2 * stage.shape.lease_s
    order, _ = await _order(stage, choose, "book", app.block, seconds=seconds)
    ends_at = time.monotonic() + REPAIR_S
    while not await stage.observer.rows("SELECT FROM chaos.effect WHERE order_id = $1", order):
        assert time.monotonic() < ends_at, f"order {order} has no effect"
        await anyio.sleep(0.05)
    return Strike(bound=0)


@fault(f"FLUSHALL with {BACKLOG:,} jobs waiting", bound=ALL_RUNNING)
async def flush_backlog(stage: Stage, choose: random.Random) -> Strike:
    """Repaired when Redis knows every job again that is not done."""
    observer = stage.observer
    keys = observer.broker.keys(app.plain.queue)
    for worker in stage.workers:
        worker.signal(signal.SIGSTOP)  # for less than a lease: they would take from it at once
    try:
        ids = await _backlog(stage, choose)
        waiting = await _until_full(stage, keys.known)
        await observer.redis.flushall()
    finally:
        for worker in stage.workers:
            worker.signal(signal.SIGCONT)
    since, ends_at = time.time(), time.monotonic() + REPAIR_S
    while left := await observer.rows("SELECT id FROM jobq.outbox WHERE id = ANY($1)", ids):
        known = await observer.redis.hmget(keys.known, [row[0].hex for row in left])
        if None not in known:
            break
        assert time.monotonic() < ends_at, f"{known.count(None)} of {waiting} jobs are not back in Redis"
    repaired_s = time.time() - since
    note = f"{waiting:,} jobs waiting"
    return Strike(bound=stage.shape.capacity, since=since, repaired_s=repaired_s, note=note)


async def _order(stage: Stage, choose: random.Random, kind: str, task: Any, **values: Any) -> tuple[UUID, UUID]:
    """Take one order, as a producer does. Returns its id and its job's."""
    order = UUID(int=choose.getrandbits(128), version=4)
    async with stage.observer.transaction() as connection:
        job = await task.enqueue(connection, order, **values)
        await connection.execute(
            "INSERT INTO chaos.orders (id, kind, job_id, failures) VALUES ($1, $2, $3, 0)", order, kind, job.id
        )
    return order, job.id


async def _backlog(stage: Stage, choose: random.Random) -> list[UUID]:
    orders = [UUID(int=choose.getrandbits(128), version=4) for _ in range(BACKLOG)]
    async with stage.observer.transaction() as connection:
        later = app.plain.opts(priority=4)
        enqueued = await app.jobs.enqueue_many(connection, [later.job(order, 0.0) for order in orders])
        records = [(order, "plain", job.id, 0) for order, job in zip(orders, enqueued, strict=True)]
        await connection.copy_records_to_table(
            "orders", schema_name="chaos", columns=["id", "kind", "job_id", "failures"], records=records
        )
    return [job.id for job in enqueued]


async def _until_full(stage: Stage, known: str) -> int:
    """Wait until the backlog is in Redis, or as much of it as there is after half a lease."""
    ends_at = time.monotonic() + stage.shape.lease_s / 2
    while True:
        waiting: int = await stage.observer.redis.hlen(known)
        if waiting >= BACKLOG or time.monotonic() > ends_at:
            return waiting
        await anyio.sleep(0.02)
