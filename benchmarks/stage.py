"""Where benchmarks run: two durable servers, jobq's commands as processes beside them, and what each of them costs.

Invariant: every run begins with empty tables, an empty Redis and the checkpoint of both behind it; no process outlives
its run. Called by the benchmarks. Calls cpu and jobq.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import redis.asyncio
from sqlalchemy.ext.asyncio import create_async_engine

from jobq import JobQ, embedded
from jobq.broker.keys import Keys
from jobq.migrate import upgrade

from . import app, cpu

ROOT = Path(__file__).parents[1]
APP = "benchmarks.app:jobs"
POSTGRESQL, REDIS, RELAY, WORKER, PRODUCERS = ROLES = ("PostgreSQL", "Redis", "relay", "worker", "producers")

_POLL_S = 0.005
_ENOUGH_TO_BE_FIRST = 2_000
_FILL = """
    INSERT INTO jobq.outbox (id, queue, task, args)
    SELECT uuidv7(), 'default', $1, CAST('{"number":' || number || ',"word":"word"}' AS json)
    FROM generate_series(1, CAST($2 AS int)) AS number
"""
_ROWS_A_FILL = 50_000


@dataclass
class Stage:
    """The servers, the processes beside them, and how much to do on them."""

    servers: embedded.Servers
    jobs: int
    processes: dict[str, list[subprocess.Popen[bytes]]] = field(default_factory=lambda: defaultdict(list))
    """By role, those that live."""

    async def clear(self) -> None:
        """Empty both stores, and have them write now what they would otherwise write in the middle of a run."""
        async with self.application() as application:
            await upgrade(application.database.engine)
        async with self.database() as connection:
            await connection.execute("TRUNCATE jobq.outbox, jobq.dead, jobq.idempotency_key, jobq.step")
            await connection.execute("CHECKPOINT")
        async with self.redis() as client:
            await client.flushall()
            await client.config_resetstat()
            await client.bgrewriteaof()
            await self.until(lambda: _is_saved(client))

    @asynccontextmanager
    async def application(self, *, connections: int = 10) -> AsyncIterator[JobQ]:
        """The benchmarks' application on these servers, with that many connections of its own."""
        application = application_on(self.servers.database_url, self.servers.redis_url, connections)
        try:
            yield application
        finally:
            await application.database.engine.dispose()

    @asynccontextmanager
    async def database(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(self.servers.database_url)
        try:
            yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def redis(self) -> AsyncIterator[redis.asyncio.Redis]:
        async with redis.asyncio.Redis.from_url(self.servers.redis_url) as client:
            yield client

    @contextmanager
    def process(self, *words: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """A `jobq` command as a process of its own, in the role of its first word; ended by SIGTERM."""
        command = [sys.executable, "-m", "jobq", *words, "--log-level", "error"]
        with self.command(words[0], command, **environment) as process:
            yield process

    @contextmanager
    def module(self, role: str, name: str, *words: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """A module of the benchmarks as a process of its own."""
        with self.command(role, [sys.executable, "-m", f"benchmarks.{name}", *words], **environment) as process:
            yield process

    @contextmanager
    def command(self, role: str, command: Sequence[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        stores = {"JOBQ_DATABASE_URL": self.servers.database_url, "JOBQ_REDIS_URL": self.servers.redis_url}
        with subprocess.Popen(command, env=os.environ | stores | environment, cwd=ROOT) as process:
            self.processes[role].append(process)
            try:
                yield process
            finally:
                self.processes[role].remove(process)
                process.send_signal(signal.SIGTERM)

    def cpu(self) -> cpu.Reading:
        """CPU seconds so far: of both servers, and of each role's processes that live."""
        pids = {role: [process.pid for process in processes] for role, processes in self.processes.items()}
        return cpu.read(
            dict.fromkeys(ROLES, ())
            | pids
            | {POSTGRESQL: [self.servers.postgres_pid], REDIS: [self.servers.valkey_pid]}
        )

    async def fill(self, count: int, task: str = "nothing") -> None:
        """Have jobs wait in the outbox, put there by SQL."""
        async with self.database() as connection:
            for first in range(0, count, _ROWS_A_FILL):
                await connection.execute(_FILL, task, min(_ROWS_A_FILL, count - first))

    async def keys(self, queue: str = "default") -> Keys:
        """The names of a queue's keys in Redis."""
        return await keys_on(self.servers.database_url, queue)

    async def drain_rate(self) -> float:
        """Jobs a second, from the first completions on until the outbox is empty."""
        async with self.database() as connection:
            waiting = await connection.fetchval("SELECT count(*) FROM jobq.outbox")
            rows = await connection.fetch("SELECT id FROM jobq.outbox ORDER BY id LIMIT $1", _ENOUGH_TO_BE_FIRST)
            first, left = [row[0] for row in rows], len(rows)
            while left == len(first):
                none_done_at = time.perf_counter()
                await self.breathe()
                left = await connection.fetchval("SELECT count(*) FROM jobq.outbox WHERE id = ANY ($1)", first)
            await self.until_empty(connection)
            return waiting / (time.perf_counter() - none_done_at)

    async def until_empty(self, connection: asyncpg.Connection) -> None:
        """Wait until no row is left. Looks for the youngest, which are the last to go and lie in no graveyard."""
        while await connection.fetchval("SELECT id FROM jobq.outbox ORDER BY id DESC LIMIT 1") is not None:
            await self.breathe()

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        while not await condition():
            await self.breathe()

    async def breathe(self) -> None:
        """Let a moment pass. Raises when a process has died that was to do the work meanwhile."""
        await asyncio.sleep(_POLL_S)
        for role, processes in self.processes.items():
            for process in processes:
                if process.poll() not in (None, -signal.SIGKILL):
                    raise RuntimeError(f"a process of the benchmark has ended ({role}, code {process.returncode})")


def application_on(database_url: str, redis_url: str, connections: int) -> JobQ:
    """The benchmarks' application on these servers, with a pool of that many connections."""
    url = database_url.replace("postgresql://", "postgresql+asyncpg://", 1)
    application = JobQ(database=create_async_engine(url, pool_size=connections), redis=redis_url)
    application.tasks = app.jobs.tasks
    return application


async def keys_on(database_url: str, queue: str = "default") -> Keys:
    """The names of a queue's keys in Redis, for the jobs of this database."""
    connection = await asyncpg.connect(database_url)
    found = await connection.fetchval("SELECT database_id FROM jobq.meta")
    await connection.close()
    return Keys(UUID(bytes=found.bytes), queue)


async def counted(client: redis.asyncio.Redis, keys: Keys, counter: str) -> int:
    """One of the counters that jobq's scripts keep for `jobq status`."""
    found: Any = await client.hget(keys.stats, counter)
    return int(found or 0)


async def _is_saved(client: redis.asyncio.Redis) -> bool:
    info = await client.info("persistence")
    return not (info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"])
