"""Every window of the crash table: a process that dies exactly there loses nothing, and does nothing twice.

The table is in windows.py. Each row is gone through twice: by a relay, worker or application in this process that
takes no further step, and by a real one that gets SIGKILL.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from tests.builders import Bench, entry_of
from tests.faults import crash_app
from tests.faults.victims import Forge, Processes, Steps, Victim, loaded_scripts
from tests.faults.windows import DEAD, WINDOWS, Generations, Seen, Window
from tests.waiting import until

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    await loaded_scripts(redis_url)
    async with Bench.open(shared_database_url, redis_url) as bench:
        bench.app.tasks, bench.app.dead_hooks = crash_app.newer.tasks, crash_app.newer.dead_hooks
        await bench.db.execute(crash_app.TABLES)
        yield bench


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    with Forge.open() as forge:
        yield forge


class Scene:
    """One window: what leads into it, what is there then, and what becomes of it."""

    def __init__(self, bench: Bench, window: Window):
        self.bench = bench
        self.window = window
        self.ids: list[UUID] = []

    async def arrange(self) -> None:
        """What is there before the victim starts."""
        window, bench = self.window, self.bench
        if window.victim == "application" or (window.victim == "relay" and window.committed != "before"):
            return
        await self.commit()
        if window.victim != "relay" and window.arrives == "ready":
            await bench.relay()
        if window.victim == "sweeper":
            await self._have_one_dead()

    async def commit(self, victim: Victim | None = None) -> None:
        async with self.bench.app.database.sessions.begin() as session:
            for name in self.window.jobs:
                task = self.bench.app.tasks[name].opts(delay=self.window.delay_s)
                self.ids.append((await task.enqueue(session)).id)
            if victim is not None:
                victim.loses(self.ids[0])
        for name, crashes in self.window.crashes.items():
            await self.bench.db.execute("UPDATE jobq.outbox SET crashes = $1 WHERE task = $2", crashes, name)

    async def provoke(self, victim: Victim) -> None:
        window = self.window
        if window.victim == "relay" and window.committed == "after":
            await victim.serves()
            await self.commit(victim)
        if window.loses_redis:
            await until(self.bench.ready, "the job was pushed")
            await self.bench.redis.flushdb()
        if window.arrives != "ready":
            await victim.serves()
            await self._arrive()
        if "wait" in window.jobs:
            await until(lambda: self.bench.db.fetchval("SELECT count(*) FROM run"), "the job has started")
            victim.loses(self.ids[0])
        if window.victim == "stopping worker":
            victim.stop()

    async def _arrive(self) -> None:
        """As if the worker's fetch had taken it and its answer had been lost; or as if others had parked it."""
        keys = self.bench.broker.keys("default")
        (worker,) = await self.bench.broker.beats("default")
        at = keys.working(worker) if self.window.arrives == "unanswered" else keys.parked(self.window.jobs[0])
        await self._put(at)

    async def _have_one_dead(self) -> None:
        """A worker that has died, with the job in its working list and in a transaction of its own."""
        keys = self.bench.broker.keys("default")
        await self.bench.redis.delete(*keys.ready)
        await self._put(keys.working(DEAD))
        await self.bench.redis.hset(keys.beats, DEAD, 1)
        await self.bench.broker.announce(["default"])
        connection = await self.bench.app.database.connect(schema="jobq", name=f"jobq:{DEAD}")
        await connection.execute("BEGIN")
        await connection.execute("DELETE FROM jobq.outbox")
        self.bench.closes(lambda: asyncio.sleep(0, connection.terminate()))

    async def _put(self, at: str) -> None:
        row = await self.bench.row(self.ids[0])
        entry = entry_of(row)
        async with self.bench.redis.pipeline(transaction=True) as both:
            both.rpush(at, entry)
            both.hset(self.bench.broker.keys("default").known, self.ids[0].hex, 1)
            await both.execute()

    async def seen(self) -> Seen:
        """What both stores hold now."""
        bench, keys = self.bench, self.bench.broker.keys("default")

        async def rows_in(table: str) -> int:
            return int(await bench.db.fetchval(f"SELECT count(*) FROM {table}"))

        async def entries_in(pattern: str) -> int:
            return sum([await bench.redis.llen(key) for key in await bench.redis.keys(pattern)])

        rows = await bench.db.fetch("SELECT generation, crashes, attempts FROM jobq.outbox ORDER BY id")
        return Seen(
            rows=tuple(_generations(row) for row in rows),
            effects=await rows_in("effect"),
            calls=await rows_in("call"),
            dead=await rows_in("jobq.dead"),
            alerts=await rows_in("alert"),
            ready=len(await bench.ready()),
            working=await entries_in("*working:*"),
            parked=await entries_in("*parked:*"),
            known=await bench.redis.hlen(keys.known),
        )

    async def recover(self) -> None:
        """A new relay and a new worker, which finds every lease but its own over, do what is left."""
        if self.window.victim == "application":
            await crash_app.place_order(self.bench.app)
        leader, living = await self.bench.leader(), await self.bench.worker()

        async def is_over() -> bool:
            await leader.step()
            for name, counter in (await self.bench.broker.beats("default")).items():
                if name != living.name:
                    await living.sweeper.sweep("default", name, counter)
            await living.turns.unpark("default")
            living.orders.wake()
            await living.turns.step()
            await until(lambda: not living.turns.runs, "the runs ended")
            await living.settler.step()
            rows = await self.bench.db.fetchval("SELECT count(*) FROM jobq.outbox")
            return rows == 0 and not living.settler.pending and not await self.bench.ready()

        await until(is_over, "everything is done")
        assert set(await self.bench.broker.beats("default")) == {living.name}
        await self.bench.assert_drained()

    async def runs(self) -> dict[str, set[tuple[Generations, ...]]]:
        """The runs that have started, from first to last, of every job, by task."""
        by_job: dict[UUID, list[Generations]] = defaultdict(list)
        tasks: dict[UUID, str] = {}
        for row in await self.bench.db.fetch("SELECT * FROM run ORDER BY id"):
            by_job[row["job_id"]].append(_generations(row))
            tasks[row["job_id"]] = row["task"]
        found: dict[str, set[tuple[Generations, ...]]] = defaultdict(set)
        for job_id, runs in by_job.items():
            found[tasks[job_id]].add(tuple(runs))
        return found


def _generations(row: dict[str, int]) -> Generations:
    return row["generation"], row["crashes"], row["attempts"]


@pytest.mark.parametrize("way", ["by steps", "by SIGKILL"])
@pytest.mark.parametrize("window", WINDOWS, ids=[window.name for window in WINDOWS])
async def test_a_process_that_dies_in_this_window_loses_nothing_and_does_nothing_twice(
    bench: Bench, forge: Forge, tmp_path: Path, window: Window, way: str
) -> None:
    scene = Scene(bench, window)
    await scene.arrange()
    victim = Steps(bench) if way == "by steps" else Processes(bench, forge, tmp_path)
    try:
        await victim.kill(scene)
        if window.committed == "too late":
            await scene.commit()
        await _until_seen(scene)
        await scene.recover()
    finally:
        await victim.close()

    effects = await bench.db.fetch("SELECT count(*) FROM effect GROUP BY job_id")
    assert [row["count"] for row in effects] == [1] * len(window.jobs) * window.effects
    assert await scene.runs() == {task: {runs} for task, runs in window.runs.items()}
    assert await bench.db.fetchval("SELECT count(*) FROM call") == window.calls
    assert await bench.db.fetchval("SELECT count(*) FROM jobq.dead") == window.dead
    assert await bench.db.fetchval("SELECT count(*) FROM alert") == window.dead


_LOCKS = """
    SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database
    WHERE locktype = 'advisory' AND datname = current_database()
"""


async def _until_seen(scene: Scene) -> None:
    """PostgreSQL ends the sessions of a dead process, and their locks, in its own time; nothing else may change."""
    expected = scene.window.then

    async def is_seen() -> bool:
        return await scene.seen() == expected

    try:
        await until(is_seen, "the stores hold what they are to hold then", 10)
    except AssertionError:
        assert await scene.seen() == expected

    async def are_free() -> bool:
        return await scene.bench.db.fetchval(_LOCKS) == 0

    await until(are_free, "no lock is left")
