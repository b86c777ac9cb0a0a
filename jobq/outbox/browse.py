"""What people ask of the outbox: counts, lists, one job; and what they do to waiting and dead jobs.

Invariant: every change names rows by id and returns what it changed. Called by app and cli. Calls statement.
"""

from __future__ import annotations

from uuid import UUID

from .statement import Statement, Transaction

_cancel = Statement("cancel")


async def cancel(tx: Transaction, schema: str, job_id: UUID) -> bool:
    """Delete one job that is not done. Its entry in Redis becomes a ghost, dropped at the pre-read."""
    return bool(await _cancel.on(tx, schema, id=job_id))
