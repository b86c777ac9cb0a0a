"""Crash points for an application's own tasks: break things where it hurts, recover, and let the test look.

Invariant: a crash happens at its point or the call raises; and what recovers is what would in production. Called by
tests of applications. Calls stage.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from enum import StrEnum
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from ..app import JobQ
from ..outbox import browse
from ..outbox.rehearsal import SeenRow
from ..task import Task
from .application import OWN_STATE, on_stores
from .stage import Stage

_MOST_RUNS = 1_000


class CrashPoint(StrEnum):
    """Where things break."""

    BEFORE_COMMIT = "before_commit"
    """The task has done all it does, and the worker dies before the COMMIT that completes the job."""
    BEFORE_STEP_IS_KEPT = "before_step_is_kept"
    """The call of a `ctx.step()` has been made, and the worker dies before its result is kept."""
    AFTER_COMMIT = "after_commit"
    """The job is completed in PostgreSQL, and the worker dies before it tells Redis."""
    EMPTY_REDIS = "empty_redis"
    """Redis loses everything, with all that is due pushed."""
    RELAY_BETWEEN_POLL_AND_PUSH = "relay_between_poll_and_push"
    """The relay has read what is new, and dies before it pushes any of it."""


CRASH_POINTS = tuple(CrashPoint)
"""All of them, to parametrize a test with."""
_OF_WORKERS = (CrashPoint.BEFORE_COMMIT, CrashPoint.BEFORE_STEP_IS_KEPT, CrashPoint.AFTER_COMMIT)


class Crashes:
    """A relay and workers for the jobs of one application, on real servers, killed on demand.

    1. `async with Crashes(jobs, redis=url) as crashes:`, and enqueue and commit;
    2. `await crashes.at(point)`, or crash by crash and then `await crashes.recover()`;
    3. assert what must hold. What the killed runs had open is closed when the block ends.

    The worker runs one job at a time; when it is killed, the next one finds its lease expired. Nothing waits.
    """

    def __init__(
        self,
        jobs: JobQ,
        *,
        redis: str,
        database: str | AsyncEngine | async_sessionmaker[Any] | None = None,
        state: Any = OWN_STATE,
    ):
        """`redis` is emptied on the way. `database` is another one than that of `jobs`.

        `state` is what tasks get as `ctx.state`; without it each worker enters the lifespan.
        """
        self._jobs = jobs
        self._redis = redis
        self._database = database
        self._state = state
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            given = on_stores(self._jobs, database=self._database, redis=self._redis, state=self._state)
            app = await stack.enter_async_context(given)
            self._stage = await stack.enter_async_context(Stage.open(app))
            self._dead_before = set(await self._dead())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def before_commit(self, task: Task[..., Any, Any] | None = None) -> UUID:
        """Run jobs until one, of `task` if given, has done its work; its worker dies before the COMMIT.

        Returns the id of that job. A task without `ctx.complete()` has returned by then.
        """
        return await self._run_until_death(CrashPoint.BEFORE_COMMIT, task)

    async def before_step_is_kept(self, task: Task[..., Any, Any] | None = None, *, step: str | None = None) -> UUID:
        """Run jobs until one, of `task` if given, has made the call of a step; its worker dies before that is kept.

        Returns the id of that job. `step` is the name of the step; without it the first that is not kept yet.
        """
        return await self._run_until_death(CrashPoint.BEFORE_STEP_IS_KEPT, task, step)

    async def after_commit(self, task: Task[..., Any, Any] | None = None) -> UUID:
        """Run jobs until one, of `task` if given, is completed; its worker dies before the ack. Returns its id."""
        return await self._run_until_death(CrashPoint.AFTER_COMMIT, task)

    async def empty_redis(self) -> None:
        """Have the relay push all that is due; then Redis loses everything."""
        await self._stage.push((await self._stage.due()).values())
        await self._stage.empty_redis()

    async def relay_between_poll_and_push(self) -> None:
        """Have the relay read what is due and new to it, and die before it pushes any of it."""
        if not await self._stage.unpushed((await self._stage.due()).values()):
            raise AssertionError("the relay has nothing to push: enqueue a job, and commit")
        await self._stage.kill_relay_before_push()

    async def recover(self) -> None:
        """Take back what the dead held, and run every job to its end; retries and delayed jobs at their moments.

        Raises AssertionError for a job that ended dead, unless its task rejected it.
        """
        await self._run_all(None)

    async def at(self, point: CrashPoint) -> None:
        """Run every job to its end, as `recover` does, with one crash at `point` for each, also for new ones."""
        await self._run_all(CrashPoint(point))

    async def _run_all(self, point: CrashPoint | None) -> None:
        struck: set[UUID] = set()

        def is_fresh(row: SeenRow) -> bool:
            return row.id not in struck

        for _ in range(_MOST_RUNS):
            due = await self._stage.due()
            if due and point in _OF_WORKERS:
                victim = await self._run_one(point, is_fresh)
                struck |= set() if victim is None else {victim}
            elif due:
                if point is not None and any(map(is_fresh, due.values())):
                    struck |= due.keys()
                    await self._break(point)
                await self._run_one(None, is_fresh)
            elif not await self._stage.pass_time():
                await self._complain_of_dead()
                return
        raise AssertionError(f"after {_MOST_RUNS:,} runs there are still jobs: does a task enqueue itself?")

    async def _break(self, point: CrashPoint) -> None:
        if point is CrashPoint.EMPTY_REDIS:
            await self.empty_redis()
        elif await self._stage.unpushed((await self._stage.due()).values()):
            await self._stage.kill_relay_before_push()

    async def _run_until_death(
        self, point: CrashPoint, task: Task[..., Any, Any] | None, step: str | None = None
    ) -> UUID:
        names = None if task is None else (task.name, *task.aliases)
        for _ in range(_MOST_RUNS):
            if not await self._stage.due():
                break
            victim = await self._run_one(point, lambda row: names is None or row.task in names, step)
            if victim is not None:
                return victim
        job = f"no job{'' if task is None else f' of {task.name}'}"
        if point is CrashPoint.BEFORE_STEP_IS_KEPT:
            took = "took a step" if step is None else f"took the step {step!r}"
            raise AssertionError(f"{job} that was due {took} whose result was not kept yet: enqueue one, and commit")
        raise AssertionError(f"{job} is due: enqueue one, and commit")

    async def _run_one(
        self, point: CrashPoint | None, is_victim: Callable[[SeenRow], bool], step: str | None = None
    ) -> UUID | None:
        """Run one job to its end; or to the point, where its worker dies, if it is to be a victim: then its id."""
        due = await self._stage.due()
        holding = await self._stage.start_one()
        if holding is None:
            return None
        row = due.get(holding.entry.id)
        if point is None or row is None or not is_victim(row):
            await self._stage.finish(holding)
            return None
        if point is CrashPoint.BEFORE_COMMIT:
            await self._stage.run_out(holding, until="commit")
        elif point is CrashPoint.BEFORE_STEP_IS_KEPT:
            if not await self._stage.run_out(holding, until="step", step=step):
                await self._stage.finish(holding)  # it took none
                return None
        else:
            await self._stage.run_out(holding)
            await self._stage.write_end()
        await self._stage.kill_worker()
        return holding.entry.id

    async def _complain_of_dead(self) -> None:
        for job in (await self._dead()).values():
            if job.id not in self._dead_before and job.reason != "rejected":
                raise AssertionError(
                    f"a job of {job.task} is dead ({job.reason}) after {job.attempts} attempts: {job.last_error}"
                )

    async def _dead(self) -> dict[UUID, browse.DeadRow]:
        app = self._stage.app
        async with app.database.sessions.begin() as session:
            return {row.id: row for row in await browse.dead(session, app.schema)}
