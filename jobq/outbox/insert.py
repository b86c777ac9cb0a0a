"""An enqueue as a statement that the caller executes: for transactions that only synchronous drivers can enter.

Invariant: a statement carries all of its values and answers with one row, (id, created). Nothing is sent here, so
nobody can see whether a transaction will be open where it is executed. Called by task. Calls enqueue, statement.
"""

from __future__ import annotations

from functools import cache
from typing import Any, LiteralString, TypeAlias

from sqlalchemy import Boolean, TextualSelect, Uuid, column, text

from ..model import Intent, new_job_id
from .enqueue import columns, row
from .statement import Statement, pyformat

Query: TypeAlias = tuple[LiteralString, dict[str, Any]]
"""What `cursor.execute(*query)` takes."""

_enqueue = Statement("enqueue")
_enqueue_many = Statement("enqueue_many")


def as_insert(intent: Intent, *, schema: str) -> TextualSelect:
    """Return the statement for SQLAlchemy."""
    source = _source(schema, with_key=intent.idempotency_key is not None)
    return text(source).bindparams(**_values(intent)).columns(column("id", Uuid()), column("created", Boolean()))


def as_sql(intent: Intent, *, schema: str) -> Query:
    """Return the statement for a cursor whose parameters are `%(name)s`."""
    return _pyformat(schema, with_key=intent.idempotency_key is not None), _values(intent)


def _values(intent: Intent) -> dict[str, Any]:
    # An id is text here: not every driver knows UUID, and the statement has the cast.
    job_id = new_job_id()
    if intent.idempotency_key is None:
        return row(job_id, intent) | {"id": str(job_id)}
    return columns([(job_id, intent)]) | {"ids": [str(job_id)]}


@cache
def _source(schema: str, *, with_key: bool) -> str:
    if with_key:
        return _enqueue_many.text(schema)
    return f"{_enqueue.text(schema)}\nRETURNING id, true AS created"


@cache
def _pyformat(schema: str, *, with_key: bool) -> LiteralString:
    return pyformat(_source(schema, with_key=with_key))
