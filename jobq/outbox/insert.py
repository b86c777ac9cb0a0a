"""An enqueue as a statement that the caller executes: for transactions that only synchronous drivers can enter.

Invariant: a statement carries all of its values and answers with one row, (id, created). Nothing is sent here, so
nobody can see whether a transaction will be open where it is executed. Called by task. Calls enqueue, statement.
"""

from __future__ import annotations

from functools import cache
from typing import Any, LiteralString, TypeAlias

from sqlalchemy import Boolean, TextualSelect, Uuid, column, text

from ..model import Intent, new_job_id
from .enqueue import Row, columns, many, row
from .statement import Statement, pyformat

Query: TypeAlias = tuple[LiteralString, dict[str, Any]]
"""What `cursor.execute(*query)` takes."""

_enqueue = Statement("enqueue")


def as_insert(intent: Intent, *, schema: str) -> TextualSelect:
    """Return the statement for SQLAlchemy."""
    rows = [(new_job_id(), intent)]
    source = _source(schema, _statement(rows))
    return text(source).bindparams(**_values(rows)).columns(column("id", Uuid()), column("created", Boolean()))


def as_sql(intent: Intent, *, schema: str) -> Query:
    """Return the statement for a cursor whose parameters are `%(name)s`."""
    rows = [(new_job_id(), intent)]
    return _pyformat(schema, _statement(rows)), _values(rows)


def _statement(rows: list[Row]) -> Statement:
    return _enqueue if rows[0][1].idempotency_key is None else many(rows)


def _values(rows: list[Row]) -> dict[str, Any]:
    # An id is text here: not every driver knows UUID, and the statement has the cast.
    ((job_id, intent),) = rows
    if intent.idempotency_key is None:
        return row(job_id, intent) | {"id": str(job_id)}
    values = columns(rows)
    return values | {name: list(map(str, values[name])) for name in ("ids", "renamed") if name in values}


@cache
def _source(schema: str, statement: Statement) -> str:
    if statement is _enqueue:
        return f"{statement.text(schema)}\nRETURNING id, true AS created"
    return statement.text(schema)


@cache
def _pyformat(schema: str, statement: Statement) -> LiteralString:
    return pyformat(_source(schema, statement))
