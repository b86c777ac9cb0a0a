"""`jobq migrate`: the tables from the command line.

Invariant: rows are dropped only for someone who was told which, or who said --yes.
Called by the command group. Calls migrate, outbox.database.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from sqlalchemy.ext.asyncio import AsyncEngine

from .. import migrate as tables
from ..migrate import chain_file
from ..outbox.database import Database
from .failures import Failure
from .options import app_option, database_url_option, logging_options, open_app, schema_option

T = TypeVar("T")

_REV = click.Choice(["head", "base", *tables.revisions()])
_lock_timeout_option = click.option(
    "--lock-timeout",
    type=click.FloatRange(min=0.001),
    default=5,
    show_default=True,
    metavar="SECONDS",
    help="Give up when a table cannot be locked in this time.",
)


class Target:
    """The tables that a verb is about: a schema of a database."""

    def __init__(self, database: Database, schema: str):
        self._database = database
        self.schema = schema

    def run(self, work: Callable[[AsyncEngine], Awaitable[T]], *, locks: bool = False) -> T:
        """Do `work` on the engine, in a loop of its own. `locks`: it holds a lock, which has to end with it."""

        async def whole() -> T:
            try:
                if locks:
                    await self._database.require_sessions()
                return await work(self._database.engine)
            finally:
                await self._database.engine.dispose()  # an application's, too: its loop ends here

        return asyncio.run(whole())


def _targeted(command: Callable[..., T]) -> Callable[..., T]:
    """Give a verb the options that say which tables, and pass them on as `target`."""

    @app_option
    @database_url_option
    @schema_option
    @logging_options
    @functools.wraps(command)
    def with_target(app: str | None, database_url: str | None, schema: str | None, **options: Any) -> T:
        return command(target=_target(app, database_url, schema), **options)

    return with_target


def _target(app: str | None, database_url: str | None, schema: str | None) -> Target:
    typed = {
        name
        for name in ("app", "database_url")
        if click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if app is None or typed == {"database_url"}:
        if database_url is None:
            raise click.UsageError("which database? Give --database-url or --app, or set JOBQ_DATABASE_URL")
        return Target(Database.of(database_url), schema or tables.SCHEMA)
    jobs = open_app(app, database_url=database_url, schema=schema)
    return Target(jobs.database, jobs.schema)


@click.group()
def migrate() -> None:
    """Create, upgrade or inspect the tables.

    The database is that of an application (--app), or the one of --database-url alone.
    REV is a revision such as jobq_0001, or head, or base for no tables at all.
    """


@migrate.command()
@click.argument("rev", type=_REV, metavar="[REV]", default="head")
@_lock_timeout_option
@_targeted
def upgrade(rev: str, lock_timeout: float, target: Target) -> None:
    """Bring the tables up to REV (default head).

    Several may run at once: one works, the others wait for it.
    """

    async def work(engine: AsyncEngine) -> str | None:
        await tables.upgrade(engine, rev, schema=target.schema, lock_timeout=lock_timeout)
        return await tables.current(engine, schema=target.schema)

    click.echo(target.run(work, locks=True) or "base")


@migrate.command()
@click.argument("rev", type=_REV, metavar="REV")
@click.option("--yes", is_flag=True, help="Drop what the downgrade drops without asking.")
@_lock_timeout_option
@_targeted
def downgrade(rev: str, yes: bool, lock_timeout: float, target: Target) -> None:
    """Take the tables back to REV."""
    lost = target.run(lambda engine: tables.losses(engine, rev, schema=target.schema))
    if lost:
        drops = ", ".join(f"{table} ({rows} {'row' if rows == 1 else 'rows'})" for table, rows in lost.items())
        click.echo(f"The way to {rev} drops these tables of schema {target.schema}: {drops}.", err=True)
        if not yes:
            if not sys.stdin.isatty():
                raise click.UsageError("nobody can be asked here: repeat with --yes to drop them")
            click.confirm("Drop them?", abort=True, err=True)
    target.run(
        lambda engine: tables.downgrade(engine, rev, schema=target.schema, lock_timeout=lock_timeout), locks=True
    )
    click.echo(rev)


@migrate.command()
@click.option("--check", is_flag=True, help="Exit 1 unless the tables are those this jobq needs.")
@_targeted
def current(check: bool, target: Target) -> None:
    """Show the revision of the tables."""
    found = target.run(lambda engine: tables.current(engine, schema=target.schema))
    click.echo("none" if found is None else f"{found} (head)" if found in tables.heads() else found)
    problem = tables.mismatch(found, target.schema)
    if check and problem is not None:
        raise Failure(problem)


@migrate.command()
@click.argument("rev", type=_REV, metavar="REV")
@_targeted
def stamp(rev: str, target: Target) -> None:
    """Record REV as the revision of the tables, and touch nothing else."""
    target.run(lambda engine: tables.stamp(engine, rev, schema=target.schema), locks=True)
    click.echo(rev)


@migrate.command()
def history() -> None:
    """List the revisions, oldest first."""
    for revision in tables.history():
        click.echo(f"{revision.id}  {revision.title}")


@migrate.command()
def heads() -> None:
    """Show the newest revision that this jobq knows."""
    for revision in tables.heads():
        click.echo(revision)


@migrate.command()
@click.argument("path", metavar="[FROM:TO]", default="base:head")
@schema_option
def sql(path: str, schema: str | None) -> None:
    """Print the statements of the way FROM:TO (default base:head), up or down."""
    click.echo(tables.sql(path, schema=schema or tables.SCHEMA), nl=False)


@migrate.command("init-alembic")
@click.option(
    "-c",
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    default="alembic.ini",
    show_default=True,
    metavar="FILE",
    help="The configuration of your alembic.",
)
@schema_option
def init_alembic(config_file: Path, schema: str | None) -> None:
    """Write a revision into your own alembic chain.

    It brings the tables to those of this jobq, together with yours. May be repeated: after an upgrade of jobq it
    writes the next one if there are new tables, else nothing.
    """
    if not config_file.is_file():
        raise click.UsageError(
            f"no {config_file} here: go where it is, or name it with -c FILE; `alembic init migrations` makes one"
        )
    schema = schema or tables.SCHEMA
    found = chain_file.write(config_file, schema=schema)
    click.echo(found.path)
    if not found.is_new:
        click.echo(f"This revision leads to {found.to} already: nothing was written.", err=True)
        return
    include = "jobq.migrate.include_name"
    include = include if schema == tables.SCHEMA else f'functools.partial({include}, schema="{schema}")'
    click.echo(
        f"Next: alembic upgrade head. If your env.py sets include_schemas=True, add include_name={include} "
        "to context.configure() there, so that autogenerate leaves these tables alone.",
        err=True,
    )
