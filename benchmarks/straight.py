"""The relay's and the worker's traffic as straight code: the same SQL files and Lua scripts, and no features.

    python -m benchmarks.straight push
    python -m benchmarks.straight work BATCH

`push` pages through the outbox in id order (page.sql, 1,000 rows) and pushes each page's entries (push.lua, 500 a
call), the next page being read meanwhile, while fewer than 100,000 are ready. `work` goes, in two lanes beside
each other and each with a connection of its own: fetch BATCH entries (fetch.lua), read their rows (read.sql), delete
them (complete.sql), ack them (ack.lua). Nothing is looked at, decoded, run, timed or logged,
no garbage is looked for, and nothing survives an error. Run by floor. Calls jobq's statements and scripts.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from typing import Any
from uuid import UUID

import asyncpg
import redis.asyncio
import uvloop

from jobq.broker.keys import Keys
from jobq.broker.scripts import Script
from jobq.outbox.statement import Statement

from .stage import keys_on

LANES = 2
PAGE = 1_000
PUSH = 500
READY_LIMIT = 100_000
NOBODY = UUID(int=0)
WORKER = "straight"
_IDLE_S = 0.001


class Straight:
    """Both stores, without a word too many."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys):
        self.client = client
        self.keys = keys

    @classmethod
    async def open(cls) -> Straight:
        client = redis.asyncio.Redis.from_url(os.environ["JOBQ_REDIS_URL"])
        for script in _SCRIPTS.values():
            await client.script_load(script.source)
        return cls(client, await keys_on(os.environ["JOBQ_DATABASE_URL"]))

    async def push(self) -> None:
        connection, keys = await connect(), self.keys
        names = [keys.relay, keys.known, keys.bell, keys.stats, *keys.ready]
        page = asyncio.ensure_future(_page.on(connection, "jobq", after=NOBODY, overdue_s=0.0, limit=PAGE))
        ready = 0
        while rows := await page:
            entries = [f"{row[0].hex}:{row[1]}:{row[3]}" for row in rows]
            page = asyncio.ensure_future(_page.on(connection, "jobq", after=rows[-1][0], overdue_s=0.0, limit=PAGE))
            while ready > READY_LIMIT - PAGE:
                await asyncio.sleep(_IDLE_S)
                ready = await self.client.llen(keys.ready[1])
            for first in range(0, len(entries), PUSH):
                answer = await self._run("push", names, "*", WORKER, "pushed", *entries[first : first + PUSH])
                ready = answer[2]
        await asyncio.Event().wait()

    async def work(self, batch: int) -> None:
        async with asyncio.TaskGroup() as group:
            await self.client.hset(self.keys.beats, WORKER, 0)
            for _ in range(LANES):
                group.create_task(self._lane(batch))

    async def _lane(self, batch: int) -> None:
        connection, keys = await connect(plan_cache_mode="force_generic_plan"), self.keys
        working = keys.working(WORKER)
        names = [keys.known, keys.beats, keys.bell, keys.stats, working, *keys.ready]
        while True:
            entries = (await self._run("fetch", names, WORKER, batch))[1:]
            if not entries:
                await asyncio.sleep(_IDLE_S)
                continue
            ids = [UUID(entry[:32].decode()) for entry in entries]
            await _read.on(connection, "jobq", ids=ids)
            await _complete.on(connection, "jobq", ids=ids, generations=[1] * len(ids))
            await self._run("ack", [keys.known, keys.stats, working], "acked", *entries)

    async def _run(self, name: str, names: list[str], *args: Any) -> Any:
        return await self.client.evalsha(_SCRIPTS[name].sha, len(names), *names, *args)


async def connect(**settings: str) -> asyncpg.Connection:
    """A connection with the settings of jobq's own: every statement is meant for an index."""
    settings |= {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off", "jit": "off"}
    return await asyncpg.connect(os.environ["JOBQ_DATABASE_URL"], server_settings=settings)


async def main() -> None:
    straight = await Straight.open()
    if sys.argv[1] == "push":
        await straight.push()
    else:
        await straight.work(int(sys.argv[2]))


_SCRIPTS = {name: Script(name) for name in ("push", "fetch", "ack")}
_page, _read, _complete = Statement("page"), Statement("read"), Statement("complete")

if __name__ == "__main__":
    gc.disable()
    uvloop.run(main())
