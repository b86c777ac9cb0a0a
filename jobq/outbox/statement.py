"""SQL files, and the one way to run them on whatever transaction the caller has.

Files carry `{schema}` and `:name`; a cast is written CAST(:x AS type), because `::` and comments confuse
bind-parameter parsers. Called by the modules of this package.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, LiteralString, Protocol, TypeAlias, cast

from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session


class AsyncpgConnection(Protocol):
    """What jobq uses of an asyncpg connection or pool proxy (asyncpg ships no types of its own)."""

    def is_in_transaction(self) -> bool: ...

    async def fetch(self, query: str, *args: Any) -> Any: ...


Transaction: TypeAlias = "AsyncSession | AsyncConnection | async_scoped_session[Any] | AsyncpgConnection"
"""A transaction of the application: SQLAlchemy's, or an asyncpg connection inside `.transaction()`."""

_COMMENT = re.compile(r"--[^\n]*\n")
_PARAMETER = re.compile(r"(?<![:\w]):([a-z_]+)")


class Statement:
    """One SQL file."""

    def __init__(self, name: str):
        self._name = name

    async def on(self, tx: Transaction, schema: str, **values: Any) -> Sequence[Any]:
        """Run with `values` bound by name; returns rows that unpack as tuples."""
        if isinstance(tx, (AsyncSession, AsyncConnection, async_scoped_session)):
            result: Any = await tx.execute(_for_sqlalchemy(self._name, schema), values)
            return result.all() if result.returns_rows else ()
        query, names = _for_asyncpg(self._name, schema)
        rows: Sequence[Any] = await tx.fetch(query, *[values[name] for name in names])
        return rows

    def on_sync(self, tx: Session | Connection, schema: str, values: dict[str, Any]) -> None:
        """Run a statement without an answer from inside `run_sync` of SQLAlchemy."""
        tx.execute(_for_sqlalchemy(self._name, schema), values)

    def text(self, schema: str) -> str:
        """The statement with `:name` parameters, as SQLAlchemy's text() takes it."""
        return _text(self._name, schema)


@cache
def _text(name: str, schema: str) -> str:
    source = resources.files("jobq.outbox").joinpath("sql", f"{name}.sql").read_text(encoding="utf-8")
    return _COMMENT.sub("\n", source).replace("{schema}", f'"{schema}"').strip()


def pyformat(source: str) -> LiteralString:
    """Write `:name` as `%(name)s` and `%` as `%%`, for psycopg and Django."""
    rendered = _PARAMETER.sub(r"%(\1)s", source.replace("%", "%%"))
    # psycopg asks for a literal, since it trusts what it gets: this comes from our own files.
    return cast("LiteralString", rendered)  # type: ignore[redundant-cast]  # mypy takes any str for one


@cache
def _for_sqlalchemy(name: str, schema: str) -> Any:
    return text(_text(name, schema))


@cache
def _for_asyncpg(name: str, schema: str) -> tuple[str, tuple[str, ...]]:
    source = _text(name, schema)
    names = tuple(dict.fromkeys(_PARAMETER.findall(source)))
    return _PARAMETER.sub(lambda match: f"${names.index(match[1]) + 1}", source), names
