"""What every test may ask for: real servers, a migrated database of its own, an empty Redis.

All of it comes from jobq's own pytest plugin; here it has the short names that the tests use.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from jobq.testing.servers import ServerUrls, Templates
from jobq_pytest import nothing
from tests.leaks import Surroundings
from tests.secrets import watched, with_password
from tests.under_roles import FILES, under_roles

UNDER_ROLES = bool(os.environ.get("JOBQ_TEST_ROLES"))

# A run in the background of a script ignores Ctrl-C, and so would every process that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With JOBQ_TEST_ROLES=1 only the tests of the main path are run."""
    if UNDER_ROLES:
        items[:] = [item for item in items if item.path.stem in FILES]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail the test that leaves something behind, not those after it. It is made first, so it looks last."""
    before = Surroundings.now()
    yield
    assert before.left_behind() == []


@pytest.fixture(autouse=True)
def _no_secret_logged() -> Iterator[None]:
    """Fail the test in which the package logs a password or an argument that tests have planted."""
    with watched() as watch:
        yield
    assert watch.leaks == []


@pytest.fixture(scope="session")
def servers(jobq_servers: ServerUrls) -> ServerUrls:
    """Both servers, for reading URLs. A test that stops or kills a server starts one of its own."""
    return jobq_servers


@pytest.fixture(scope="session")
def template_database(jobq_templates: Templates) -> str:
    """The name of a migrated database to clone."""
    return jobq_templates.name(nothing)


@pytest.fixture(scope="session", autouse=UNDER_ROLES)
def _under_roles(servers: ServerUrls, template_database: str) -> Iterator[None]:
    """With JOBQ_TEST_ROLES=1 jobq has the rights of docs/roles.md in every test."""
    with under_roles(servers, template_database):
        yield


@pytest.fixture
def database_url(jobq_database_url: str) -> str:
    """The URL of a fresh, migrated database that only this test uses. Its password is one to be kept out of logs."""
    return with_password(jobq_database_url)


@pytest.fixture
def redis_url(jobq_redis_url: str) -> str:
    """The URL of a Redis that holds nothing; emptied again after the test."""
    return jobq_redis_url
