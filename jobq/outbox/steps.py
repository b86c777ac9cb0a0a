"""Recovery points of a job: what its steps have returned, kept from one run to the next.

Invariant: the first result that was kept under a name is the only one, and every run is told that one. Each statement
commits by itself, so a run that is paused or dies holds no lock that another would wait for. Called by context. Calls
statement and patience.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from .patience import Patience
from .settle import RunKey
from .statement import Statement

_recall = Statement("recall")
_record = Statement("record")


class Recalled(NamedTuple):
    """What is known of a step before it runs."""

    is_current: bool
    """Whether the job is still at the generation of the run that asks."""
    result: str | None
    """JSON, if an earlier run has kept one."""


async def recall(sessions: async_sessionmaker[AsyncSession], schema: str, run: RunKey, name: str) -> Recalled:
    """Look up one step for a run."""
    async with _statement_by_statement(sessions) as tx:
        ((is_current, result),) = await _recall.on(tx, schema, id=run[0], generation=run[1], name=name)
    return Recalled(is_current, result)


async def record(sessions: async_sessionmaker[AsyncSession], schema: str, job_id: UUID, name: str, result: str) -> str:
    """Keep the result of one step, and return what is kept. May be repeated: the first one stays."""
    async with _statement_by_statement(sessions) as tx:
        ((kept,),) = await _record.on(tx, schema, id=job_id, name=name, result=result)
    return str(kept)


def opening_of_record(schema: str) -> str:
    """How the statement of `record` begins: for tests that stop a run in front of it."""
    return _record.text(schema).partition("\n")[0]


@asynccontextmanager
async def _statement_by_statement(
    sessions: async_sessionmaker[AsyncSession],
) -> AsyncIterator[AsyncConnection | AsyncSession]:
    """A connection of the application's pool, on which a statement is committed when it has been answered."""
    bind: AsyncEngine | AsyncConnection = sessions.kw["bind"]
    if isinstance(bind, AsyncEngine):
        with Patience() as patience:
            async with bind.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
                await patience.begin(connection)
                yield connection
        return
    # Bound to one connection, and so to a transaction that is somebody else's: a test's, say. Steps side by side
    # must take turns there, or their savepoints end in the wrong order.
    async with bind.info.setdefault("jobq_step", asyncio.Lock()), sessions.begin() as session:
        yield session
