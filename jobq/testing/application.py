"""The application under test, with the stores that the test names.

Invariant: the caller's JobQ is left as it is: what is changed is a copy that shares its tasks and hooks. Called by
pending and crashes. Calls outbox.database.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeAlias

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, async_sessionmaker

from ..app import JobQ
from ..errors import ConfigurationError
from ..outbox.database import Database

OWN_STATE: Any = object()
"""The state that the application's own lifespan yields."""
GivenDatabase: TypeAlias = "str | AsyncEngine | async_sessionmaker[Any] | AsyncConnection"


@asynccontextmanager
async def on_stores(
    jobs: JobQ, *, database: GivenDatabase | None = None, redis: str | None = None, state: Any = OWN_STATE
) -> AsyncIterator[JobQ]:
    """A copy of `jobs` on these stores and with this state; with its own where none is given.

    Its database is looked at anew: a test may have bound the sessionmaker to another engine since it was given.
    """
    app = copy.copy(jobs)
    app.given_redis = redis or jobs.given_redis
    if state is not OWN_STATE:
        app.lifespan = lambda: nullcontext(state)
    given = jobs.given_database if database is None else database
    if given is None:
        raise ConfigurationError("no database: JobQ(database=...) has none, so give database=..., say jobq_engine")
    app._database = _on_connection(jobs, given) if isinstance(given, AsyncConnection) else Database.of(given)
    try:
        yield app
    finally:
        await app.database.close()


def _on_connection(jobs: JobQ, connection: AsyncConnection) -> Database:
    """Sessions as the application's own, whose transactions are savepoints of the one that the test rolls back."""
    given = jobs.given_database
    maker = given if isinstance(given, async_sessionmaker) else async_sessionmaker(expire_on_commit=False)
    sessions = rebuilt(maker, bind=connection, join_transaction_mode="create_savepoint")
    return Database(connection.engine, sessions, owned=False)


def rebuilt(maker: async_sessionmaker[Any], **changes: Any) -> async_sessionmaker[Any]:
    """A sessionmaker like another one, but for some of its arguments."""
    return async_sessionmaker(**{"class_": maker.class_, **maker.kw, **changes})
