"""`jobq dead`: jobs that need a person.

Invariant: nothing is discarded that was not counted and agreed to first. Called by the command group. Calls
outbox.browse.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID

import click

from ..outbox import browse
from ..outbox.browse import DeadFilter
from .failures import ExitCode, Failure
from .jobs import args_option, ask, json_option, limit_option
from .stores import Stores, database_options
from .tables import as_document, show_fields, show_json, show_table

T = TypeVar("T")

_REASONS = ("exhausted", "rejected", "poison", "invalid")
_yes_option = click.option("--yes", is_flag=True, help="Do not ask.")
_all_option = click.option("--all", "everything", is_flag=True, help="All that the filters leave, or all there are.")


def _filters(command: Callable[..., T]) -> Callable[..., T]:
    """Give a command the filters, and pass them on as `which`."""

    @click.option("--task", metavar="NAME", help="Only of this task.")
    @click.option("--queue", "-q", metavar="NAME", help="Only of this queue.")
    @click.option("--reason", type=click.Choice(_REASONS), help="Only those that died of this.")
    @click.option("--error", metavar="TEXT", help="Only those whose error has this in its type or text.")
    @functools.wraps(command)
    def with_filters(task: str | None, queue: str | None, reason: str | None, error: str | None, **options: Any) -> T:
        ids = options.pop("job_ids", None) or None
        return command(which=DeadFilter(ids=ids, task=task, queue=queue, reason=reason, error=error), **options)

    return with_filters


@click.group()
def dead() -> None:
    """List, show, retry or discard dead jobs.

    A job is dead when its attempts are used up (exhausted), when it was refused for good (rejected), when it killed
    its worker three times in a row (poison), or when its arguments do not fit its task (invalid). ID is the whole
    id, with or without hyphens.
    """


@dead.command("list")
@_filters
@limit_option
@json_option
@database_options
def list_(stores: Stores, which: DeadFilter, limit: int, as_json: bool) -> None:
    """List dead jobs, the latest first.

    \b
    Example:
      jobq dead list --task send_receipt --error timeout
    """
    rows = ask(stores, lambda tx: browse.dead(tx, stores.schema, which, limit=limit))
    if as_json:
        show_json([as_document(row, without=("headers", "args")) for row in rows])
        return
    show_table(
        ("id", "reason", "task", "queue", ">attempts", ">crashes", "died", "error"),
        [(r.id, r.reason, r.task, r.queue, r.attempts, r.crashes, r.died_at, r.error_type) for r in rows],
    )
    if len(rows) == limit:
        click.echo(f"{limit} shown; --limit shows more", err=True)


@dead.command()
@click.argument("job_id", metavar="ID", type=click.UUID)
@args_option
@json_option
@database_options
def show(stores: Stores, job_id: UUID, with_args: bool, as_json: bool) -> None:
    """Show one dead job: all but its arguments, and those with --args."""
    row = ask(stores, lambda tx: browse.dead_job(tx, stores.schema, job_id))
    if row is None:
        raise Failure(f"job {job_id} is not dead; `jobq jobs show` finds one that is not done")
    shown = as_document(row, without=() if with_args else ("headers", "args"))
    (show_json if as_json else show_fields)(shown)


@dead.command()
@click.argument("job_ids", metavar="[ID]...", type=click.UUID, nargs=-1)
@_filters
@_all_option
@_yes_option
@json_option
@database_options
def retry(stores: Stores, which: DeadFilter, everything: bool, yes: bool, as_json: bool) -> None:
    """Bring dead jobs back, with all their attempts ahead of them.

    Asks first, unless the jobs are named by their ids.

    \b
    Examples:
      jobq dead retry 01980c6e-52a1-7cc3-b5a0-5b2f6d6f2f5e
      jobq dead retry --task send_receipt --error timeout
    """
    ids = _pick(stores, which, everything)
    _agree(ids, "retry", yes or which.ids is not None)
    changed = ask(stores, lambda tx: browse.retry_dead(tx, stores.schema, ids))
    _tell(changed, "retried", which, as_json)


@dead.command()
@click.argument("job_ids", metavar="[ID]...", type=click.UUID, nargs=-1)
@_filters
@_all_option
@_yes_option
@json_option
@database_options
def discard(stores: Stores, which: DeadFilter, everything: bool, yes: bool, as_json: bool) -> None:
    """Forget dead jobs for good. Asks first.

    \b
    Example:
      jobq dead discard --reason rejected --yes
    """
    ids = _pick(stores, which, everything)
    _agree(ids, "discard", yes)
    changed = ask(stores, lambda tx: browse.discard_dead(tx, stores.schema, ids))
    _tell(changed, "discarded", which, as_json)


def _pick(stores: Stores, which: DeadFilter, everything: bool) -> list[UUID]:
    """Find the jobs that are meant, so that exactly those are agreed to and touched."""
    if which == DeadFilter() and not everything:
        raise click.UsageError("which dead jobs? Name ids, or a filter such as --task, or --all")
    return [row.id for row in ask(stores, lambda tx: browse.dead(tx, stores.schema, which))]


def _agree(ids: list[UUID], verb: str, is_agreed: bool) -> None:
    if is_agreed or not ids:
        return
    click.echo(f"This would {verb} {_jobs(len(ids))}.", err=True)
    if not sys.stdin.isatty():
        raise click.UsageError(f"nobody can be asked here: repeat with --yes to {verb} them")
    click.confirm(f"{verb.capitalize()} them?", abort=True, err=True)


def _tell(changed: set[UUID], done: str, which: DeadFilter, as_json: bool) -> None:
    missing = [job_id for job_id in which.ids or () if job_id not in changed]
    if as_json:
        show_json({done: sorted(changed)})
    else:
        click.echo(f"{done} {_jobs(len(changed))}")
    for job_id in missing:
        click.echo(f"{job_id} is not among the dead that were asked for", err=True)
    if missing:
        sys.exit(ExitCode.FAILED)


def _jobs(number: int) -> str:
    return f"{number} dead {'job' if number == 1 else 'jobs'}"
