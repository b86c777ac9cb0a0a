"""A relay and a worker of one application, which take a step only when they are told to, and can be killed.

Both are the real ones, on the real servers. What is killed gets no further: nothing of it runs on, no beat, its
transactions end, and what it held stays in its working list. A killed worker's lease counts as expired as soon as
the next worker opens. Nothing in the code under test knows of this. Called by crashes. Calls relay and worker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal, Self, TypeAlias
from uuid import UUID

import asyncpg
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.util import await_only

from ..app import JobQ
from ..broker.client import connect
from ..broker.scripts import Broker, Pushed
from ..outbox import rehearsal, settle, steps
from ..outbox.rehearsal import SeenRow
from ..relay.relay import Leader
from ..settings import RelaySettings, WorkerSettings
from ..worker.owned import Holding
from ..worker.worker import Worker
from .application import rebuilt

_DEADLINE_S = 30.0
_POLL_S = 0.002
_NEVER_S = 36_000.0
_RELAY = RelaySettings(beat=0.01, detect_loss_every=0.005, scrub_every=_NEVER_S, tidy_every=_NEVER_S)


Stop: TypeAlias = Literal["commit", "step"]


class Killed(BaseException):
    """Ends what a killed process would have gone on with. Nothing catches it but a bare `except`."""


class Stage:
    """One relay and one worker of one slot; `worker` and `leader` are replaced when they were killed."""

    def __init__(self, app: JobQ, stack: AsyncExitStack, connection: asyncpg.Connection, database_id: UUID):
        self.app = app
        self._stack = stack
        self._connection = connection
        self.broker = Broker(connect(app.redis_url), database_id)
        self._leader: Leader | None = None
        self._leaders_broker = _MortalBroker(self.broker.client, database_id)
        self._worker: Worker | None = None
        self._dead: list[Worker] = []
        self._sessions = app.database.sessions
        self._gate = _Gate()
        self._shut_gates: list[_Gate] = []
        self._frozen: list[asyncio.Task[Any]] = []

    @classmethod
    @asynccontextmanager
    async def open(cls, app: JobQ) -> AsyncIterator[Self]:
        """Open both stores, and a relay that has seen nothing yet."""
        app.check()
        async with AsyncExitStack() as stack:
            connection = await app.database.connect(schema=app.schema, name="jobq:testing")
            stack.push_async_callback(connection.close)
            stage = cls(app, stack, connection, await app.database.database_id(connection, app.schema))
            stack.push_async_callback(stage.broker.client.aclose)
            await stage._lead()
            try:
                yield stage
            finally:
                await stage._let_go()

    # What there is to do

    async def due(self) -> dict[UUID, SeenRow]:
        """The jobs that a worker would run now."""
        rows = await rehearsal.see(self._connection, self.app.schema, self.app.tasks)
        return {row.id: row for row in rows if row.due}

    async def pass_time(self) -> bool:
        """Go to the moment at which the next job is due. False: there is none."""
        found = await rehearsal.next_job(self._connection, self.app.schema, self.app.tasks)
        if found is not None and found[1] > 0:
            await rehearsal.pass_time(self._connection, self.app.schema, found[1])
        return found is not None

    # The relay

    async def push(self, rows: Collection[SeenRow]) -> None:
        """Let the relay work until Redis knows these jobs."""
        leader = self._leader or await self._lead()

        async def is_known() -> bool:
            await leader.step()
            return not await self.unpushed(rows)

        await _until(is_known, "the relay pushed what is due")

    async def unpushed(self, rows: Collection[SeenRow]) -> list[SeenRow]:
        """Those that Redis does not know."""
        missing = []
        for queue in {row.queue for row in rows}:
            asked = [row for row in rows if row.queue == queue]
            known = await self.broker.known(queue, [row.id for row in asked])
            missing += [row for row, generation in zip(asked, known, strict=True) if generation < row.generation]
        return missing

    async def kill_relay_before_push(self) -> None:
        """Let the relay read on, and die where it would push."""
        leader = self._leader or await self._lead()

        async def has_died() -> bool:
            try:
                await leader.step()
            except Killed:
                return True
            return False

        self._leaders_broker.is_doomed = True
        try:
            await _until(has_died, "the relay had something to push")
        finally:
            self._leaders_broker.is_doomed = False
            leader._connection.terminate()
            self._leader = None

    async def _lead(self) -> Leader:
        connection = await self.app.database.connect(schema=self.app.schema, name="jobq:relay")
        self._stack.callback(connection.terminate)
        self._leader = await Leader.start(connection, self._leaders_broker, self.app.schema, _RELAY)
        return self._leader

    # The worker

    async def start_one(self) -> Holding | None:
        """Push what is due, and let the worker start one job. None: nothing is due any more."""
        deadline = time.monotonic() + _DEADLINE_S
        while due := await self.due():
            await self.push(due.values())
            worker = await self._living({row.queue for row in due.values()})
            worker.heartbeat.loop_ticked()
            worker.orders.wake()  # do not wait where there is nothing
            await worker.turns.step()
            for holding in worker.owned.all():
                if holding.task is not None:
                    return holding
            await self._settle(worker)
            _check(deadline, "a worker started one of the jobs that are due")
        return None

    async def finish(self, holding: Holding) -> None:
        """Let the run end, and settle it in both stores."""
        assert self._worker is not None
        await self.run_out(holding)
        await self._settle(self._worker)

    async def run_out(self, holding: Holding, *, until: Stop | None = None, step: str | None = None) -> bool:
        """Let the run end; or come to a place, and no further. Returns whether it came there."""
        assert holding.task is not None
        gate = self._gate
        gate.shut, gate.step = until, step
        arrived = asyncio.ensure_future(gate.arrived.wait())
        try:
            await asyncio.wait({holding.task, arrived}, timeout=_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            arrived.cancel()
        if not (holding.task.done() or gate.arrived.is_set()):
            raise AssertionError(f"After {_DEADLINE_S:.0f} s: the task still runs")
        return gate.arrived.is_set()

    async def write_end(self) -> None:
        """Write how the run ended to PostgreSQL, and tell Redis nothing."""
        assert self._worker is not None
        settler = self._worker.settler

        async def is_written() -> bool:
            return not await settler._flush_rows()

        await _until(is_written, "the end of the run was written")

    async def kill_worker(self) -> None:
        """No beat, no step, no transaction of it lives on; what is in its working list stays there."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.heartbeat.stop()
        self._shut_gates.append(self._gate)
        self._frozen += worker.turns.runs
        await settle.end_backends(self._connection, self.app.schema, worker.name)
        self._dead.append(worker)

    async def empty_redis(self) -> None:
        """Redis loses everything; the worker that lives, if any, makes itself known again by its next beat."""
        await self.broker.client.flushdb()
        if self._worker is not None:
            await asyncio.to_thread(self._worker.heartbeat.step)

    async def _living(self, queues: Collection[str]) -> Worker:
        """A worker of at least these queues; a new one first takes back what the dead held."""
        if self._worker is not None and not set(queues) <= set(self._worker.settings.queues):
            await self.kill_worker()  # it holds nothing
        if self._worker is None:
            names = {*queues, *(task.queue for task in self.app.tasks.values())}
            settings = WorkerSettings(queues=tuple(sorted(names)), concurrency=1, beat=_NEVER_S / 10, lease=_NEVER_S)
            self._gate = _Gate()
            self.app.database.sessions = self._gate.watch(self._sessions, self.app.schema)
            self._worker = worker = Worker(self.app, settings)
            await worker.open(self._stack)
            await _until(lambda: worker.heartbeat.may_start, "the worker's first beat was answered")
            await self._sweep(worker)
        return self._worker

    async def _sweep(self, worker: Worker) -> None:
        dead, self._dead = self._dead, []
        for one in dead:
            for queue in one.settings.queues:
                counters = await self.broker.beats(queue)
                if one.name in counters:
                    await worker.sweeper.sweep(queue, one.name, counters[one.name])

    async def _settle(self, worker: Worker) -> None:
        async def is_settled() -> bool:
            await worker.settler.step()
            return not worker.settler.pending

        await _until(is_settled, "everything was settled")

    async def _let_go(self) -> None:
        """End what was kept from running on. Its transactions are gone, so nothing comes of it in the stores."""
        if self._worker is not None:
            await self.kill_worker()
        for gate in self._shut_gates:
            gate.killed.set()
        for run in self._frozen:
            run.cancel()
        await asyncio.gather(*self._frozen, return_exceptions=True)


class _Gate:
    """Where the runs of one worker stop for good, once it is shut: nothing else of that worker gets through then.

    Before the COMMIT of `ctx.complete()`, of no other transaction, whoever's it is; or before a step is kept.
    """

    def __init__(self) -> None:
        self.shut: Stop | None = None
        self.step: str | None = None
        """The step that is meant; None: any."""
        self.arrived = asyncio.Event()
        self.killed = asyncio.Event()

    def watch(self, maker: async_sessionmaker[Any], schema: str) -> async_sessionmaker[Any]:
        """Sessions that stop here, and are otherwise the application's."""
        kind = maker.kw.get("sync_session_class") or maker.class_.sync_session_class
        watched = type(kind.__name__, (kind,), {})
        event.listen(watched, "before_commit", self._before_commit)
        changes: dict[str, Any] = {"sync_session_class": watched}
        if isinstance(engine := maker.kw.get("bind"), AsyncEngine):
            changes["bind"] = own = engine.execution_options()  # the application's own hears of nothing
            self._keeps_step = steps.opening_of_record(schema)
            event.listen(own.sync_engine, "before_cursor_execute", self._before_statement)
        return rebuilt(maker, **changes)

    def _before_commit(self, session: Any) -> None:
        if not session.in_nested_transaction():
            self._pass("commit")

    def _before_statement(self, connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith(self._keeps_step):
            self._pass("step", parameters[1])

    def _pass(self, what: Stop, step: str | None = None) -> None:
        is_meant = self.shut == what and self.step in (None, step)
        if is_meant or self.arrived.is_set():
            self.arrived.set()
            await_only(self.killed.wait())
            raise Killed


class _MortalBroker(Broker):
    """The relay's way into Redis."""

    is_doomed = False

    async def push(self, queue: str, entries: Sequence[str | bytes], **options: Any) -> Pushed | None:
        if self.is_doomed and entries:
            raise Killed
        return await super().push(queue, entries, **options)


async def _until(condition: Callable[[], bool | Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while True:
        reached = condition()
        if reached if isinstance(reached, bool) else await reached:
            return
        _check(deadline, what)
        await asyncio.sleep(_POLL_S)


def _check(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise AssertionError(f"After {_DEADLINE_S:.0f} s: not yet so that {what}")
