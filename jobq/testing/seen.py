"""Which jobs a transaction sees: its own, not committed yet, and the committed ones that are not done.

Invariant: reads only. Called by tests of applications. Calls outbox.rehearsal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from ..model import Intent, described
from ..outbox import rehearsal
from ..outbox.rehearsal import SeenRow
from ..outbox.statement import Transaction
from ..task import Task

DELAY_TOLERANCE_S = 5.0
"""A row says when its job is due, not what delay was asked for: the two clocks differ by the way to the database."""


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class EnqueuedJob:
    """A job in the outbox. Equal to the `task.job(...)`, with the same options, that would have made it.

    What was not given does not count: `job(7)` and `job(7, locale="en")` differ even where "en" is the default.
    A delay is compared to within DELAY_TOLERANCE_S; idempotency keys are not compared.
    """

    id: UUID
    task: str
    queue: str
    args: dict[str, Any]
    """By parameter name, as the task will get them; as plain JSON where all tasks were asked for."""
    priority: int
    run_at: datetime | None
    delay_s: float | None
    """Seconds between the enqueue and `run_at`; None for a job that is due once committed."""
    max_attempts: int | None
    timeout_s: float | None
    headers: dict[str, str]
    attempts: int
    """How many attempts have failed so far."""
    args_json: str
    """The arguments as they are stored."""

    def __eq__(self, other: object) -> bool:
        if isinstance(other, EnqueuedJob):
            return self.id == other.id
        if not isinstance(other, Intent):
            return NotImplemented
        is_same_call = (self.task, json.loads(self.args_json)) == (other.task, json.loads(other.args))
        return is_same_call and self._options() == _options(other) and self._is_due_as(other)

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return described(
            self.task,
            self.args_json,
            queue=self.queue,
            priority=self.priority,
            delay=None if self.delay_s is None else round(self.delay_s, 1),
            max_attempts=self.max_attempts,
            timeout=self.timeout_s,
            headers=self.headers or None,
        )

    def _options(self) -> tuple[object, ...]:
        return self.queue, self.priority, self.max_attempts, self.timeout_s, self.headers

    def _is_due_as(self, intent: Intent) -> bool:
        if intent.run_at is not None:
            return self.run_at == intent.run_at or (self.run_at is None and intent.run_at <= datetime.now(UTC))
        if not intent.delay_s or self.delay_s is None:
            return not intent.delay_s and self.delay_s is None
        return abs(self.delay_s - intent.delay_s) <= DELAY_TOLERANCE_S


async def enqueued(
    tx: Transaction, task: Task[..., Any, Any] | None = None, /, *, schema: str = "jobq"
) -> list[EnqueuedJob]:
    """The jobs of a task, or of all, that this transaction sees and that are not done, in the order of their enqueue.

    `schema` is asked for only where all tasks are. Raises InvalidArguments for a row that its task would refuse.
    """
    if task is None:
        rows = await rehearsal.see(tx, schema, None)
        return [_job(row, row.task, json.loads(row.args)) for row in rows]
    rows = await rehearsal.see(tx, task._schema, (task.name, *task.aliases))
    return [_job(row, task.name, task.codec.decode(row.args)) for row in rows]


def _job(row: SeenRow, task: str, args: dict[str, Any]) -> EnqueuedJob:
    return EnqueuedJob(
        id=row.id,
        task=task,
        queue=row.queue,
        args=args,
        priority=row.priority,
        run_at=row.run_at,
        delay_s=None if row.run_at is None else (row.run_at - _enqueued_at(row)).total_seconds(),
        max_attempts=row.max_attempts,
        timeout_s=row.timeout_s,
        headers=json.loads(row.headers) if row.headers else {},
        attempts=row.attempts,
        args_json=row.args,
    )


def _enqueued_at(row: SeenRow) -> datetime:
    """When the id was made. `created_at` is the start of the transaction, and that of a test may be long ago."""
    if row.id.version != 7:  # written by another language
        return row.created_at
    return datetime.fromtimestamp((row.id.int >> 80) / 1000, UTC)


def _options(intent: Intent) -> tuple[object, ...]:
    headers = json.loads(intent.headers) if intent.headers else {}
    return intent.queue, intent.priority, intent.max_attempts, intent.timeout_s, headers
