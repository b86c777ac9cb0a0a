"""The grants of docs/roles.md: each role can do its work with them, needs every one of them, and can do no more.

Statements are only planned here, by EXPLAIN, which asks for the same rights as running them.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import asyncpg
import pytest

from jobq.outbox.statement import Statement
from tests.roles import ROLES, Names, roles_of

SQL = Path(__file__).parents[2] / "jobq" / "outbox" / "sql"
RUNS = {
    "web": "enqueue enqueue_plain enqueue_alike lock_keys enqueue_many enqueue_many_renamed",
    "worker": """
        read complete_one same_transaction complete reschedule bury crash generations end_backends
        recall record enqueue enqueue_plain enqueue_alike lock_keys enqueue_many enqueue_many_renamed
        cancel find_jobs count_jobs count_dead pages leader list_jobs list_delayed show_job run_now
        list_dead show_dead retry_dead discard_dead
        clock connections idle_slots logged prepared server snapshot_holders table_lockers vacuums wake_holders
    """,
    "relay": """
        keep_alive snapshot poll timers clock page reread try_lock unlock end_leader
        begin_tidy tidy_keys tidy_steps tidy_dead
    """,
}
OF_TESTS = {"next_job", "pass_time", "see_jobs"}
"""What only jobq.testing asks."""
BESIDE_FILES = {
    "web": ["INSERT INTO jobq.outbox (id, queue, task, args) VALUES (NULL, '', '', '{}') RETURNING id"],
    "worker": ["SELECT database_id FROM jobq.meta", "SELECT version_num FROM jobq.alembic_version"],
    "relay": ["SELECT database_id FROM jobq.meta", "SELECT version_num FROM jobq.alembic_version"],
}
GRANTED = """
    SELECT 'SCHEMA jobq' AS thing, privilege_type AS privilege, NULL AS field
    FROM pg_namespace, aclexplode(nspacl) WHERE nspname = 'jobq' AND grantee = CAST($1 AS text)::regrole
    UNION ALL
    SELECT 'jobq.' || relname, privilege_type, NULL
    FROM pg_class, aclexplode(relacl)
    WHERE relnamespace = 'jobq'::regnamespace AND grantee = CAST($1 AS text)::regrole
    UNION ALL
    SELECT 'jobq.' || relname, privilege_type, attname
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid, aclexplode(attacl)
    WHERE relnamespace = 'jobq'::regnamespace AND grantee = CAST($1 AS text)::regrole
"""
REFUSED = {
    "web": [
        "SELECT args FROM jobq.outbox",
        "SELECT last_error FROM jobq.dead",
        "SELECT * FROM jobq.step",
        "DELETE FROM jobq.outbox",
        "DELETE FROM jobq.idempotency_key",
        "UPDATE jobq.outbox SET queue = 'other'",
        "INSERT INTO jobq.outbox (id, queue, task, args, generation) VALUES (NULL, '', '', '{}', 7)",
        "INSERT INTO jobq.outbox (id, queue, task, args, xid) VALUES (NULL, '', '', '{}', '1')",
        "INSERT INTO jobq.dead SELECT * FROM jobq.dead",
        "UPDATE jobq.alembic_version SET version_num = ''",
        "TRUNCATE jobq.outbox",
        "CREATE TABLE jobq.mine ()",
    ],
    "worker": [
        "DELETE FROM jobq.step",
        "DELETE FROM jobq.idempotency_key",
        "UPDATE jobq.meta SET database_id = gen_random_uuid()",
        "UPDATE jobq.alembic_version SET version_num = ''",
        "TRUNCATE jobq.outbox",
        "DROP TABLE jobq.outbox",
        "ALTER TABLE jobq.outbox DISABLE TRIGGER ALL",
    ],
    "relay": [
        "SELECT args FROM jobq.outbox",
        "SELECT headers FROM jobq.outbox",
        "SELECT last_error FROM jobq.outbox",
        "SELECT task FROM jobq.outbox",
        "SELECT args FROM jobq.dead",
        "SELECT result FROM jobq.step",
        "INSERT INTO jobq.outbox (id, queue, task, args) VALUES (NULL, '', '', '{}')",
        "UPDATE jobq.outbox SET run_at = NULL",
        "DELETE FROM jobq.outbox",
        "UPDATE jobq.dead SET args = '{}'",
        "UPDATE jobq.meta SET database_id = gen_random_uuid()",
    ],
}


class Examination:
    """One role, as the owner can try it: what it would be refused now."""

    def __init__(self, owner: asyncpg.Connection, role: str):
        self._owner = owner
        self._role = role

    async def refused(self, statements: Iterable[str]) -> list[str]:
        """Those of the statements that need a right which the role lacks."""
        found = []
        for statement in statements:
            attempt = self._owner.transaction()
            await attempt.start()
            try:
                await self._owner.execute(f"SET LOCAL ROLE {self._role}")
                await self._owner.execute(statement)
            except asyncpg.InsufficientPrivilegeError:
                found.append(statement)
            finally:
                await attempt.rollback()
        return found

    async def granted(self) -> list[tuple[str, str]]:
        """Its rights, each with the statement that takes it away."""
        rows = await self._owner.fetch(GRANTED, self._role)
        return [
            (
                f"{row['privilege']} {row['thing']} {row['field'] or ''}".strip(),
                f"REVOKE {row['privilege']} {'({})'.format(row['field']) if row['field'] else ''} "
                f"ON {row['thing']} FROM {self._role}",
            )
            for row in rows
        ]


@pytest.fixture
async def owner(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def roles(database_url: str) -> AsyncIterator[Names]:
    async with roles_of(database_url) as names:
        yield names


def planned(role: str) -> list[str]:
    """Everything that jobq runs as this role, with nothing for the parameters."""
    texts = [*(Statement(name).text("jobq") for name in RUNS[role].split()), *BESIDE_FILES[role]]
    return ["EXPLAIN " + re.sub(r"(?<![:\w]):[a-z_]+", "NULL", text) for text in texts]


def test_every_statement_is_run_by_a_role() -> None:
    run = {name for names in RUNS.values() for name in names.split()}

    assert run | OF_TESTS == {file.stem for file in SQL.glob("*.sql")}


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_has_every_right_that_its_statements_need(
    owner: asyncpg.Connection, roles: Names, role: str
) -> None:
    assert await Examination(owner, roles.names[role]).refused(planned(role)) == []


@pytest.mark.parametrize("role", ROLES)
async def test_without_any_one_of_its_rights_a_role_cannot_do_its_work(
    owner: asyncpg.Connection, roles: Names, role: str
) -> None:
    examination = Examination(owner, roles.names[role])
    rights = await examination.granted()
    needless = []
    for right, revoke in rights:
        attempt = owner.transaction()
        await attempt.start()
        await owner.execute(revoke)
        if not await examination.refused(planned(role)):
            needless.append(right)
        await attempt.rollback()

    assert len(rights) > 5
    assert needless == []


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_is_refused_what_is_not_its_work(owner: asyncpg.Connection, roles: Names, role: str) -> None:
    assert await Examination(owner, roles.names[role]).refused(REFUSED[role]) == REFUSED[role]
