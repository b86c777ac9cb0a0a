"""What `doctor` finds in the queues: who brings jobs, who runs them, and what nobody runs.

Called by examine. Calls report, broker.inspect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

from ...broker import inspect
from ...broker.scripts import Broker
from ...outbox.browse import Counts
from ...relay.push import ALWAYS_WATCHED
from ..failures import sqlstate
from ..report import Report, WorkerReport, gather
from ..stores import Stores
from ..tables import cell, duration
from . import Finding, Level, is_refused, refused
from .postgresql import grants

if TYPE_CHECKING:
    import asyncpg

    from ...app import JobQ
    from ...broker.client import AsyncClient

_LATE_AFTER_S = 60.0
_WATCHED_S = 5.0
_LOOK_S = 0.25
_KNOW_IT = "start a worker that does, or give a renamed task this name as an alias"


@dataclass(slots=True)
class Living:
    """What moved while it was watched."""

    places: set[tuple[str, str]]
    """(queue, worker) whose counter moved."""
    relay: bool = False
    """Whether the token of the relay moved."""

    def workers(self, report: Report) -> list[WorkerReport]:
        names = {name for _, name in self.places}
        return [worker for worker in report.workers if worker.name in names]


async def work(stores: Stores, connection: asyncpg.Connection, client: AsyncClient) -> list[Finding]:
    """Look at all queues, and watch for some seconds who moves."""
    try:
        report = await gather(stores, connection, client)
        refusal = None
    except Exception as error:
        if not is_refused(error) or not sqlstate(error):
            raise
        refusal = refused("oldest", error, grants(stores.schema))
        report = await gather(stores, connection, client, counts=Counts([], {}, False))
    if report.redis_error is not None:
        raise report.redis_error
    broker = Broker(client, await stores.database.database_id(connection, stores.schema))
    living = await _watch(broker, report)
    if refusal is not None:
        return [_relay(report, living), *_workers(report, living), refusal]
    return list(_all(report, living, stores.app))


def _all(report: Report, living: Living, app: JobQ | None) -> Iterator[Finding]:
    yield _relay(report, living)
    yield from _workers(report, living)
    yield from _queues(report, living, app)
    yield from _tasks(report, living)
    yield _oldest(report)
    for parked in report.parked:
        found = f"{parked.jobs} jobs of task {cell(parked.task)} are parked in {cell(parked.queue)}"
        if any((parked.queue, name) in living.places for name in parked.offered_by):
            yield Finding("ok", "parked", f"{found}; a live worker offers it, and will call them back")
        else:
            yield Finding("warn", "parked", f"{found}: no live worker offers it", _KNOW_IT)
    if report.total.dead:
        yield Finding("warn", "dead", f"{report.total.dead} jobs need a person", "jobq dead list")


async def _watch(broker: Broker, report: Report) -> Living:
    """Watch the counters of registered workers, and the relay's token, until all have moved or it takes too long."""
    queues = sorted({queue for worker in report.workers for queue in worker.queues})
    first, first_token = await inspect.counters(broker, queues), await broker.token(ALWAYS_WATCHED)
    living = Living(set())
    with anyio.move_on_after(_WATCHED_S):
        while len(living.places) < len(first) or (report.leader is not None and not living.relay):
            await anyio.sleep(_LOOK_S)
            now = await inspect.counters(broker, queues)
            living.places |= {place for place, counter in first.items() if now.get(place, counter) != counter}
            living.relay = living.relay or await broker.token(ALWAYS_WATCHED) != first_token
    return living


def _relay(report: Report, living: Living) -> Finding:
    leader = report.leader
    if leader is None:
        is_missed = report.total.waiting > 0
        return Finding("fail" if is_missed else "warn", "relay", "none leads, so nothing reaches Redis", "jobq relay")
    who = f"session {leader.pid} leads, connected for {duration(leader.connected_s)}"
    if living.relay:
        return Finding("ok", "relay", who)
    found = f"{who}, and has pushed nothing for {_WATCHED_S:.0f} s: it hangs, or Redis takes no writes"
    return Finding("warn", "relay", found, "see its log, and `memory` and `replica`; a second relay would take over")


def _workers(report: Report, living: Living) -> Iterator[Finding]:
    alive = living.workers(report)
    for worker in report.workers:
        if worker not in alive:
            where = f"{cell(worker.name)} ({cell(worker.host)}, pid {worker.pid})"
            found = f"{where} does not beat and holds {worker.running} jobs"
            yield Finding("warn", "worker", found, "another worker takes them back after its lease: let one run")
    if alive:
        slots = sum(worker.slots for worker in alive)
        yield Finding("ok", "workers", f"{len(alive)} live, with {slots} slots and {report.total.running} jobs")
    else:
        yield Finding("warn", "workers", "none live", "jobq worker APP")


def _queues(report: Report, living: Living, app: JobQ | None) -> Iterator[Finding]:
    """Queues that nobody serves: with jobs, with entries of jobs that are gone, or named by the application."""
    served = {queue for queue, _ in living.places}
    named = {task.queue for task in app.tasks.values()} if app is not None else set()
    for queue in report.queues:
        assert queue.queue is not None
        if queue.queue in served:
            continue
        name, later = cell(queue.queue), queue.scheduled + queue.retrying
        has_jobs = queue.waiting + later > 0
        remedy = f"jobq worker APP -q {name}"
        if has_jobs:
            named.discard(queue.queue)
            level: Level = "fail" if queue.waiting else "warn"
            found = f"no live worker serves {name} ({queue.waiting} waiting, {later} later)"
            yield Finding(level, "queue", found, remedy)
        elif queue.ready:
            found = f"no live worker serves {name}, where Redis holds {queue.ready} entries of jobs that are gone"
            yield Finding("note", "queue", found, f"nothing, or {remedy} to have them dropped")
    # With no worker at all `workers` says it for every queue.
    for missed in sorted(named - served) if served else ():
        found = f"no live worker serves {missed}, which tasks of the application name"
        yield Finding("note", "queue", found, f"jobq worker APP -q {missed}")


def _tasks(report: Report, living: Living) -> Iterator[Finding]:
    """Tasks of jobs in served queues that no live worker offers: their jobs will be parked."""
    offered: dict[str, set[str]] = {}
    for worker in living.workers(report):
        for queue in worker.queues:
            offered.setdefault(queue, set()).update(worker.tasks)
    for count in report.counts.jobs:
        number = count.waiting + count.scheduled + count.retrying
        is_missed = bool(offered.get(count.queue)) and count.task not in offered[count.queue]
        if number and is_missed and count.task not in report.total.parked_tasks:
            found = f"no live worker of {cell(count.queue)} knows task {cell(count.task)} ({number} jobs)"
            yield Finding("warn", "task", found, _KNOW_IT)


def _oldest(report: Report) -> Finding:
    age = report.total.oldest_waiting_s
    if age is None:
        return Finding("ok", "oldest", "nothing waits")
    found = f"the oldest job that waits has been due for {duration(age)}"
    if age > _LATE_AFTER_S:
        return Finding("warn", "oldest", found, "more workers or slots, unless something above explains it")
    return Finding("ok", "oldest", found)
