"""What is left when the load is over: keys in Redis (I4); processes, connections, files and threads (I7)."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import anyio

from tests.chaos.checker import Findings
from tests.chaos.observer import NAME
from tests.chaos.stage import Stage

KEPT = {"relay", "stats"}
"""What Redis keeps of a queue whose jobs are done and whose workers have gone, beside the set of queue names."""
OF_WORKERS = {"beats", "workers", "bell"}
"""What it holds beside that while workers live."""
SETTLED_S = 10.0
MOST_FILES, MOST_THREADS = 100, 40
"""Of one process: 30 connections of its pool, its own lines, those to Redis; 4 threads for tasks, those of anyio."""

I4 = "I4 Redis holds nothing of finished jobs"
I7 = "I7 nothing is left behind"


async def look(stage: Stage, codes: list[tuple[str, int]]) -> Findings:
    """Look while the processes idle; then end them, and look again."""
    found = Findings()
    alive = {stage.name_of(worker) for worker in stage.workers}
    found.add(I4, *await _settled(lambda: _keys(stage, KEPT | OF_WORKERS, alive)))
    for process in stage.all:
        _, files, threads = process.size()
        if files > MOST_FILES or threads > MOST_THREADS:
            found.add(I7, f"{process.name} has {files} open files and {threads} threads")
    codes += await stage.stop()
    found.add(I7, *[f"{name} ended with {code}" for name, code in codes if code != 0])
    found.add(I4, *await _settled(lambda: _keys(stage, KEPT, set())))
    found.add(I7, *await _settled(lambda: _connections(stage)))
    return found


async def _settled(look_once: Callable[[], Awaitable[list[str]]]) -> list[str]:
    """What is still there after a while: acks and closing connections take a moment."""
    ends_at = time.monotonic() + SETTLED_S
    while True:
        left = await look_once()
        if not left or time.monotonic() > ends_at:
            return left
        await anyio.sleep(0.1)


async def _keys(stage: Stage, kept: set[str], alive: set[str]) -> list[str]:
    """Every key that is not to be there, and every worker that is not to be known."""
    redis = stage.observer.redis
    left = []
    async for key in redis.scan_iter(count=1000):
        name = key.decode()
        last = name.rsplit(":", 1)[-1]
        if last != "queues" and last not in kept:
            left.append(f"{name}, a {(await redis.type(key)).decode()}")
        elif last in ("beats", "workers"):
            strangers = {worker.decode() for worker in await redis.hkeys(key)} - alive
            left += [f"{name} tells of {stranger}" for stranger in sorted(strangers)]
    return left


async def _connections(stage: Stage) -> list[str]:
    rows = await stage.observer.rows(
        "SELECT application_name, state FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND application_name <> $1",
        NAME,
    )
    clients = await stage.observer.redis.client_list()
    found = [f"a connection to PostgreSQL: {row[0] or 'unnamed'}, {row[1]}" for row in rows]
    if len(clients) > 1:
        found.append(f"{len(clients) - 1} connections to Redis beside the observer's")
    return found
