"""How things stand in both stores, gathered for `status` and `doctor`.

Invariant: PostgreSQL's part is there when Redis is away; what only Redis knows is None then.
Called by status, doctor. Calls outbox.browse, broker.inspect.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..broker import inspect
from ..broker.client import UNAVAILABLE
from ..broker.inspect import COUNTERS, QueueState
from ..broker.scripts import Broker
from ..outbox import browse
from ..outbox.browse import Counts, LeaderSession, TaskCount
from .stores import Stores

if TYPE_CHECKING:
    import asyncpg

    from ..broker.client import AsyncClient

_BEATS_WATCHED_S = 5.0
"""More than two of a worker's beats."""


@dataclass(slots=True)
class QueueReport:
    """One queue, or all of them together."""

    queue: str | None
    waiting: int = 0
    """Due, and neither running nor parked. Without Redis: due."""
    scheduled: int = 0
    retrying: int = 0
    running: int | None = None
    parked: int | None = None
    dead: int = 0
    oldest_waiting_s: float | None = None
    ready: int | None = None
    """Entries in Redis; what is beyond its cap waits in PostgreSQL."""
    parked_tasks: dict[str, int] = field(default_factory=dict)
    counters: dict[str, int] | None = None

    def add(self, other: QueueReport) -> None:
        """Count another queue in."""
        self.waiting += other.waiting
        self.scheduled += other.scheduled
        self.retrying += other.retrying
        self.dead += other.dead
        self.running = _sum(self.running, other.running)
        self.parked = _sum(self.parked, other.parked)
        self.ready = _sum(self.ready, other.ready)
        ages = [age for age in (self.oldest_waiting_s, other.oldest_waiting_s) if age is not None]
        self.oldest_waiting_s = max(ages, default=None)
        for task, number in other.parked_tasks.items():
            self.parked_tasks[task] = self.parked_tasks.get(task, 0) + number
        if self.counters is not None and other.counters is not None:
            self.counters = {name: self.counters[name] + other.counters[name] for name in COUNTERS}


@dataclass(slots=True)
class WorkerReport:
    """A worker that has registered. One that was killed stays listed until another sweeps it."""

    name: str
    host: str
    pid: int
    version: str
    slots: int
    running: int = 0
    queues: list[str] = field(default_factory=list)
    tasks: tuple[str, ...] = ()


@dataclass(slots=True)
class ParkedReport:
    """Jobs that wait in one queue for a worker that knows their task."""

    queue: str
    task: str
    jobs: int
    is_offered: bool = False
    """Whether a live worker of that queue knows it, and will call them back."""
    offered_by: tuple[str, ...] = ()
    """Workers that have registered with it; some may have been killed since."""


@dataclass(slots=True)
class Report:
    """Everything that `status` shows."""

    leader: LeaderSession | None
    counts: Counts
    queues: list[QueueReport]
    total: QueueReport
    parked: list[ParkedReport]
    workers: list[WorkerReport]
    redis_error: Exception | None


async def gather(
    stores: Stores,
    connection: asyncpg.Connection,
    client: AsyncClient,
    *,
    only: str | None = None,
    counts: Counts | None = None,
) -> Report:
    """Look at all queues, or at `only` one. `counts` stand for those that a role may not make itself."""
    schema = stores.schema
    broker = Broker(client, await stores.database.database_id(connection, schema))
    states: list[QueueState] = []
    parked: dict[tuple[str, str], int] = {}
    redis_error: Exception | None = None
    try:
        states = [await inspect.look(broker, queue) for queue in sorted(await broker.queues()) if only in (None, queue)]
    except UNAVAILABLE as error:
        redis_error = error
    held = {job_id for state in states for worker in state.workers for job_id in worker.running}
    counts = counts or await browse.count(connection, schema, held=held)
    counts = Counts(
        [count for count in counts.jobs if only in (None, count.queue)],
        {queue: number for queue, number in counts.dead.items() if only in (None, queue)},
        counts.is_estimate,
    )
    try:
        if redis_error is None:
            states += [await inspect.look(broker, queue) for queue in sorted(_unseen(counts, states, only))]
            parked = await inspect.parked(broker, [(count.queue, count.task) for count in counts.jobs])
    except UNAVAILABLE as error:
        redis_error = error
    if redis_error is not None:
        states, parked = [], {}
    queues = _merge(counts, states, parked)
    total = _empty(None, knows_redis=redis_error is None)
    for queue in queues:
        total.add(queue)
    leader = await browse.leader(connection, schema)
    return Report(leader, counts, queues, total, _parked(states, parked), _workers(states), redis_error)


async def find_offers(stores: Stores, connection: asyncpg.Connection, client: AsyncClient, report: Report) -> None:
    """Learn which parked tasks live workers offer. Takes up to two beats, and no time where nobody offers any."""
    offered = [parked for parked in report.parked if parked.offered_by]
    places = {(parked.queue, name) for parked in offered for name in parked.offered_by}

    def note(living: set[tuple[str, str]]) -> bool:
        for parked in offered:
            parked.is_offered = any((parked.queue, name) in living for name in parked.offered_by)
        return all(parked.is_offered for parked in offered)

    broker = Broker(client, await stores.database.database_id(connection, stores.schema))
    try:
        note(await inspect.living(broker, places, within_s=_BEATS_WATCHED_S, enough=note))
    except UNAVAILABLE as error:
        report.redis_error = error


def _unseen(counts: Counts, states: list[QueueState], only: str | None) -> set[str]:
    """Queues that have rows, and that nobody has announced in Redis."""
    named = {count.queue for count in counts.jobs} | counts.dead.keys() | ({only} if only is not None else set())
    return named - {state.queue for state in states}


def _merge(counts: Counts, states: list[QueueState], parked: dict[tuple[str, str], int]) -> list[QueueReport]:
    in_redis = {state.queue: state for state in states}
    names = in_redis.keys() | {count.queue for count in counts.jobs} | counts.dead.keys()
    queues = {name: _empty(name, knows_redis=name in in_redis) for name in sorted(names)}
    for name, state in in_redis.items():
        queues[name].running = sum(len(worker.running) for worker in state.workers)
        queues[name].ready = state.ready
        queues[name].counters = dict(state.counters)
    for count in counts.jobs:
        queues[count.queue].add(_counted(count, parked.get((count.queue, count.task), 0)))
    for name, number in counts.dead.items():
        queues[name].dead = number
    return list(queues.values())


def _counted(count: TaskCount, parked: int) -> QueueReport:
    return QueueReport(
        queue=count.queue,
        waiting=max(count.waiting - parked, 0),
        scheduled=count.scheduled,
        retrying=count.retrying,
        parked=parked,
        parked_tasks={count.task: parked} if parked else {},
        oldest_waiting_s=count.oldest_waiting_s,
    )


def _empty(name: str | None, *, knows_redis: bool) -> QueueReport:
    if not knows_redis:
        return QueueReport(name)
    return QueueReport(name, running=0, parked=0, ready=0, counters=dict.fromkeys(COUNTERS, 0))


def _parked(states: list[QueueState], parked: dict[tuple[str, str], int]) -> list[ParkedReport]:
    workers = {state.queue: state.workers for state in states}
    return [
        ParkedReport(
            queue,
            task,
            number,
            offered_by=tuple(worker.name for worker in workers.get(queue, ()) if task in worker.tasks),
        )
        for (queue, task), number in sorted(parked.items())
    ]


def _workers(states: list[QueueState]) -> list[WorkerReport]:
    workers: dict[str, WorkerReport] = {}
    for state in states:
        for found in state.workers:
            worker = workers.setdefault(
                found.name,
                WorkerReport(found.name, found.host, found.pid, found.version, found.slots, tasks=found.tasks),
            )
            worker.running += len(found.running)
            worker.queues.append(state.queue)
    return list(workers.values())


def _sum(one: int | None, other: int | None) -> int | None:
    return one if other is None or one is None else one + other
