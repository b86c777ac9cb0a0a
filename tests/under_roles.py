"""JOBQ_TEST_ROLES=1: the tests' applications, relays and workers have the rights of docs/roles.md, and no more.

What a test prepares and looks at, it does as the owner; what jobq connects to by the URL of the owner on the servers
of the run, it reaches as `worker` or `relay`, and Redis likewise. Servers that a test starts for itself, and what it
reaches through a proxy, stay as they are. Called by conftest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import asyncpg
import psycopg
from sqlalchemy.engine import make_url

from jobq.broker.client import connect, connect_sync
from jobq.outbox import database, hosts
from jobq.testing.servers import ServerUrls
from tests import commands
from tests.roles import PASSWORD, grants_for, users_of

_MAIN_PATH = """
    enqueue enqueue_many insert idempotency worker executor turns turns_queues settle settler sweeper context steps
    heartbeat burial janitor relay walk timers wake_up leadership push follow browse cli_status cli_jobs cli_dead
    recycling
"""
FILES = frozenset(map("test_{}".format, re.split(r"\s+", _MAIN_PATH.strip())))
"""Tests of the main path. Others migrate, start servers, or look at what an owner sees."""

_ROLE = ContextVar("role", default="worker")
_OF_RELAYS = ("jobq:relay", "jobq:janitor")


@contextmanager
def under_roles(servers: ServerUrls, template: str) -> Iterator[None]:
    """Make the roles and users, and have jobq use them until the end of the block."""
    tag = uuid4().hex[:8]
    names = {role: f"jobq_{role}_{tag}" for role in ("web", "worker", "relay")}
    with psycopg.connect(servers.database_url, autocommit=True) as owner:
        for name in names.values():
            owner.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")
        owner.execute(f"GRANT {names['relay']} TO {names['worker']}")  # for `jobq run`
        owner.execute(f"ALTER DATABASE {template} ALLOW_CONNECTIONS true")
        url = make_url(servers.database_url).set(database=template).render_as_string(hide_password=False)
        with psycopg.connect(url, autocommit=True) as inside:
            inside.execute(grants_for(names))
            for kind in ("TABLES", "SEQUENCES", "SCHEMAS"):  # of the tests
                inside.execute(f"ALTER DEFAULT PRIVILEGES GRANT ALL ON {kind} TO {', '.join(names.values())}")
        owner.execute(f"ALTER DATABASE {template} ALLOW_CONNECTIONS false")
    host = make_url(servers.database_url).query.get("host") or make_url(servers.database_url).host

    def as_role(given: str, role: str) -> str:
        parsed = make_url(given)
        if (parsed.query.get("host") or parsed.host) != host or parsed.username in names.values():
            return given
        return parsed.set(username=names[role], password=PASSWORD).render_as_string(hide_password=False)

    with users_of(servers.redis_url) as users:

        def as_user(given: str, user: str) -> str:
            if not given.startswith(servers.redis_url):
                return given
            return users.urls[user] + given.removeprefix(servers.redis_url)

        def in_process(args: tuple[str, ...], env: dict[str, str]) -> dict[str, str]:
            role = "relay" if args[:1] == ("relay",) else "worker"
            changed = dict(env)
            if args[:1] in (("relay",), ("worker",)):
                changed["JOBQ_REDIS_URL"] = as_user(env["JOBQ_REDIS_URL"], role) if "JOBQ_REDIS_URL" in env else ""
            if args[:1] in (("relay",), ("worker",), ("run",)) and "JOBQ_DATABASE_URL" in env:
                changed["JOBQ_DATABASE_URL"] = as_role(env["JOBQ_DATABASE_URL"], role)
            return {name: value for name, value in changed.items() if value}

        with (
            patch.object(hosts, "asyncpg", _Driver(as_role)),
            patch.object(database.Database, "connect", _connect(database.Database.connect)),
            patch("jobq.worker.worker.connect", lambda url: connect(as_user(url, "worker"))),
            patch("jobq.worker.heartbeat.connect_sync", lambda url: connect_sync(as_user(url, "worker"))),
            patch("jobq.relay.leadership.connect", lambda url: connect(as_user(url, "relay"))),
            patch.object(commands, "environment_of", in_process),
        ):
            yield


class _Driver:
    """asyncpg, as `jobq.outbox.hosts` has it, connecting as a role."""

    def __init__(self, as_role: Callable[[str, str], str]):
        self._as_role = as_role

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncpg, name)

    def connect(self, url: str, **options: Any) -> Any:
        return asyncpg.connect(self._as_role(url, _ROLE.get()), **options)


def _connect(original: Callable[..., Any]) -> Callable[..., Any]:
    async def connect(self: database.Database, *, name: str, **options: Any) -> Any:
        token = _ROLE.set("relay" if name in _OF_RELAYS else "worker")
        try:
            return await original(self, name=name, **options)
        finally:
            _ROLE.reset(token)

    return connect
