"""How jobs end, in PostgreSQL: read before the run, then complete, reschedule or bury.

Invariant: every write names the generation that ran, so a run whose job has moved on changes nothing. The
functions take a transaction (or a connection that commits by itself) and return the rows they ended: what is
not returned was gone, newer, or locked at that moment. Called by worker and context. Calls statement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from ..model import DeadJob, Job
from .enqueue import require_transaction
from .statement import Statement, Transaction

_read = Statement("read")
_complete = Statement("complete")
_complete_one = Statement("complete_one")
_same_transaction = Statement("same_transaction")
_reschedule = Statement("reschedule")
_bury = Statement("bury")
_crash = Statement("crash")
_generations = Statement("generations")
_end_backends = Statement("end_backends")

RunKey = tuple[UUID, int]
"""(job id, generation): what a run owns."""

IDLE_IN_COMPLETE_S = 300
"""An open `ctx.complete()` that does nothing for this long is rolled back by PostgreSQL."""
LOCK_TIMEOUT_MS = 5_000
"""How long `ctx.complete()` waits for the row of its job."""
_END_BACKENDS_MS = 5_000


@dataclass(frozen=True, slots=True)
class Reschedule:
    """One job to run again."""

    id: UUID
    generation: int
    delay_s: float = 0.0
    failed: bool = False
    """Whether the run uses up an attempt."""
    error_type: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Burial:
    """One job to be moved to the dead."""

    id: UUID
    generation: int
    reason: str
    failed: bool = True
    error_type: str | None = None
    error: str | None = None


class Standing(NamedTuple):
    """How a row stands now."""

    generation: int
    crashes: int
    due: bool


def worker_session(worker: str) -> str:
    """The application_name of the sessions in which a worker holds locks on its jobs."""
    return f"jobq:{worker}"


async def read(tx: Transaction, schema: str, ids: Iterable[UUID]) -> dict[UUID, Job]:
    """The rows of `ids`; absent ones were completed, cancelled, or never committed."""
    rows = await _read.on(tx, schema, ids=list(ids))
    return {job.id: job for job in map(Job._make, rows)}


async def complete(tx: Transaction, schema: str, runs: Sequence[RunKey]) -> set[UUID]:
    """Complete jobs that left no effects in the database; passes over rows that are locked."""
    rows = await _complete.on(
        tx, schema, ids=[id_ for id_, _ in runs], generations=[generation for _, generation in runs]
    )
    # As a rule all of them; and ids that were hashed before are not hashed again.
    return {id_ for id_, _ in runs} if len(rows) == len(runs) else {row[0] for row in rows}


async def begin_complete(tx: Transaction, schema: str, run: RunKey, *, worker: str) -> str | None:
    """Complete one job inside the transaction of its effects: the row's DELETE comes before them (MUST).

    Returns the transaction's id; None: the job is no longer this run's. Waits LOCK_TIMEOUT_MS for a lock on the
    row (then error 55P03). Raises NotInTransaction where the DELETE would be committed on its own.
    """
    await require_transaction(tx)
    id_, generation = run
    settings = {"name": worker_session(worker), "lock": f"{LOCK_TIMEOUT_MS}ms", "idle": f"{IDLE_IN_COMPLETE_S}s"}
    for (xid,) in await _complete_one.on(tx, schema, id=id_, generation=generation, **settings):
        return str(xid)
    return None


async def is_same_transaction(tx: Transaction, schema: str, xid: str) -> bool:
    """Whether COMMIT would commit what began with the DELETE. Raises error 25P02 where it would roll back."""
    ((is_same,),) = await _same_transaction.on(tx, schema, xid=xid)
    return bool(is_same)


async def reschedule(tx: Transaction, schema: str, ends: Sequence[Reschedule]) -> set[UUID]:
    """Give each job its next generation, due after its delay by the database's clock."""
    rows = await _reschedule.on(
        tx,
        schema,
        ids=[end.id for end in ends],
        generations=[end.generation for end in ends],
        delays_s=[end.delay_s for end in ends],
        failed=[end.failed for end in ends],
        error_types=[end.error_type for end in ends],
        errors=[end.error for end in ends],
    )
    return {row[0] for row in rows}


async def bury(tx: Transaction, schema: str, ends: Sequence[Burial]) -> list[DeadJob]:
    """Move jobs to the dead."""
    rows = await _bury.on(
        tx,
        schema,
        ids=[end.id for end in ends],
        generations=[end.generation for end in ends],
        reasons=[end.reason for end in ends],
        failed=[end.failed for end in ends],
        error_types=[end.error_type for end in ends],
        errors=[end.error for end in ends],
    )
    return [DeadJob(*row) for row in rows]


async def crash(tx: Transaction, schema: str, runs: Sequence[RunKey]) -> set[UUID]:
    """Count a crash for runs whose worker died. Repeating it changes nothing: the generation has moved on."""
    rows = await _crash.on(tx, schema, ids=[id_ for id_, _ in runs], generations=[generation for _, generation in runs])
    return {row[0] for row in rows}


async def standings(tx: Transaction, schema: str, ids: Iterable[UUID]) -> dict[UUID, Standing]:
    """How the rows of `ids` stand now; absent ones are gone."""
    return {row[0]: Standing(*row[1:]) for row in await _generations.on(tx, schema, ids=list(ids))}


async def end_backends(tx: Transaction, schema: str, worker: str) -> int:
    """End the sessions a dead worker left in `ctx.complete()`, and wait until they are gone.

    As long as they hold the locks of its jobs, `crash` would pass those over. Works for sessions of the same role.
    """
    name = worker_session(worker)
    ((ended,),) = await _end_backends.on(tx, schema, name=name, wait_ms=0)
    if ended:
        # All are told by now, so that the waits for one after the other come to no more than the longest.
        await _end_backends.on(tx, schema, name=name, wait_ms=_END_BACKENDS_MS)
    return int(ended)
