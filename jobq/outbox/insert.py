"""An enqueue as a statement that the caller executes: for transactions that only synchronous drivers can enter.

Invariant: a statement carries all of its values and answers with one row, (id, created). Nothing is sent here, so
nobody can see whether a transaction will be open where it is executed. Called by task. Calls enqueue, statement.
"""

from __future__ import annotations

from functools import cache
from typing import Any, LiteralString, TypeAlias

from sqlalchemy import Boolean, TextualSelect, Uuid, column, text

from ..model import Intent, new_job_id
from .enqueue import many, row
from .statement import Statement, pyformat

Query: TypeAlias = tuple[LiteralString, dict[str, Any]]
"""What `cursor.execute(*query)` takes."""

_enqueue = Statement("enqueue")


def as_insert(intent: Intent, *, schema: str) -> TextualSelect:
    """Return the statement for SQLAlchemy."""
    statement, values = _bound(intent)
    columns = column("id", Uuid()), column("created", Boolean())
    return text(_source(schema, statement)).bindparams(**values).columns(*columns)


def as_sql(intent: Intent, *, schema: str) -> Query:
    """Return the statement for a cursor whose parameters are `%(name)s`."""
    statement, values = _bound(intent)
    return _pyformat(schema, statement), values


def _bound(intent: Intent) -> tuple[Statement, dict[str, Any]]:
    """The statement for a new job, and its values. An id is text there: not every driver knows UUID."""
    job_id = new_job_id()
    if intent.idempotency_key is None:
        return _enqueue, row(job_id, intent) | {"id": str(job_id)}
    statement, values = many([(job_id, intent)])
    return statement, values | {name: list(map(str, values[name])) for name in ("ids", "renamed") if name in values}


@cache
def _source(schema: str, statement: Statement) -> str:
    if statement is _enqueue:
        return f"{statement.text(schema)}\nRETURNING id, true AS created"
    return statement.text(schema)


@cache
def _pyformat(schema: str, statement: Statement) -> LiteralString:
    return pyformat(_source(schema, statement))
