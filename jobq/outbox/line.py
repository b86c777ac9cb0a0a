"""One connection to PostgreSQL that a part of a process keeps for itself, opened again when it is lost.

Called by worker. Calls database.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

import asyncpg

from .database import Database


class Line:
    """`async with line as connection:` one user at a time; any error closes it, since its state is unknown."""

    def __init__(self, database: Database, schema: str, name: str):
        self._database = database
        self._schema = schema
        self._name = name
        self._connection: asyncpg.Connection | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> asyncpg.Connection:
        await self._turn.acquire()
        try:
            if self._connection is None or self._connection.is_closed():
                self._connection = await self._database.connect(schema=self._schema, name=self._name)
        except BaseException:
            self._turn.release()
            raise
        return self._connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._drop()
        self._turn.release()

    async def close(self) -> None:
        """Close for good."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close(timeout=2)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
