"""What tests of an application ask of the outbox: what is in it, what comes next, and that time passes.

Invariant: reads what the given transaction sees, and changes nothing but times. Called by testing. Calls statement.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from .statement import Statement, Transaction

_see_jobs = Statement("see_jobs")
_next_job = Statement("next_job")
_pass_time = Statement("pass_time")


class SeenRow(NamedTuple):
    """A job that is not done."""

    id: UUID
    generation: int
    task: str
    queue: str
    args: str  # JSON
    priority: int
    run_at: datetime | None
    attempts: int
    max_attempts: int | None
    timeout_s: float | None
    created_at: datetime
    headers: str | None  # JSON
    due: bool


async def see(tx: Transaction, schema: str, tasks: Iterable[str] | None) -> list[SeenRow]:
    """The jobs of the named tasks, or of all, in the order in which they were enqueued."""
    names = None if tasks is None else list(tasks)
    return [SeenRow(*row) for row in await _see_jobs.on(tx, schema, tasks=names)]


async def next_job(tx: Transaction, schema: str, tasks: Iterable[str]) -> tuple[UUID, float] | None:
    """The id of the job that comes next, and the seconds until it is due: 0 for those that are."""
    for row in await _next_job.on(tx, schema, tasks=list(tasks)):
        return row[0], row[1]
    return None


async def pass_time(tx: Transaction, schema: str, seconds: float) -> None:
    """Bring every `run_at`, and the end of every idempotency key, nearer by `seconds`."""
    await _pass_time.on(tx, schema, seconds=seconds)
