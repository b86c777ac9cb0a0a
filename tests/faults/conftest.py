"""What the tests of this folder may ask for beside the fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from uuid import uuid4

import psycopg
import pytest

from jobq.testing.servers import ServerUrls, database
from tests.faults.connections import FAULTS
from tests.shared_database import clean, shared_database, shared_database_url

__all__ = ["shared_database", "shared_database_url"]


@pytest.fixture(scope="session")
def shared_databases(servers: ServerUrls, template_database: str) -> Iterator[list[str]]:
    with ExitStack() as stack:
        urls = [
            stack.enter_context(database(servers.database_url, f"jobq_shared_{uuid4().hex}", template_database))
            for _ in FAULTS
        ]
        for url in urls:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("UPDATE jobq.meta SET database_id = gen_random_uuid()")
        yield urls


@pytest.fixture
def database_urls(shared_databases: list[str]) -> list[str]:
    """The URLs of migrated databases with nothing in them, one for each fault; they may share a Redis."""
    for url in shared_databases:
        clean(url)
    return shared_databases
