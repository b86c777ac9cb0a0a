"""The roles and users of docs/roles.md, made for a test, under names of their own and with URLs for them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import asyncpg
from sqlalchemy.engine import make_url

from jobq.broker.client import connect_sync
from tests.markdown import blocks
from tests.secrets import ROLE_PASSWORD as PASSWORD

PAGE = Path(__file__).parents[1] / "docs" / "roles.md"
ROLES = ("web", "worker", "relay")
USERS = ("relay", "worker", "status")


@dataclass(frozen=True)
class Names:
    """The name of each role or user, and the URL with which it connects."""

    names: dict[str, str]
    urls: dict[str, str]


def grants_for(names: dict[str, str]) -> str:
    """The grants of the page, for roles of these names."""
    (block,) = blocks(PAGE, "sql")
    return re.sub(r"\bshop_(\w+)", lambda match: names[match[1]], block.text)


@asynccontextmanager
async def roles_of(database_url: str) -> AsyncIterator[Names]:
    """The roles of the page, with its grants in this database; dropped afterwards."""
    tag = uuid4().hex[:8]
    names = {role: f"jobq_{role}_{tag}" for role in ROLES}
    owner = await asyncpg.connect(database_url)
    for name in names.values():
        await owner.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")
    try:
        await owner.execute(grants_for(names))
        url = make_url(database_url)
        yield Names(
            names,
            {
                role: url.set(username=name, password=PASSWORD).render_as_string(hide_password=False)
                for role, name in names.items()
            },
        )
    finally:
        for name in names.values():
            await owner.execute(f"DROP OWNED BY {name}")
            await owner.execute(f"DROP ROLE {name}")
        await owner.close()


def rules_of_users() -> dict[str, list[str]]:
    """What the page gives to each user of Redis, after its password."""
    (block,) = (block for block in blocks(PAGE, "") if "ACL SETUSER" in block.text)
    lines = [line.split() for line in block.text.splitlines()]
    return {words[2].removeprefix("jobq_"): words[5:] for words in lines}


@contextmanager
def users_of(redis_url: str) -> Iterator[Names]:
    """The users of the page; removed afterwards."""
    tag = uuid4().hex[:8]
    names = {user: f"jobq_{user}_{tag}" for user in USERS}
    with connect_sync(redis_url) as client:
        for user, rules in rules_of_users().items():
            client.execute_command("ACL", "SETUSER", names[user], "on", f">{PASSWORD}", *rules)
        try:
            yield Names(
                names,
                {user: redis_url.replace("://", f"://{name}:{PASSWORD}@", 1) for user, name in names.items()},
            )
        finally:
            client.execute_command("ACL", "DELUSER", *names.values())
