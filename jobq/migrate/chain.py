"""jobq's tables in the alembic chain of an application: what its revisions and its env.py call.

Invariant: what a revision does here is part of its transaction, and the version table beside the tables says what
they are, so that `jobq migrate` and the checks at a worker's start read the same as ever. Called by the package.
Calls versions; alembic is there already.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard

from sqlalchemy import text

from ..errors import ConfigurationError
from .versions import BASE, LOCK, SCHEMA, checked_schema, config, position, revisions

if TYPE_CHECKING:
    from alembic.operations import Operations as AlembicOperations
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy import Connection

log = logging.getLogger(__name__)


class Operations(Protocol):
    """What is used of `alembic.op`."""

    def get_bind(self) -> Connection: ...

    def get_context(self) -> MigrationContext: ...


def is_operations(value: object) -> TypeGuard[Operations]:
    """Whether this is `alembic.op`, or an object like it."""
    return hasattr(value, "get_bind") and hasattr(value, "get_context")


def upgrade(op: Operations, to: str, *, schema: str = SCHEMA, since: str | None = None) -> None:
    """Bring the tables up to revision `to`. Tables that are there or further on already are left as they are."""
    if to not in revisions():
        # `head` would be other tables with every release of jobq, and base is the way down.
        raise ConfigurationError(f"cannot upgrade to {to!r}: give to= one revision of {', '.join(revisions())}")
    tables = _Tables(op, schema, since)
    for revision in revisions()[tables.position : position(to, schema)]:
        tables.apply(revision, "upgrade", leads_to=revision)


def downgrade(op: Operations, to: str, *, schema: str = SCHEMA, since: str | None = None) -> None:
    """Take the tables back to revision `to`, or away with `base`."""
    if to not in (BASE, *revisions()):
        names = ", ".join((BASE, *revisions()))
        raise ConfigurationError(f"cannot downgrade to {to!r}: give to= one of {names}")
    tables = _Tables(op, schema, since)
    order, target = [BASE, *revisions()], position(to, schema)
    if tables.position < target:
        raise ConfigurationError(
            f"cannot downgrade to {to}: the tables in schema {schema!r} are at {order[tables.position]}, before it"
        )
    for place in range(tables.position, target, -1):
        tables.apply(order[place], "downgrade", leads_to=order[place - 1])


def include_name(name: str | None, type_: str, parent_names: Any = None, *, schema: str = SCHEMA) -> bool:
    """Keep autogenerate away from jobq's schema: `context.configure(include_name=...)` in env.py.

    Needed only with `include_schemas=True`. For another schema than the default use functools.partial.
    """
    return type_ != "schema" or name != schema


class _Tables:
    """The tables while a revision of the application's changes them.

    1. takes the migrators' lock for the transaction that alembic has open,
    2. finds out at which revision they are,
    3. applies one revision after another, each with its mark.
    """

    def __init__(self, op: Operations, schema: str, since: str | None):
        from alembic.operations import Operations as AlembicOperations
        from alembic.script import ScriptDirectory

        self._schema = checked_schema(schema)
        self._outer = op.get_context()
        if self._outer.dialect.name != "postgresql":
            raise ConfigurationError(f"the outbox lives in PostgreSQL; this chain is on {self._outer.dialect.name}")
        self._op: AlembicOperations = AlembicOperations(_context(op, schema))
        self._scripts: ScriptDirectory = ScriptDirectory.from_config(config(schema))
        if self._outer.as_sql and since is None:
            raise ConfigurationError(
                "alembic --sql cannot look at which revision the tables are: give since='base', or the revision"
            )
        if not self._outer.as_sql:
            self._lock()
            since = self._op.get_context().get_current_revision()
        self.position = position(since, schema)

    def apply(self, revision: str, direction: Literal["upgrade", "downgrade"], *, leads_to: str) -> None:
        """Run one revision up or down, and record the one that it leads to."""
        if direction == "upgrade":
            self._create_version_table()
        module: Any = self._scripts.get_revision(revision).module
        # Not through Operations.context(): when it ends, the application's own `op` would be gone.
        module.op = self._op
        getattr(module, direction)()
        versions = f'"{self._schema}".alembic_version'
        if leads_to == BASE:
            self._op.execute(f"DROP TABLE {versions}")
        else:
            self._op.execute(f"DELETE FROM {versions}")
            self._op.execute(f"INSERT INTO {versions} (version_num) VALUES ('{leads_to}')")
        phrase = "applied" if direction == "upgrade" else "taken back"
        log.info("revision %s", phrase, extra={"fields": {"revision": revision, "schema": self._schema}})

    def _lock(self) -> None:
        # Waiting here would keep the application's tables locked, and could be for an index build that waits for us.
        ask = text("SELECT pg_try_advisory_xact_lock(:lock, hashtext(:schema))")
        if not self._op.get_bind().scalar(ask, {"lock": LOCK, "schema": self._schema}):
            raise ConfigurationError(
                f"another migrator is changing the tables in schema {self._schema!r}: run this again when it is done"
            )

    def _create_version_table(self) -> None:
        # Not IF NOT EXISTS alone: that needs the right to create schemas even where there is nothing to create.
        exists = text(f"SELECT to_regnamespace('\"{self._schema}\"') IS NOT NULL")
        if self._outer.as_sql or not self._op.get_bind().scalar(exists):
            self._op.execute(f'CREATE SCHEMA IF NOT EXISTS "{self._schema}"')
        self._op.execute(
            f'CREATE TABLE IF NOT EXISTS "{self._schema}".alembic_version '
            "(version_num varchar(32) NOT NULL CONSTRAINT alembic_version_pkc PRIMARY KEY)"
        )


def _context(op: Operations, schema: str) -> MigrationContext:
    """A context for revisions of jobq: they take their schema from it, and write where the application's do."""
    from alembic.runtime.migration import MigrationContext

    outer = op.get_context()
    options: dict[str, Any] = {"version_table_schema": schema}
    if outer.as_sql:
        options |= {"as_sql": True, "output_buffer": outer.output_buffer}
        return MigrationContext.configure(dialect=outer.dialect, opts=options)
    inner = MigrationContext.configure(connection=op.get_bind(), opts=options)
    # The transaction is the outer one's: only that can leave it for a concurrent index build, and begin the next.
    inner.autocommit_block = outer.autocommit_block  # type: ignore[method-assign]
    return inner
