"""`jobq jobs`: the jobs that are not done. Called by the command group. Calls outbox.browse."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

import click

from ..outbox import browse
from ..outbox.browse import JobRow, State
from .failures import ExitCode, Failure
from .stores import Stores, database_options
from .tables import as_document, show_fields, show_json, show_table

if TYPE_CHECKING:
    import asyncpg

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document.")
args_option = click.option("--args", "with_args", is_flag=True, help="Show the arguments and headers, too.")
limit_option = click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, metavar="N", help="At most so many."
)


@click.group()
def jobs() -> None:
    """List, show, cancel or hasten jobs that are not done.

    ID is the whole id, with or without hyphens. Of a job that is done, no trace is left.
    """


@jobs.command("list")
@click.option("--waiting", "state", flag_value="waiting", help="Only those that are due, also while they run.")
@click.option("--scheduled", "state", flag_value="scheduled", help="Only those that are due later.")
@click.option("--retrying", "state", flag_value="retrying", help="Only those that failed and will be tried again.")
@click.option("--task", metavar="NAME", help="Only of this task.")
@click.option("--queue", "-q", metavar="NAME", help="Only of this queue.")
@limit_option
@json_option
@database_options
def list_(stores: Stores, state: State | None, task: str | None, queue: str | None, limit: int, as_json: bool) -> None:
    """List jobs, the oldest first; with --scheduled or --retrying the soonest first.

    \b
    Example:
      jobq jobs list --retrying --task send_receipt
    """
    rows = ask(stores, lambda tx: browse.jobs(tx, stores.schema, state=state, task=task, queue=queue, limit=limit))
    if as_json:
        show_json([as_document(row, without=("headers", "args")) for row in rows])
        return
    show_table(
        ("id", "state", "task", "queue", ">priority", ">attempts", ">crashes", "due", "error"),
        [_line(row) for row in rows],
    )
    if len(rows) == limit:
        click.echo(f"{limit} shown; --limit shows more", err=True)


@jobs.command()
@click.argument("job_id", metavar="ID", type=click.UUID)
@args_option
@json_option
@database_options
def show(stores: Stores, job_id: UUID, with_args: bool, as_json: bool) -> None:
    """Show one job: all but its arguments, and those with --args."""

    async def look(tx: asyncpg.Connection) -> tuple[JobRow | None, bool]:
        row = await browse.job(tx, stores.schema, job_id)
        return row, row is None and await browse.dead_job(tx, stores.schema, job_id) is not None

    row, is_dead = ask(stores, look)
    if row is None:
        raise Failure(f"job {job_id} {_DEAD if is_dead else _GONE}")
    shown = as_document(row, without=() if with_args else ("headers", "args"))
    (show_json if as_json else show_fields)(shown)


@jobs.command()
@click.argument("job_ids", metavar="ID...", type=click.UUID, nargs=-1, required=True)
@json_option
@database_options
def cancel(stores: Stores, job_ids: tuple[UUID, ...], as_json: bool) -> None:
    """Delete jobs that are not done: they start no more.

    A run that is under way goes on, but its `ctx.complete()` writes nothing any more.
    """

    async def work(tx: asyncpg.Connection) -> dict[UUID, str]:
        cancelled = {job_id for job_id in job_ids if await browse.cancel(tx, stores.schema, job_id)}
        found = await browse.find(tx, stores.schema, job_ids)
        told = {job_id: _DEAD if found.get(job_id) == "dead" else _GONE for job_id in job_ids}
        return told | dict.fromkeys(cancelled, "cancelled")

    _tell(ask(stores, work), "cancelled", as_json)


@jobs.command("run-now")
@click.argument("job_ids", metavar="ID...", type=click.UUID, nargs=-1, required=True)
@json_option
@database_options
def run_now(stores: Stores, job_ids: tuple[UUID, ...], as_json: bool) -> None:
    """Make jobs due that are scheduled or wait for their next attempt."""

    async def work(tx: asyncpg.Connection) -> dict[UUID, str]:
        hastened = await browse.run_now(tx, stores.schema, job_ids)
        found = await browse.find(tx, stores.schema, job_ids)
        said = {"waiting": "is due already", "later": "is due later: try again", "dead": _DEAD}
        told = {job_id: said.get(found.get(job_id, ""), _GONE) for job_id in job_ids}
        return told | dict.fromkeys(hastened, "due now")

    _tell(ask(stores, work), "due now", as_json)


_DEAD = "is dead: see `jobq dead`"
_GONE = "is not there: it is done, was cancelled, or its transaction never committed"


def ask(stores: Stores, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
    """Do `work` on a connection, each statement in a transaction of its own."""

    async def whole(stores: Stores) -> T:
        async with stores.postgresql("cli") as connection:
            return await work(connection)

    return stores.run(whole)


def _tell(outcomes: dict[UUID, str], success: str, as_json: bool) -> None:
    """Say what happened to each job; fail unless all of them went as asked."""
    if as_json:
        show_json([{"id": job_id, "outcome": outcome} for job_id, outcome in outcomes.items()])
    else:
        for job_id, outcome in outcomes.items():
            click.echo(f"{job_id} {outcome}")
    if any(outcome != success for outcome in outcomes.values()):
        sys.exit(ExitCode.FAILED)


def _line(row: JobRow) -> Sequence[object]:
    due = row.run_at if row.state != "waiting" else "now"
    return (row.id, row.state, row.task, row.queue, row.priority, row.attempts, row.crashes, due, row.error_type)
