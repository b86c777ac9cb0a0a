"""What every test may ask for: real servers, a migrated database of its own, an empty Redis.

The servers are private children of the test run, or those that JOBQ_TEST_DATABASE_URL and JOBQ_TEST_REDIS_URL
name.
Invariant: a missing server fails the tests and says what to do; it never skips them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import uuid4

import asyncpg
import pytest
import redis
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

import jobq.migrate
from jobq import embedded
from jobq.errors import ConfigurationError

# A run in the background of a script ignores Ctrl-C, and so would every process that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DATABASE_VARIABLE = "JOBQ_TEST_DATABASE_URL"
REDIS_VARIABLE = "JOBQ_TEST_REDIS_URL"


@dataclass(frozen=True, slots=True)
class OwnServers:
    """Servers that the environment names."""

    database_url: str
    redis_url: str


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def servers() -> Iterator[embedded.Servers | OwnServers]:
    """Both servers, for reading URLs. A test that stops or kills a server starts one of its own."""
    named = [os.environ[name] for name in (DATABASE_VARIABLE, REDIS_VARIABLE) if os.environ.get(name)]
    if len(named) == 1:
        pytest.fail(f"Set both {DATABASE_VARIABLE} and {REDIS_VARIABLE}, or neither.")
    if named:
        yield OwnServers(*named)
        return
    try:
        started = embedded.start()
    except ConfigurationError as error:
        pytest.fail(f"{error} For the tests: {DATABASE_VARIABLE} and {REDIS_VARIABLE}.")
    with started:
        yield started


@pytest.fixture(scope="session")
async def template_database(servers: embedded.Servers | OwnServers, anyio_backend: str) -> AsyncIterator[str]:
    """The name of a migrated database to clone; a migration per test would take most of its time."""
    name = f"jobq_template_{uuid4().hex}"
    async with _database(servers.database_url, name) as url:
        engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"))
        await jobq.migrate.upgrade(engine, schema="jobq")
        await engine.dispose()  # a database with connections cannot be cloned
        yield name


@pytest.fixture
async def database_url(
    servers: embedded.Servers | OwnServers, template_database: str, anyio_backend: str
) -> AsyncIterator[str]:
    """The URL of a fresh, migrated database that only this test uses."""
    async with _database(servers.database_url, f"jobq_test_{uuid4().hex}", template_database) as url:
        yield url


@pytest.fixture
def redis_url(servers: embedded.Servers | OwnServers) -> Iterator[str]:
    """The URL of a Redis that holds nothing; emptied again after the test."""
    try:
        _flush(servers.redis_url)
    except redis.ConnectionError as error:
        pytest.fail(f"{REDIS_VARIABLE} does not answer ({error}): start it, or unset both variables.")
    yield servers.redis_url
    _flush(servers.redis_url)


@asynccontextmanager
async def _database(server_url: str, name: str, template: str = "template0") -> AsyncIterator[str]:
    """Create a database, and drop it afterwards whoever is still connected."""
    url = make_url(server_url).set(drivername="postgresql")
    await _execute(url.render_as_string(hide_password=False), f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield url.set(database=name).render_as_string(hide_password=False)
    finally:
        await _execute(url.render_as_string(hide_password=False), f"DROP DATABASE {name} WITH (FORCE)")


async def _execute(url: str, statement: str) -> None:
    try:
        connection = await asyncpg.connect(url)
    except OSError as error:
        pytest.fail(f"{DATABASE_VARIABLE} does not answer ({error}): start it, or unset both variables.")
    try:
        # Half the time of the default strategy; PostgreSQL 14 knows no other.
        copies_files = " STRATEGY file_copy" if connection.get_server_version() >= (15,) else ""
        await connection.execute(statement + (copies_files if statement.startswith("CREATE") else ""))
    finally:
        await connection.close()


def _flush(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.flushall()
