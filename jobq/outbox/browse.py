"""What people ask of the outbox: counts, lists, one job; and what they do to waiting and dead jobs.

Invariant: every change names rows by id and returns what it changed; arguments are read for one job at a time.
Called by app and cli. Calls statement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple
from uuid import UUID

from .follow import LEADER_LOCK
from .statement import Statement, Transaction

_PAGES_COUNTED = 65_536
"""512 MiB: a larger table is counted by a sample of so many of its pages."""

_cancel = Statement("cancel")
_count_dead = Statement("count_dead")
_count_jobs = Statement("count_jobs")
_discard_dead = Statement("discard_dead")
_find_jobs = Statement("find_jobs")
_leader = Statement("leader")
_list_dead = Statement("list_dead")
_list_delayed = Statement("list_delayed")
_list_jobs = Statement("list_jobs")
_pages = Statement("pages")
_retry_dead = Statement("retry_dead")
_run_now = Statement("run_now")
_show_dead = Statement("show_dead")
_show_job = Statement("show_job")

State = Literal["waiting", "scheduled", "retrying"]
"""Due; due later; due later because an attempt failed. A job that runs is waiting: its row stays until it ends."""


class JobRow(NamedTuple):
    """A job that is not done. In lists the error is cut short, and headers and args are left out."""

    id: UUID
    state: State
    queue: str
    task: str
    priority: int
    generation: int
    attempts: int
    max_attempts: int | None
    crashes: int
    timeout_s: float | None
    created_at: datetime
    run_at: datetime | None
    error_type: str | None
    last_error: str | None
    headers: str | None = None
    args: str | None = None


class DeadRow(NamedTuple):
    """A dead job. In lists the error is cut short, and headers and args are left out."""

    id: UUID
    reason: str
    queue: str
    task: str
    priority: int
    generation: int
    attempts: int
    max_attempts: int | None
    crashes: int
    timeout_s: float | None
    created_at: datetime
    run_at: datetime | None
    died_at: datetime
    error_type: str | None
    last_error: str | None
    headers: str | None = None
    args: str | None = None


class TaskCount(NamedTuple):
    """The jobs of one task in one queue."""

    queue: str
    task: str
    waiting: int
    scheduled: int
    retrying: int
    oldest_waiting_s: float | None


class Counts(NamedTuple):
    """What the tables hold."""

    jobs: list[TaskCount]
    dead: dict[str, int]
    is_estimate: bool
    """Whether a table was too big to count, and a sample stands for it."""


class LeaderSession(NamedTuple):
    pid: int
    connected_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadFilter:
    """Which of the dead: what is None takes all."""

    ids: Sequence[UUID] | None = None
    task: str | None = None
    queue: str | None = None
    reason: str | None = None
    error: str | None = None
    """Part of the error's type or text, upper or lower case."""


async def count(tx: Transaction, schema: str, *, held: Iterable[UUID] = (), pages: int = _PAGES_COUNTED) -> Counts:
    """Count jobs and dead. Those in `held` are in a worker's hands, and so not waiting.

    Of a table with more than `pages` pages so many are sampled, and the counts are estimates.
    """
    jobs_share = await _share(tx, schema, "outbox", pages)
    dead_share = await _share(tx, schema, "dead", pages)
    rows = await _count_jobs.on(tx, schema, held=list(held), percent=100 * jobs_share)
    jobs = [
        TaskCount(
            queue,
            task,
            round(waiting / jobs_share),
            round(scheduled / jobs_share),
            round(retrying / jobs_share),
            oldest,
        )
        for queue, task, waiting, scheduled, retrying, oldest in rows
    ]
    dead = {row[0]: round(row[1] / dead_share) for row in await _count_dead.on(tx, schema, percent=100 * dead_share)}
    return Counts(jobs, dead, is_estimate=min(jobs_share, dead_share) < 1)


async def leader(tx: Transaction, schema: str) -> LeaderSession | None:
    """The session of the relay that leads, if one does."""
    rows = await _leader.on(tx, schema, space=LEADER_LOCK, schema_name=schema)
    return LeaderSession(*rows[0]) if rows else None


async def jobs(
    tx: Transaction,
    schema: str,
    *,
    state: State | None = None,
    task: str | None = None,
    queue: str | None = None,
    limit: int,
) -> list[JobRow]:
    """List jobs that are not done: oldest first, or soonest due first where they are due later."""
    if state in (None, "waiting"):
        rows = await _list_jobs.on(tx, schema, task=task, queue=queue, is_due=state == "waiting", limit=limit)
    else:
        has_failed = state == "retrying"
        rows = await _list_delayed.on(tx, schema, task=task, queue=queue, has_failed=has_failed, limit=limit)
    return [JobRow(*row) for row in rows]


async def job(tx: Transaction, schema: str, job_id: UUID) -> JobRow | None:
    """One job that is not done, with its arguments."""
    rows = await _show_job.on(tx, schema, id=job_id)
    return JobRow(*rows[0]) if rows else None


async def find(tx: Transaction, schema: str, ids: Iterable[UUID]) -> dict[UUID, Literal["waiting", "later", "dead"]]:
    """Where jobs are now. One that is absent is done, was cancelled, or was never committed."""
    return {row[0]: row[1] for row in await _find_jobs.on(tx, schema, ids=list(ids))}


async def cancel(tx: Transaction, schema: str, job_id: UUID) -> bool:
    """Delete one job that is not done. Its entry in Redis becomes a ghost, dropped at the pre-read."""
    return bool(await _cancel.on(tx, schema, id=job_id))


async def run_now(tx: Transaction, schema: str, ids: Iterable[UUID]) -> set[UUID]:
    """Make jobs due that are not; returns those that were not."""
    return {row[0] for row in await _run_now.on(tx, schema, ids=list(ids))}


async def dead(
    tx: Transaction, schema: str, which: DeadFilter | None = None, *, limit: int | None = None
) -> list[DeadRow]:
    """List the dead, the latest first."""
    which = which or DeadFilter()
    rows = await _list_dead.on(
        tx,
        schema,
        ids=None if which.ids is None else list(which.ids),
        task=which.task,
        queue=which.queue,
        reason=which.reason,
        error=which.error,
        limit=limit,
    )
    return [DeadRow(*row) for row in rows]


async def dead_job(tx: Transaction, schema: str, job_id: UUID) -> DeadRow | None:
    """One dead job, with its arguments."""
    rows = await _show_dead.on(tx, schema, id=job_id)
    return DeadRow(*rows[0]) if rows else None


async def retry_dead(tx: Transaction, schema: str, ids: Iterable[UUID]) -> set[UUID]:
    """Put dead jobs back into the outbox, as if they had not been attempted; returns those that were dead."""
    return {row[0] for row in await _retry_dead.on(tx, schema, ids=list(ids))}


async def discard_dead(tx: Transaction, schema: str, ids: Iterable[UUID]) -> set[UUID]:
    """Forget dead jobs; returns those that were dead."""
    return {row[0] for row in await _discard_dead.on(tx, schema, ids=list(ids))}


async def _share(tx: Transaction, schema: str, table_name: str, pages: int) -> float:
    """Which part of a table is to be read, so that a count stays short."""
    ((found,),) = await _pages.on(tx, schema, table_name=table_name)
    return min(1.0, pages / max(int(found), 1))
