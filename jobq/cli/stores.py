"""Which PostgreSQL and Redis a command is about: those of an application, or those of the URLs alone.

Invariant: a command reaches tables of this release, or says why not. Called by the commands. Calls options,
outbox.database, broker, migrate.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from .. import migrate
from ..outbox.database import Database
from .options import app_option, database_url_option, open_app, redis_url_option, schema_option

if TYPE_CHECKING:
    import asyncpg

    from ..app import JobQ
    from ..broker.client import AsyncClient

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stores:
    """The two stores, and the application where one was named."""

    database: Database
    schema: str
    redis_url: str | None
    app: JobQ | None = None

    def run(self, work: Callable[[Stores], Awaitable[T]]) -> T:
        """Do `work` in an event loop of its own."""

        async def whole() -> T:
            try:
                return await work(self)
            finally:
                await self.database.engine.dispose()  # an application's, too: its loop ends here

        return asyncio.run(whole())

    @asynccontextmanager
    async def postgresql(self, purpose: str) -> AsyncIterator[asyncpg.Connection]:
        """A connection of its own to tables that this release knows. Raises SchemaMismatch, WrongDatabase."""
        connection = await self.database.connect(schema=self.schema, name=f"jobq:{purpose}")
        try:
            await migrate.check(connection, self.schema)
            yield connection
        finally:
            await connection.close(timeout=2)

    @asynccontextmanager
    async def redis(self) -> AsyncIterator[AsyncClient]:
        """A client, which connects at its first command."""
        from ..broker.client import connect

        assert self.redis_url is not None
        client = connect(self.redis_url)
        try:
            yield client
        finally:
            await client.aclose()


def find_stores(
    app: str | None, *, database_url: str | None, schema: str | None, redis_url: str | None, needs_redis: bool = True
) -> Stores:
    """Decide where to go. A URL that was typed stands above an application that was not."""
    if app is None or (_is_typed("database_url") and not _is_typed("app")):
        if database_url is None:
            raise click.UsageError("which database? Name an application, or set --database-url or JOBQ_DATABASE_URL")
        if needs_redis and redis_url is None:
            raise click.UsageError("which Redis? Name an application, or set --redis-url or JOBQ_REDIS_URL")
        return Stores(Database.of(database_url), schema or migrate.SCHEMA, redis_url)
    jobs = open_app(app, database_url=database_url, redis_url=redis_url, schema=schema)
    if needs_redis:
        _ = jobs.redis_url  # raises when there is none
    return Stores(jobs.database, jobs.schema, jobs.given_redis, jobs)


def stores_options(command: Callable[..., T]) -> Callable[..., T]:
    """Give a command the options that say where both stores are, and pass them on as `stores`."""

    @app_option
    @database_url_option
    @redis_url_option
    @schema_option
    @functools.wraps(command)
    def with_stores(
        app: str | None, database_url: str | None, redis_url: str | None, schema: str | None, **options: Any
    ) -> T:
        stores = find_stores(app, database_url=database_url, redis_url=redis_url, schema=schema)
        return command(stores=stores, **options)

    return with_stores


def database_options(command: Callable[..., T]) -> Callable[..., T]:
    """Give a command the options that say where the database is, and pass it on as `stores`."""

    @app_option
    @database_url_option
    @schema_option
    @functools.wraps(command)
    def with_database(app: str | None, database_url: str | None, schema: str | None, **options: Any) -> T:
        stores = find_stores(app, database_url=database_url, redis_url=None, schema=schema, needs_redis=False)
        return command(stores=stores, **options)

    return with_database


def _is_typed(option: str) -> bool:
    return click.get_current_context().get_parameter_source(option) is ParameterSource.COMMANDLINE
