"""The versions of jobq's tables: which one is there, which one this release needs, and the way between them.

`upgrade` and `downgrade` work on an engine, or inside a revision of the application's own alembic chain. Either
way the tables' revision is recorded beside them, in the same transaction.
Called by applications, cli, worker, relay. Calls versions, engine, chain.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, overload

from . import chain, engine
from .chain import Operations, include_name
from .engine import check, current, losses, sql, stamp
from .versions import SCHEMA, Revision, checked_schema, heads, history, mismatch, revisions, scripts

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = [
    "SCHEMA",
    "Revision",
    "check",
    "checked_schema",
    "current",
    "downgrade",
    "heads",
    "history",
    "include_name",
    "losses",
    "mismatch",
    "revisions",
    "scripts",
    "sql",
    "stamp",
    "upgrade",
]


@overload
def upgrade(
    on: AsyncEngine, to: str = ..., *, schema: str = ..., lock_timeout: float = ...
) -> Coroutine[Any, Any, None]: ...


@overload
def upgrade(on: Operations, to: str, *, schema: str = ..., since: str | None = ...) -> None: ...


def upgrade(on: Any, to: str = "head", **options: Any) -> Coroutine[Any, Any, None] | None:
    """Bring the tables up to revision `to`: `await upgrade(engine)`, or `upgrade(op, to="jobq_0001")`.

    On an engine: creates the schema if need be, may be repeated, and called by many at once; `lock_timeout` is
    in seconds. In a revision of your own chain: part of its transaction; `to` is one revision, since yours must
    mean the same for ever, and `since` is where it starts from when `alembic upgrade --sql` cannot look. Raises
    ConfigurationError, and SchemaMismatch when the tables are newer than this release.
    """
    if chain.is_operations(on):
        chain.upgrade(on, to, **options)
        return None
    return engine.upgrade(on, to, **options)


@overload
def downgrade(
    on: AsyncEngine, to: str, *, schema: str = ..., lock_timeout: float = ...
) -> Coroutine[Any, Any, None]: ...


@overload
def downgrade(on: Operations, to: str, *, schema: str = ..., since: str | None = ...) -> None: ...


def downgrade(on: Any, to: str, **options: Any) -> Coroutine[Any, Any, None] | None:
    """Take the tables back to revision `to`, or away with `base`; options as for `upgrade`.

    `losses()` says what is lost with them.
    """
    if chain.is_operations(on):
        chain.downgrade(on, to, **options)
        return None
    return engine.downgrade(on, to, **options)
