"""One connection to PostgreSQL that a part of a process keeps for itself, opened again when it is lost.

Invariant: a connection that saw an error, or took longer than DEADLINE_S, is not used again: its state is unknown.
Called by worker. Calls database.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg

from .database import UNAVAILABLE, Database

DEADLINE_S = 30.0
"""Longest use of the connection at a time. A network that swallows everything raises nothing by itself."""


class Line:
    """`async with line.open() as connection:` one user at a time."""

    def __init__(self, database: Database, schema: str, name: str):
        self._database = database
        self._schema = schema
        self._name = name
        self._connection: asyncpg.Connection | None = None
        self._turn = asyncio.Lock()

    @property
    def is_in_use(self) -> bool:
        return self._turn.locked()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[asyncpg.Connection]:
        """Use the connection. Raises what Database.connect raises, and TimeoutError."""
        async with self._turn:
            try:
                async with asyncio.timeout(DEADLINE_S):
                    if self._connection is None or self._connection.is_closed():
                        self._connection = await self._database.connect(
                            schema=self._schema, name=self._name, repeats=True
                        )
                    yield self._connection
            except BaseException:
                self._drop()
                raise

    async def close(self) -> None:
        """Close for good, also a connection that leads nowhere any more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            # What it was used for has been answered by now; it ends with an error all the same.
            with suppress(*UNAVAILABLE):
                await connection.close(timeout=2)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
