"""The servers of a test run, and databases cloned from a template: a migration for each test would take seconds.

Invariant: a missing server fails the tests and says what to do, it never skips them; and processes of one run
(pytest-xdist) share neither a database nor a Redis database. Everything here blocks, and touches no event loop
but its own. Called by the pytest plugin. Calls embedded and migrate.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, TypeVar
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import asyncpg
import redis
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from .. import embedded, migrate
from ..broker.client import connect_sync
from ..embedded.account import ELSEWHERE
from ..errors import ConfigurationError

DATABASE_VARIABLE = "JOBQ_TEST_DATABASE_URL"
REDIS_VARIABLE = "JOBQ_TEST_REDIS_URL"
_XDIST_VARIABLE = "PYTEST_XDIST_WORKER"

Prepare: TypeAlias = Callable[[str], Awaitable[None] | None]
"""Makes an application's own tables in the database of this URL."""
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ServerUrls:
    """Where PostgreSQL and Redis are for this process of the test run."""

    database_url: str
    redis_url: str


@contextmanager
def servers() -> Iterator[ServerUrls]:
    """The servers that the environment names, else private ones for the time of the block.

    Raises ConfigurationError.
    """
    named = [os.environ[name] for name in (DATABASE_VARIABLE, REDIS_VARIABLE) if os.environ.get(name)]
    if len(named) == 1:
        raise ConfigurationError(f"set both {DATABASE_VARIABLE} and {REDIS_VARIABLE}, or neither")
    if named:
        yield ServerUrls(named[0], _own_redis_database(named[1], os.environ.get(_XDIST_VARIABLE, "")))
        return
    try:
        started = embedded.start()
    except ConfigurationError as error:
        remedy = f"Or set {DATABASE_VARIABLE} and {REDIS_VARIABLE} to servers of your own."
        raise ConfigurationError(str(error).replace(ELSEWHERE, remedy)) from None
    with started:
        yield ServerUrls(started.database_url, started.redis_url)


class Templates:
    """Databases to be cloned: one for each way to prepare one, so that parts of a suite may have their own."""

    def __init__(self, server_url: str, stack: ExitStack):
        self._server_url = server_url
        self._stack = stack
        self._names: dict[Prepare, str] = {}

    @classmethod
    @contextmanager
    def on(cls, server_url: str) -> Iterator[Self]:
        """All of them are dropped at the end of the block."""
        with ExitStack() as stack:
            yield cls(server_url, stack)

    def name(self, prepare: Prepare) -> str:
        """The name of a database with jobq's tables and what `prepare` makes; made at the first call."""
        if prepare not in self._names:
            self._names[prepare] = self._made(prepare)
        return self._names[prepare]

    def _made(self, prepare: Prepare) -> str:
        name = f"jobq_template_{uuid4().hex}"
        url = self._stack.enter_context(database(self._server_url, name))
        apart(lambda: _prepare(url, prepare))
        # One connection that somebody forgot, and it could not be cloned.
        closing = f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'"
        apart(lambda: _execute(self._server_url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false", closing))
        return name


@contextmanager
def database(server_url: str, name: str, template: str = "template0") -> Iterator[str]:
    """The URL of a new database, cloned from `template`; dropped afterwards, whoever is still connected."""
    apart(lambda: _create(server_url, name, template))
    try:
        yield make_url(server_url).set(drivername="postgresql", database=name).render_as_string(hide_password=False)
    finally:
        apart(lambda: _execute(server_url, f"DROP DATABASE {name} WITH (FORCE)"))


def empty_redis(url: str) -> None:
    """Remove every key of that Redis database. Raises ConfigurationError where it does not answer."""
    try:
        with connect_sync(url) as client:
            client.flushdb()
    except redis.ResponseError as error:
        raise ConfigurationError(
            f"{REDIS_VARIABLE}: {error}. Each process of pytest-xdist takes a database of its own: run fewer "
            "(-n), let that Redis have more (databases), or unset both variables"
        ) from None
    except redis.ConnectionError as error:
        raise ConfigurationError(
            f"{REDIS_VARIABLE} does not answer ({error}): start it, or unset both variables"
        ) from None


def apart(work: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """Run a coroutine in a thread of its own: the caller's may have an event loop that is not ours to touch."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(work())).result()


async def _prepare(url: str, prepare: Prepare) -> None:
    done = prepare(url)
    if inspect.isawaitable(done):
        await done
    # After the application's own migrations, which may have made jobq's tables too: then there is nothing to do.
    engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"), poolclass=NullPool)
    await migrate.upgrade(engine)


async def _create(server_url: str, name: str, template: str) -> None:
    # Half the time of the default strategy; PostgreSQL 14 knows no other.
    async with _connection(server_url) as connection:
        strategy = " STRATEGY file_copy" if connection.get_server_version() >= (15,) else ""
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}{strategy}")


async def _execute(server_url: str, *statements: str) -> None:
    async with _connection(server_url) as connection:
        for statement in statements:
            await connection.execute(statement)


@asynccontextmanager
async def _connection(server_url: str) -> AsyncIterator[asyncpg.Connection]:
    url = make_url(server_url).set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        connection = await asyncpg.connect(url)
    except OSError as error:
        raise ConfigurationError(
            f"{DATABASE_VARIABLE} does not answer ({error}): start it, or unset both variables"
        ) from None
    try:
        yield connection
    finally:
        await connection.close()


def _own_redis_database(url: str, process: str) -> str:
    """The URL with the number of this process of pytest-xdist, `gw3`, added to that of its database."""
    number = int(process.removeprefix("gw")) if process.startswith("gw") else 0
    if number == 0:
        return url
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    path = parts.path.strip("/") if parts.scheme != "unix" else ""
    base = int(query.pop("db", [path or "0"])[0])
    words = [f"{name}={value}" for name, values in query.items() for value in values]
    return f"{url.partition('?')[0]}?{'&'.join([*words, f'db={base + number}'])}"
