"""The pytest plugin of jobq: real servers, and a migrated database for each test, for those that ask.

Outside the package, so that it costs a test run nothing: pytest loads it everywhere jobq is installed. Invariant:
nothing is imported or started before a fixture is asked for. All fixtures are synchronous, so that they serve
anyio, pytest-asyncio and synchronous tests alike. Called by pytest. Calls jobq.testing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from jobq.testing import Crashes
    from jobq.testing.servers import Prepare, ServerUrls, Templates


@pytest.fixture(scope="session")
def jobq_servers() -> Iterator[ServerUrls]:
    """PostgreSQL and Valkey for this run: private ones, or those of JOBQ_TEST_DATABASE_URL and JOBQ_TEST_REDIS_URL."""
    from jobq.testing.servers import servers

    with failures_explained(), servers() as urls:
        yield urls


@pytest.fixture(scope="session")
def jobq_templates(jobq_servers: ServerUrls) -> Iterator[Templates]:
    """The databases that tests get copies of, by the function that prepared them."""
    from jobq.testing.servers import Templates

    with failures_explained(), Templates.on(jobq_servers.database_url) as templates:
        yield templates


@pytest.fixture(scope="session")
def jobq_prepare() -> Prepare:
    """Override it to have your own tables: return a function, async or not, of the URL of a new database."""
    return nothing


@pytest.fixture
def jobq_database_url(jobq_servers: ServerUrls, jobq_templates: Templates, jobq_prepare: Prepare) -> Iterator[str]:
    """The postgresql:// URL of a database that only this test uses, with jobq's tables and yours; dropped after it."""
    from jobq.testing.servers import database

    with failures_explained():
        template = jobq_templates.name(jobq_prepare)
        with database(jobq_servers.database_url, f"jobq_test_{uuid4().hex}", template) as url:
            yield url


@pytest.fixture
def jobq_engine(jobq_database_url: str) -> AsyncEngine:
    """An AsyncEngine on that database. It keeps no connections, so there is nothing to dispose of."""
    from sqlalchemy import make_url
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    return create_async_engine(make_url(jobq_database_url).set(drivername="postgresql+asyncpg"), poolclass=NullPool)


@pytest.fixture
def jobq_redis_url(jobq_servers: ServerUrls) -> Iterator[str]:
    """The URL of a Redis that holds nothing; emptied again after the test."""
    from jobq.testing.servers import empty_redis

    with failures_explained():
        empty_redis(jobq_servers.redis_url)
    yield jobq_servers.redis_url
    empty_redis(jobq_servers.redis_url)


@pytest.fixture
def jobq_crashes(jobq_redis_url: str) -> Callable[..., Crashes]:
    """`async with jobq_crashes(jobs) as crashes:` is jobq.testing.Crashes on the Redis of this test."""
    from functools import partial

    from jobq.testing import Crashes

    return partial(Crashes, redis=jobq_redis_url)


@contextmanager
def failures_explained() -> Iterator[None]:
    """One sentence instead of a traceback where the set-up is wrong."""
    from jobq import ConfigurationError

    try:
        yield
    except ConfigurationError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


def nothing(url: str) -> None:
    """jobq's own tables are enough."""
