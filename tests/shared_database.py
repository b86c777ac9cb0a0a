"""One database for many tests, made clean for each: creating one takes longer than most tests of the worker.

Invariant: a test finds no rows, no tables but jobq's, and nobody else connected. A test that changes jobq's own
tables asks for `database_url` instead. Folders take the fixtures into their conftest.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest

from jobq.testing.servers import ServerUrls, database
from tests.secrets import with_password

_CLEAN = """
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid();
    DROP SCHEMA public CASCADE;
    CREATE SCHEMA public;
    DELETE FROM jobq.outbox;
    DELETE FROM jobq.dead;
    DELETE FROM jobq.step;
    DELETE FROM jobq.idempotency_key;
"""


@pytest.fixture(scope="session")
def shared_database(servers: ServerUrls, template_database: str) -> Iterator[str]:
    with database(servers.database_url, f"jobq_shared_{uuid4().hex}", template_database) as url:
        yield url


@pytest.fixture
def shared_database_url(shared_database: str) -> str:
    """The URL of a migrated database with nothing in it. Synchronous, for synchronous tests ask for it too."""
    clean(shared_database)
    return with_password(shared_database)


def clean(url: str) -> None:
    """Remove everything but jobq's own tables, and whoever is connected."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(_CLEAN)
