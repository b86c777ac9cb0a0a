"""A whole jobq behind proxies: one database, one Redis, one application, a relay and a worker that run by themselves.

All of it reaches both stores through proxies, which are a test's to break. Orders of every kind are placed by name, and
in the end each has come to what it was to come to, once, and nothing is left in either store.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
from sqlalchemy import text

import jobq
from jobq import Context, JobQ, Reject, Retry, RetryPolicy
from jobq.broker.client import TROUBLE
from jobq.broker.keys import prefix, queue_names
from jobq.broker.scripts import script
from jobq.model import new_job_id
from jobq.outbox import follow
from jobq.outbox.database import is_unavailable
from jobq.relay.leadership import Relay
from jobq.run import HandBack
from jobq.settings import RelaySettings, WorkerSettings
from jobq.worker.worker import Worker
from tests.builders import KEPT_KEYS, Bench
from tests.faults.proxy import Proxy, postgres_proxy, redis_proxy
from tests.waiting import until

LONGEST_S = 60.0
KINDS = (
    *("book", "plain", "fail", "reject", "reject_unmourned", "charge", "hand_back", "renamed", "delayed", "many"),
    *("alike", "cancel", "stranger", "orphan", "unseen", "missed", "cut", "restart", "unscripted", "rival"),
)
"""Of orders; each provokes calls of its own."""
LUA = Path(jobq.__file__).parent / "broker" / "lua"
_LEASE_S = 0.4
_EFFECT = text("INSERT INTO effect (job_id, note) VALUES (:id, :note)")


@dataclass
class World:
    """Both stores behind proxies, and all of jobq on them."""

    bench: Bench
    """Beside the proxies, for looking."""
    answer_s: float
    """How long anybody waits for an answer."""
    app: JobQ
    postgres: Proxy
    valkey: Proxy
    runs: list[tuple[str, int]] = field(default_factory=list)
    """(order, crashes) of each run."""
    placed: list[str] = field(default_factory=list)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    relay: asyncio.Event | None = None
    """Set when the relay is to stop."""
    worker: Worker | None = None
    is_application_struck: bool = False
    """Whether the application reaches PostgreSQL through the proxy too."""
    _numbers: Iterator[int] = field(default_factory=count)

    def define_tasks(self) -> None:
        """One task for each way in which a job can go."""
        app = self.app
        # An attempt that lost its connection is made again soon; and what waits for a dead one itself needs a timeout.
        task = partial(app.task, retry=RetryPolicy(delay=lambda attempt, error: 0.02), timeout=5 * self.answer_s)

        @task()
        async def book(ctx: Context, name: str) -> None:
            await self._run(ctx, name)

        @task()
        async def plain(ctx: Context, name: str) -> None:
            self._note(ctx, name)

        @task()
        async def fail(ctx: Context, name: str) -> None:
            if ctx.attempt == 1:
                self._note(ctx, name)
                raise Retry(delay=0.05)
            await self._run(ctx, name)

        @task()
        async def reject(ctx: Context, name: str) -> None:
            self._note(ctx, name)
            raise Reject(name)

        @task()
        async def charge(ctx: Context, name: str) -> None:
            await ctx.step("charge", lambda: name)
            await self._run(ctx, name)

        @task()
        async def hand_back(ctx: Context, name: str) -> None:
            if name not in dict(self.runs):
                self._note(ctx, name)
                raise HandBack("not now")
            await self._run(ctx, name)

        @task(aliases=["formerly"])
        async def renamed(ctx: Context, name: str) -> None:
            await self._run(ctx, name)

    def _note(self, ctx: Context[Any], name: str) -> None:
        self.runs.append((name, ctx._job.crashes))

    async def _run(self, ctx: Context[Any], name: str) -> None:
        self._note(ctx, name)
        async with ctx.complete() as session:
            await session.execute(_EFFECT, {"id": ctx.id, "note": name})

    # --- orders, each of a kind that provokes something

    async def place(self, kind: str) -> None:
        """Place one order, and do what belongs to its kind."""
        name = f"{kind} {next(self._numbers)}"
        self.placed.append(name)
        self.app.dead_hooks[:] = [] if kind == "reject_unmourned" else [_mourn]
        await getattr(self, f"_place_{kind}", self._place_plainly)(name)

    async def _place_plainly(self, name: str) -> None:
        await self._commit(name, lambda tx: self.app.tasks[name.partition(" ")[0]].enqueue(tx, name))

    async def _place_reject_unmourned(self, name: str) -> None:
        await self._commit(name, lambda tx: self.app.tasks["reject"].enqueue(tx, name))

    async def _place_delayed(self, name: str) -> None:
        await self._commit(name, lambda tx: self.app.tasks["book"].opts(delay=0.1).enqueue(tx, name))

    async def _place_renamed(self, name: str) -> None:
        names = [name, f"{name} too"]
        self.placed.append(names[1])
        renamed = self.app.tasks["renamed"]
        jobs = [renamed.opts(idempotency_key=each).job(each) for each in names]
        await self._commit(name, lambda tx: self.app.enqueue_many(tx, jobs))

    async def _place_many(self, name: str) -> None:
        job = self.app.tasks["book"].opts(idempotency_key=name).job(name)
        await self._commit(name, lambda tx: self.app.enqueue_many(tx, [job]))

    async def _place_alike(self, name: str) -> None:
        await self._commit(name, lambda tx: self.app.enqueue_many(tx, [self.app.tasks["book"].job(name)]))

    async def _place_cancel(self, name: str) -> None:
        ids: list[UUID] = []

        async def enqueue(tx: asyncpg.Connection) -> None:
            ids.append((await self.app.tasks["book"].opts(delay=3600).enqueue(tx, name)).id)

        await self._commit(name, enqueue)
        # The last try is the one that was committed, or found to have been.
        await self._commit(f"not {name}", lambda tx: tx.execute("SELECT 1") if not ids else self._cancel(tx, ids))

    async def _cancel(self, tx: asyncpg.Connection, ids: list[UUID]) -> None:
        for id_ in ids:
            await self.app.cancel(tx, id_)

    async def _place_stranger(self, name: str) -> None:
        """A task that nobody knows comes with its job, and with the next release."""
        task = name.replace(" ", "_")
        await self._insert(task, name)
        parked = self.bench.broker.keys("default").parked(task)
        await until(lambda: self.bench.redis.llen(parked), f"{name} is parked", LONGEST_S)
        self.app.task(name=task, timeout=5 * self.answer_s)(self.app.tasks["book"].function)

    async def _place_orphan(self, name: str) -> None:
        """What a worker that died had in hand."""
        await self._insert("book", name, holder=f"w-{name.replace(' ', '-')}")

    async def _place_unseen(self, name: str) -> None:
        """What the worker has fetched and was never told of."""
        assert self.worker is not None
        await self._insert("book", name, holder=self.worker.name)

    async def _place_missed(self, name: str) -> None:
        """What was committed while there was no relay."""
        self.postgres.is_refusing = True
        self.postgres.cut()
        await self._insert("book", name)
        self.postgres.is_refusing = False

    async def _place_cut(self, name: str) -> None:
        """All must connect anew."""
        self.postgres.cut()
        await self._place_book(name)

    async def _place_restart(self, name: str) -> None:
        """Another worker and another relay take over."""
        self._stop_processes()
        await self._place_book(name)

    async def hold(self) -> None:
        """Place an order that waits in Redis until another one, of kind `held`, lets the worker go on."""
        assert self.worker is not None
        self.worker.orders.quiet.set()
        await self.place("book")
        waiting = self.bench.broker.keys("default").ready[1]
        await until(lambda: self.bench.redis.llen(waiting), "an order waits", LONGEST_S)

    async def _place_held(self, name: str) -> None:
        assert self.worker is not None
        self.worker.orders.quiet.clear()
        self.worker.orders.wake()
        await self._place_book(name)

    async def _place_nothing(self, name: str) -> None:
        self.placed.remove(name)

    async def _place_unscripted(self, name: str) -> None:
        """Redis has forgotten the scripts."""
        await self.bench.redis.script_flush()
        await self._place_book(name)

    async def _place_rival(self, name: str) -> None:
        """Somebody else leads, and does nothing: the relay stands by, and ends it."""
        rival = await asyncpg.connect(self.bench.app.given_database)
        lead = "SELECT pg_try_advisory_lock($1, hashtext($2))"
        try:
            self.postgres.cut()
            await until(lambda: rival.fetchval(lead, follow.LEADER_LOCK, self.app.schema), "the rival leads")
            await until(rival.is_closed, "the rival was ended", LONGEST_S)
        finally:
            rival.terminate()
        await self._place_book(name)

    async def _place_book(self, name: str) -> None:
        await self._commit(name, lambda tx: self.app.tasks["book"].enqueue(tx, name))

    async def _commit(self, name: str, write: Callable[[asyncpg.Connection], Awaitable[object]]) -> None:
        """Commit an order and its job as an application does that may be cut off: it looks, and tries again."""
        while not await self.bench.db.fetchval("SELECT count(*) FROM placed WHERE name = $1", name):
            connection: asyncpg.Connection | None = None
            try:
                async with asyncio.timeout(self.answer_s):
                    url = (self.app if self.is_application_struck else self.bench.app).given_database
                    connection = await asyncpg.connect(url, timeout=self.answer_s)
                    transaction = connection.transaction()
                    await transaction.start()
                    await connection.execute("INSERT INTO placed (name) VALUES ($1)", name)
                    await write(connection)
                    await transaction.commit()
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                pass
            finally:
                if connection is not None:
                    connection.terminate()

    async def _insert(self, task: str, name: str, *, holder: str | None = None) -> None:
        """Commit a row beside the proxies, with its entry in the hands of a worker."""
        job_id = UUID(int=new_job_id().int)
        keys = self.bench.broker.keys("default")
        if holder is not None:
            await self.bench.redis.rpush(keys.working(holder), f"{job_id.hex}:1:2")
            await self.bench.redis.hset(keys.known, job_id.hex, 1)
            await self.bench.redis.hsetnx(keys.beats, holder, 1)
        await self.bench.db.execute(
            "INSERT INTO jobq.outbox (id, queue, task, args) "
            "VALUES ($1, 'default', $2, json_build_object('name', $3::text))",
            job_id,
            task,
            name,
        )

    # --- processes

    async def run_workers(self) -> None:
        """One worker after the other; one that could not open is tried again, as its supervisor would."""
        settings = WorkerSettings(concurrency=4, lease=_LEASE_S, beat=0.1, grace=20)
        while not self.stopping.is_set():
            self.worker = serving = Worker(self.app, settings)
            try:
                assert await serving.run() == 0
            except Exception as error:
                if serving.is_open or not (is_unavailable(error) or isinstance(error, TROUBLE)):
                    raise
                await asyncio.sleep(0.05)

    async def run_relays(self) -> None:
        settings = RelaySettings(
            beat=0.1,
            poll_shortest=0.01,
            look_ahead=0.2,
            scrub_every=0.1,
            scrub_pause=0.0,
            detect_loss_every=0.1,
            takeover_after=0.3,
            tidy_every=0.2,
            sleep_after=1,
        )
        while not self.stopping.is_set():
            self.relay = asyncio.Event()
            await Relay(self.app.database, self.app.redis_url, self.app.schema, settings).run(self.relay)

    def _stop_processes(self) -> None:
        if self.relay is not None:
            self.relay.set()
        if self.worker is not None:
            self.worker.orders.stopping.set()
            self.worker.orders.wake()

    def stop(self) -> None:
        self.stopping.set()
        self._stop_processes()

    # --- what came of it

    async def keys_left(self) -> set[str]:
        """Keys of this world, without those that every drained queue keeps."""
        start = prefix(self.bench.broker.database_id)
        found = {key.decode() for key in await self.bench.redis.keys(f"{start}*")}
        found.discard(queue_names(self.bench.broker.database_id))
        return {name for name in (key.rpartition(":")[2] for key in found) if name not in KEPT_KEYS}

    async def is_done(self) -> bool:
        """Whether nothing is left in either store but the worker that lives."""
        await asyncio.sleep(0.02)
        rows = await self.bench.db.fetchval("SELECT count(*) FROM jobq.outbox")
        living = {self.worker.name.encode()} if self.worker is not None else set()
        return (
            rows == 0
            and await self.keys_left() <= {"beats", "workers"}
            and set(await self.bench.redis.hkeys(self.bench.broker.keys("default").beats)) == living
        )

    async def check(self) -> None:
        """Every order has come to what it was to come to, once."""
        effects = dict(map(tuple, await self.bench.db.fetch("SELECT note, count(*) FROM effect GROUP BY note")))
        assert effects == dict.fromkeys(_of(self.placed, without=("plain", "cancel", "reject_unmourned")), 1)
        dead = await self.bench.db.fetch("SELECT args->>'name', attempts, reason FROM jobq.dead")
        assert {tuple(row) for row in dead} == {(name, 1, "rejected") for name in self.placed if "reject" in name}
        assert {name for name, _ in self.runs} == _of(self.placed, without=("cancel",))
        assert {crashes for name, crashes in self.runs if "orphan" in name} <= {0, 1}
        assert {crashes for name, crashes in self.runs if "orphan" not in name} <= {0}

    async def forget(self) -> None:
        """Begin anew with nothing placed."""
        self.runs.clear()
        self.placed.clear()
        await self.bench.redis.delete(self.bench.broker.keys("default").stats)
        await self.bench.db.execute("TRUNCATE effect, placed, jobq.dead")


async def _mourn(session: Any, dead: Any) -> None:
    await session.execute(_EFFECT, {"id": dead.id, "note": json.loads(dead.args)["name"]})


def _of(names: Sequence[str], *, without: tuple[str, ...]) -> set[str]:
    return {name for name in names if name.partition(" ")[0] not in without}


@asynccontextmanager
async def open_world(database_url: str, redis_url: str, answer_s: float) -> AsyncIterator[World]:
    """Everything runs; at the end all of it stops, and must have closed what it opened."""
    async with AsyncExitStack() as stack:
        bench = await stack.enter_async_context(Bench.open(database_url, redis_url))
        await bench.db.execute("CREATE TABLE placed (name text PRIMARY KEY)")
        postgres, postgres_url = await stack.enter_async_context(postgres_proxy(database_url))
        valkey, valkey_url = await stack.enter_async_context(redis_proxy(redis_url))
        for proxy in (postgres, valkey):
            # Longer than anybody waits: a late request arrives when its sender has gone on without it.
            proxy.late_s = proxy.black_hole_s = 1.5 * answer_s
        world = World(bench, answer_s, JobQ(database=postgres_url, redis=valkey_url), postgres, valkey)
        world.define_tasks()
        for path in LUA.glob("*.lua"):
            # Else what is struck is not the script's reply, but that there is no such script.
            await bench.redis.script_load(script(path.stem).source)
        async with asyncio.TaskGroup() as group:
            group.create_task(world.run_workers())
            group.create_task(world.run_relays())
            await until(lambda: world.worker is not None and world.worker.is_open, "the worker is open")
            yield world
            world.stop()
        assert await world.keys_left() == set()
        await world.app.database.close()
        await until(lambda: postgres.clients == valkey.clients == 0, "every connection is closed")
