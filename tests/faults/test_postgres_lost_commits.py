"""PostgreSQL loses its last commits, and goes back to transaction numbers that it has used before.

By a failover to a replica that lagged, and by a crash with `synchronous_commit = off`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from jobq import Context, embedded
from jobq.outbox.database import Database
from jobq.relay.leadership import Relay
from jobq.settings import RelaySettings
from tests.builders import Bench, turn, write_effect
from tests.faults.proxy import Proxy, proxy_before
from tests.postgres_pair import connection_to, make_tables, postgres_pair, query, socket_of
from tests.waiting import until

NEXT_XID = "SELECT pg_current_xact_id()::text::bigint"
BURNT_XIDS = 300


@dataclass
class Loss:
    """A PostgreSQL behind a proxy. Its commits are kept until `begin`, and lost by `happen` from there on."""

    node: embedded.Servers
    proxy: Proxy
    redis_url: str
    begin: Callable[[], Awaitable[None]]
    happen: Callable[[], Awaitable[None]]

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.proxy.port}/postgres"


@asynccontextmanager
async def by_failover() -> AsyncIterator[Loss]:
    async with postgres_pair() as pair, proxy_before(socket_of(pair.primary)) as proxy:

        async def happen() -> None:
            await pair.fail_over()
            proxy.target, loss.node = socket_of(pair.replica), pair.replica

        loss = Loss(pair.primary, proxy, pair.redis_url, pair.cut_off, happen)
        yield loss


@asynccontextmanager
async def by_crash() -> AsyncIterator[Loss]:
    settings = {"synchronous_commit": "off", "autovacuum": "off", "bgwriter_lru_maxpages": "0"}
    servers = await asyncio.to_thread(lambda: embedded.start(postgres_config=settings))
    stopped: list[int] = []

    async def begin() -> None:
        await query(servers, "CHECKPOINT")
        # It would write them to disk a little later.
        writer = await query(servers, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'")
        os.kill(writer, signal.SIGSTOP)
        stopped.append(writer)

    async def happen() -> None:
        os.kill(stopped.pop(), signal.SIGKILL)
        await asyncio.to_thread(servers.postgres.kill)
        await asyncio.to_thread(servers.postgres.start, settings)

    try:
        await make_tables(servers.database_url)
        async with proxy_before(socket_of(servers)) as proxy:
            yield Loss(servers, proxy, servers.redis_url, begin, happen)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(servers.stop)


@asynccontextmanager
async def running_relay(loss: Loss, **given: float) -> AsyncIterator[Relay]:
    """A relay without its scrub, which would bring in the end what a poll has missed."""
    database, stopping = Database.of(loss.url), asyncio.Event()
    settings: dict[str, Any] = {"beat": 0.01, "scrub_every": 1e6, "detect_loss_every": 0.05} | given
    relay = Relay(database, loss.redis_url, "jobq", RelaySettings(**settings))
    task = asyncio.create_task(relay.run(stopping))
    try:
        yield relay
    finally:
        stopping.set()
        await task
        await database.close()


@pytest.mark.parametrize("how", [by_failover, by_crash])
async def test_what_is_committed_under_numbers_that_were_lost_runs_and_what_was_lost_does_not(
    how: Callable[[], AbstractAsyncContextManager[Loss]],
) -> None:
    async with how() as loss, Bench.open(loss.url, loss.redis_url) as bench, running_relay(loss):
        runs: list[str] = []

        @bench.app.task
        async def book(ctx: Context, order: str) -> None:
            runs.append(order)
            async with ctx.complete() as session:
                await write_effect(session, ctx)

        await bench.enqueue(book, "kept")
        await loss.begin()
        lost = [await bench.enqueue(book, "lost") for _ in range(3)]
        for _ in range(BURNT_XIDS):
            await bench.db.fetchval(NEXT_XID)
        last = await bench.db.fetchval(NEXT_XID)
        await bench.enqueue(book, "lost, and last")
        await until(lambda: is_ready(bench, 5), "a poll of the relay has seen all numbers so far")

        # New jobs are there before the relay asks again: it must not ask for what came after those.
        loss.proxy.is_refusing = True
        await loss.happen()
        async with connection_to(loss.node) as producer, producer.transaction():
            await book.enqueue(producer, "new")
            assert await producer.fetchval(NEXT_XID) < last - BURNT_XIDS / 2
        loss.proxy.is_refusing = False
        await until(lambda: is_ready(bench, 6), "the relay has pushed what is new")

        worker = await bench.worker()
        await turn(worker)
        assert sorted(runs) == ["kept", "new"]
        assert await query(loss.node, "SELECT count(*) FROM effect") == 2
        assert (await bench.stats())["ghost"] == 4
        assert await bench.broker.known("default", lost) == [0, 0, 0]


async def is_ready(bench: Bench, count: int) -> bool:
    return len(await bench.ready()) == count


# --- two primaries: nobody ended the old one -------------------------------------------------------------------------


async def test_a_worker_that_still_asks_the_old_primary_delays_new_jobs_and_loses_none() -> None:
    async with (
        postgres_pair() as pair,
        proxy_before(socket_of(pair.primary)) as proxy,
        Bench.open(f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres", pair.redis_url) as bench,
    ):
        runs: list[str] = []

        @bench.app.task
        async def book(ctx: Context, order: str) -> None:
            runs.append(order)
            async with ctx.complete() as session:
                await write_effect(session, ctx)

        worker = await bench.worker()
        await bench.commit_and_relay(book, "old")
        await turn(worker)
        await pair.caught_up()

        await pair.promote()
        proxy.target = socket_of(pair.replica)
        loss = Loss(pair.replica, proxy, pair.redis_url, pair.cut_off, pair.crash)
        async with running_relay(loss, scrub_every=0.1, scrub_pause=0.0):
            async with connection_to(pair.replica) as producer, producer.transaction():
                await book.enqueue(producer, "new")
            await until(lambda: is_ready(bench, 1), "the relay has pushed it")
            await turn(worker)
            assert (runs, (await bench.stats())["ghost"]) == (["old"], 1)

            await pair.crash()
            await until(lambda: is_ready(bench, 1), "the scrub has brought it again")
            await turn(worker)
            assert runs == ["old", "new"]
            assert await query(pair.replica, "SELECT count(*) FROM effect") == 2
            assert await query(pair.replica, "SELECT count(*) FROM jobq.outbox") == 0
