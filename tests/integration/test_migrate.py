"""jobq.migrate: revisions applied, taken back and checked on a real PostgreSQL."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import anyio
import asyncpg
import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from jobq import migrate
from jobq.errors import ConfigurationError, SchemaMismatch
from jobq.outbox.database import Database
from tests.waiting import until

ROOT = Path(__file__).parents[2]
JOB = (
    "id generation queue task args priority run_at attempts crashes max_attempts timeout_s created_at headers"
    " error_type last_error"
)
TABLES = {
    "outbox": f"{JOB} xid",
    "idempotency_key": "scope key job_id expires_at",
    "step": "job_id name result created_at",
    "dead": f"{JOB} reason died_at",
    "meta": "only_row database_id",
    "alembic_version": "version_num",
}
NEXT_REVISION = '''"""A later revision."""

from alembic import op

revision = "jobq_0003"
down_revision = "jobq_0002"
branch_labels = None
depends_on = None

DROPS = ()


def upgrade():
    schema = op.get_context().version_table_schema
    op.execute(f"CREATE TABLE {{schema}}.later (id int)")
    {upgrade}


def downgrade():
    op.execute(f"DROP TABLE {{op.get_context().version_table_schema}}.later")
'''


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    database = Database.of(database_url)
    yield database.engine
    await database.close()


@pytest.fixture
async def empty(connection: asyncpg.Connection) -> None:
    """A database that jobq never saw."""
    await connection.execute("DROP SCHEMA jobq CASCADE")


@pytest.fixture
def next_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a release with one more revision, which ends with the given lines."""

    def make(upgrade: str = "") -> None:
        folder = tmp_path / "migrations"
        shutil.copytree(ROOT / "migrations", folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "versions" / "jobq_0003_later.py").write_text(NEXT_REVISION.format(upgrade=upgrade))
        monkeypatch.setattr(migrate.versions, "scripts", lambda: folder)

    return make


@asynccontextmanager
async def with_engine(url: str, **options: object) -> AsyncIterator[AsyncEngine]:
    """An engine as an application makes one."""
    engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"), **options)
    yield engine
    await engine.dispose()


async def tables(connection: asyncpg.Connection, schema: str = "jobq") -> dict[str, str]:
    rows = await connection.fetch(
        "SELECT table_name, string_agg(column_name, ' ' ORDER BY ordinal_position) AS columns"
        " FROM information_schema.columns WHERE table_schema = $1 GROUP BY 1",
        schema,
    )
    return {row["table_name"]: row["columns"] for row in rows}


async def insert(connection: asyncpg.Connection, **columns: object) -> asyncpg.Record:
    """Insert a job as another language would: with what has no default, and `columns`."""
    values = {"id": uuid4(), "queue": "default", "task": "t", "args": "{}", **columns}
    places = ", ".join(f"${number}" for number in range(1, len(values) + 1))
    return await connection.fetchrow(
        f"INSERT INTO jobq.outbox ({', '.join(values)}) VALUES ({places}) RETURNING *", *values.values()
    )


# The tables


@pytest.mark.usefixtures("empty")
async def test_upgrade_makes_the_tables_in_a_database_that_has_none(engine, connection):
    await migrate.upgrade(engine)

    assert await tables(connection) == TABLES
    assert await migrate.current(engine) == migrate.heads()[0]


async def test_a_job_needs_no_more_than_id_queue_task_and_arguments(connection):
    async with connection.transaction():
        row = await insert(connection)
        now, xid = await connection.fetchrow("SELECT now(), pg_current_xact_id()")

    given = {"id", "queue", "task", "args"}
    assert {name: value for name, value in row.items() if name not in given} == {
        "generation": 1,
        "priority": 2,
        "run_at": None,
        "attempts": 0,
        "crashes": 0,
        "max_attempts": None,
        "timeout_s": None,
        "created_at": now,
        "headers": None,
        "error_type": None,
        "last_error": None,
        "xid": xid,
    }


@pytest.mark.parametrize(
    ("constraint", "columns"),
    [
        ("outbox_queue_is_a_name", {"queue": "Mail"}),
        ("outbox_queue_is_a_name", {"queue": ""}),
        ("outbox_queue_is_a_name", {"queue": "q" * 65}),
        ("outbox_queue_is_a_name", {"queue": "mail\n"}),
        ("outbox_args_are_an_object", {"args": "[1]"}),
        ("outbox_args_are_at_most_1_mib", {"args": '{"a":"' + "x" * (2**20 - 7) + '"}'}),
        ("outbox_priority_is_1_to_4", {"priority": 0}),
        ("outbox_priority_is_1_to_4", {"priority": 5}),
        ("outbox_timeout_is_positive", {"timeout_s": 0.0}),
        ("outbox_timeout_is_positive", {"timeout_s": float("nan")}),
        ("outbox_timeout_is_positive", {"timeout_s": float("inf")}),
        ("outbox_id_is_not_nil", {"id": UUID(int=0)}),
        ("outbox_task_is_a_name", {"task": ""}),
        ("outbox_task_is_a_name", {"task": "t" * 129}),
        ("outbox_run_at_is_in_the_years_1_to_9999", {"run_at": datetime.min.replace(tzinfo=UTC)}),
        ("outbox_run_at_is_in_the_years_1_to_9999", {"run_at": datetime.max.replace(tzinfo=UTC)}),
        ("outbox_headers_are_an_object", {"headers": '["a"]'}),
        ("outbox_headers_are_at_most_2_mib", {"headers": '{"a":"' + "x" * (2**21 - 7) + '"}'}),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_the_outbox_refuses_what_no_release_could_run(connection, constraint, columns):
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await insert(connection, **columns)

    assert refused.value.constraint_name == constraint


async def test_the_outbox_takes_what_lies_just_inside_its_limits(connection):
    await insert(connection, queue="a-z.0_9" + "q" * 57, priority=1, timeout_s=0.001)
    await insert(connection, args='{"a":"' + "x" * (2**20 - 8) + '"}', priority=4)
    await insert(connection, task="t" * 128, headers='{"a":"' + "x" * (2**21 - 8) + '"}')
    await insert(connection, run_at=datetime(9999, 12, 30, tzinfo=UTC))


async def test_the_database_has_one_identity_which_upgrades_keep(engine, connection):
    identity = await connection.fetchval("SELECT database_id FROM jobq.meta")

    await migrate.upgrade(engine)

    assert isinstance(identity, UUID)
    assert await connection.fetch("SELECT database_id FROM jobq.meta") == [(identity,)]
    for only_row in (True, False):
        with pytest.raises(asyncpg.IntegrityConstraintViolationError):
            await connection.execute("INSERT INTO jobq.meta (only_row) VALUES ($1)", only_row)


async def test_a_dead_job_has_one_of_four_reasons(connection):
    bury = (
        "INSERT INTO jobq.dead"
        " (id, generation, queue, task, args, priority, attempts, crashes, created_at, reason)"
        " VALUES (gen_random_uuid(), 1, 'q', 't', '{}', 2, 0, 0, now(), $1)"
    )
    for reason in ("exhausted", "rejected", "poison", "invalid"):
        await connection.execute(bury, reason)

    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(bury, "other")


async def test_each_insert_pays_for_three_indexes_of_the_outbox_and_vacuum_does_not_wait(connection):
    indexes = await connection.fetch(
        "SELECT indexdef FROM pg_indexes WHERE schemaname = 'jobq' AND tablename = 'outbox' ORDER BY 1"
    )
    options = await connection.fetchval("SELECT reloptions FROM pg_class WHERE oid = 'jobq.outbox'::regclass")

    assert [row["indexdef"].partition("USING ")[2] for row in indexes] == [
        "btree (run_at) WHERE (run_at IS NOT NULL)",
        "btree (xid)",
        "btree (id)",
    ]
    assert {"autovacuum_vacuum_scale_factor=0", "autovacuum_vacuum_cost_delay=0"} <= set(options)


# The way between revisions


async def test_downgrade_and_upgrade_make_the_same_tables_with_a_new_identity(engine, connection):
    identity = await connection.fetchval("SELECT database_id FROM jobq.meta")

    await migrate.downgrade(engine, "base")
    assert await tables(connection) == {}
    assert await migrate.current(engine) is None

    await migrate.upgrade(engine, "jobq_0002")
    assert await tables(connection) == TABLES
    assert await connection.fetchval("SELECT database_id FROM jobq.meta") != identity


async def test_downgrade_leaves_what_it_did_not_make(engine, connection):
    await connection.execute("CREATE TABLE jobq.mine ()")

    await migrate.downgrade(engine, "base")

    assert await connection.fetchval("SELECT to_regclass('jobq.mine')") is not None


async def test_losses_counts_the_rows_that_a_downgrade_drops(engine, connection):
    await insert(connection)

    nothing = await migrate.losses(engine, "head")
    everything = await migrate.losses(engine, "base")

    assert nothing == {}
    assert everything == {"outbox": 1, "idempotency_key": 0, "step": 0, "dead": 0, "meta": 1}


async def test_upgrade_and_downgrade_stop_at_the_revision_they_are_told(engine, connection, next_revision):
    next_revision()
    await migrate.upgrade(engine, "jobq_0002")
    assert "later" not in await tables(connection)

    await migrate.upgrade(engine)
    assert "later" in await tables(connection)
    await migrate.upgrade(engine, "jobq_0002")
    assert await migrate.current(engine) == "jobq_0003"

    await migrate.downgrade(engine, "jobq_0002")
    assert await tables(connection) == TABLES
    with pytest.raises(ConfigurationError, match="jobq_0002 already, which is before jobq_0003"):
        await migrate.downgrade(engine, "jobq_0003")


async def test_stamp_records_a_revision_and_touches_nothing_else(engine, connection, next_revision):
    next_revision()
    await connection.execute("UPDATE jobq.alembic_version SET version_num = 'jobq_9999'")

    await migrate.stamp(engine, "head")
    assert await migrate.current(engine) == "jobq_0003"
    assert await tables(connection) == TABLES

    await migrate.stamp(engine, "base")
    assert await migrate.current(engine) is None
    assert await tables(connection) == TABLES


@pytest.mark.parametrize("isolation", ["AUTOCOMMIT", "SERIALIZABLE", "READ COMMITTED"])
async def test_a_revision_that_fails_leaves_nothing_whatever_the_engine(
    database_url, connection, next_revision, isolation
):
    next_revision(upgrade='op.execute("SELECT 1 / 0")')
    async with with_engine(database_url, isolation_level=isolation) as engine:
        with pytest.raises(DBAPIError, match="division by zero"):
            await migrate.upgrade(engine)

        assert await migrate.current(engine) == "jobq_0002"
    assert await tables(connection) == TABLES


@pytest.mark.usefixtures("empty")
async def test_revisions_before_one_that_fails_stay_applied(engine, connection, next_revision):
    next_revision(upgrade='op.execute("SELECT 1 / 0")')

    with pytest.raises(DBAPIError, match="division by zero"):
        await migrate.upgrade(engine)

    assert await migrate.current(engine) == "jobq_0002"
    assert await tables(connection) == TABLES


async def test_upgrade_gives_up_a_lock_it_cannot_have_soon_and_leaves_no_trace_in_the_pool(
    database_url, connection, next_revision
):
    next_revision(upgrade='op.execute(f"DROP TABLE {schema}.step")')
    async with with_engine(database_url, pool_size=1, max_overflow=0) as engine:
        async with connection.transaction():
            await connection.execute("SELECT FROM jobq.step")
            with pytest.raises(DBAPIError, match="lock timeout"):
                await migrate.upgrade(engine, lock_timeout=0.05)
        await migrate.upgrade(engine)

        async with engine.connect() as pooled:
            assert (await pooled.exec_driver_sql("SHOW lock_timeout")).scalar() == "0"
    assert await connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


@pytest.mark.usefixtures("empty")
async def test_migrators_at_once_take_turns_even_around_a_concurrent_index(database_url, connection, next_revision):
    next_revision(
        upgrade="with op.get_context().autocommit_block():\n"
        '        op.execute(f"CREATE INDEX CONCURRENTLY later_id ON {schema}.later (id)")'
    )
    async with with_engine(database_url, poolclass=NullPool) as engine:
        await connection.execute("SELECT pg_advisory_lock($1, hashtext('jobq'))", migrate.versions.LOCK)
        async with anyio.create_task_group() as migrators:
            for _ in range(3):
                migrators.start_soon(migrate.upgrade, engine)
            await until(lambda: migrators_at_work(connection, 3), "three migrators wait for the lock")
            await connection.execute("SELECT pg_advisory_unlock_all()")

    assert await tables(connection) == {**TABLES, "later": "id"}


async def migrators_at_work(connection: asyncpg.Connection, number: int) -> bool:
    """Whether so many wait: each asked for the lock, which the test holds, and was refused."""
    return number == await connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'jobq migrate'"
        " AND datname = current_database() AND (query = 'COMMIT;' OR query LIKE '%advisory_lock%')"
    )


@pytest.mark.usefixtures("empty")
async def test_a_role_that_owns_the_schema_needs_no_right_to_create_one(database_url, connection):
    role = f"jobq_test_{uuid4().hex}"
    await connection.execute(f"CREATE ROLE {role}; CREATE SCHEMA jobq AUTHORIZATION {role}")
    try:
        async with with_engine(database_url, connect_args={"server_settings": {"role": role}}) as engine:
            await migrate.upgrade(engine)

        assert await tables(connection) == TABLES
    finally:
        await connection.execute(f"DROP SCHEMA jobq CASCADE; DROP OWNED BY {role}; DROP ROLE {role}")


async def test_two_schemas_of_one_database_know_nothing_of_each_other(engine, connection):
    await migrate.upgrade(engine, schema="order")

    await migrate.downgrade(engine, "base")

    assert await tables(connection, "order") == TABLES
    assert await migrate.current(engine, schema="order") == "jobq_0002"


@pytest.mark.parametrize("name", ["", "Jobq", "1jobq", 'jobq"; DROP', "j" * 64, "jobq\n", "jöbq"])
async def test_a_name_that_is_no_schema_is_refused(engine, name):
    with pytest.raises(ConfigurationError, match="cannot be the schema of jobq"):
        await migrate.upgrade(engine, schema=name)


async def test_an_unknown_revision_is_refused_with_those_there_are(engine):
    with pytest.raises(ConfigurationError, match="no revision 'jobq_7777': there are head, base, jobq_0001, jobq_0002"):
        await migrate.upgrade(engine, "jobq_7777")


# The check at start


async def test_check_passes_when_the_tables_are_those_of_this_release(connection):
    await migrate.check(connection)


@pytest.mark.usefixtures("empty")
async def test_check_says_how_to_make_missing_tables(engine, connection):
    for _ in range(2):
        with pytest.raises(SchemaMismatch, match="are missing in schema 'jobq': run `jobq migrate upgrade`"):
            await migrate.check(connection)
        await migrate.stamp(engine, "base")  # a version table that is there, and empty


async def test_check_says_how_to_bring_up_older_tables(connection, next_revision):
    next_revision()

    with pytest.raises(SchemaMismatch, match="at jobq_0002, not jobq_0003: run `jobq migrate upgrade`"):
        await migrate.check(connection)


async def test_tables_of_a_later_release_are_left_alone(engine, connection):
    await connection.execute("UPDATE jobq.alembic_version SET version_num = 'jobq_9999'")

    for attempt in (
        lambda: migrate.check(connection),
        lambda: migrate.upgrade(engine),
        lambda: migrate.downgrade(engine, "base"),
        lambda: migrate.losses(engine, "base"),
    ):
        with pytest.raises(SchemaMismatch, match="jobq_9999, and this jobq knows jobq_0002 at most"):
            await attempt()
    assert await tables(connection) == TABLES


# What needs no database


async def test_the_statements_do_what_upgrade_and_downgrade_do(engine, connection):
    way_down, way_up, nowhere = migrate.sql("head:base"), migrate.sql(), migrate.sql("head:head")

    await connection.execute(way_down)
    assert await tables(connection) == {}
    await connection.execute(way_up)
    assert await tables(connection) == TABLES
    await migrate.check(connection)
    await migrate.downgrade(engine, "base")
    await connection.execute(way_up)
    assert nowhere == ""


def test_the_statements_of_a_part_of_the_way_do_not_create_the_schema(next_revision):
    next_revision()

    part = migrate.sql("jobq_0002:jobq_0003", schema="other")

    assert "CREATE SCHEMA" not in part
    assert "CREATE TABLE other.later" in part
    assert migrate.sql("jobq_0002") == migrate.sql("base:jobq_0002")


def test_the_names_of_the_files_are_the_chain_that_alembic_sees():
    chain = migrate.history()

    assert [revision.id for revision in chain] == migrate.revisions()
    assert [revision.after for revision in chain] == [None, *migrate.revisions()[:-1]]
    assert migrate.heads() == [chain[-1].id]
    assert chain[0].title == "Create the tables of jobq."


def test_importing_migrate_does_not_load_alembic():
    python("import sys, jobq.migrate; assert not any(name.startswith('alembic') for name in sys.modules)")


def test_every_way_to_install_finds_the_scripts(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    site = tmp_path / "100% site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    with tarfile.open(sdist) as archive:
        # Python 3.11.2 and 3.11.3 know no filters; later ones want one.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (site / "migrations").mkdir()
    (site / "migrations" / "env.py").write_text("raise AssertionError('of another project')")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")

    for path, folder in (
        (site, site / "jobq" / "migrations"),
        (source, source / "migrations"),
        (ROOT, ROOT / "migrations"),
    ):
        found, statements = python(
            "from jobq import migrate; print(migrate.scripts()); print(len(migrate.sql()))", path, tmp_path
        )
        assert Path(found) == folder
        assert int(statements) == len(migrate.sql())


def python(code: str, *paths: Path) -> list[str]:
    """Run code in a new interpreter that finds packages in `paths` first; return the lines it prints."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    cwd = paths[-1] if paths else ROOT
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
