"""jobq's tables in an application's own alembic chain: real chains, made, run and taken back by alembic itself."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.config import main as alembic
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from click.testing import CliRunner, Result
from sqlalchemy import create_engine, inspect
from sqlalchemy.engine import make_url

from jobq import migrate
from jobq.cli import cli
from jobq.errors import ConfigurationError, SchemaMismatch
from tests.leaks import logging_kept

ROOT = Path(__file__).parents[2]
HEAD = migrate.heads()[0]
NEXT = f"jobq_{int(HEAD[-4:]) + 1:04}"
MODELS = """
from sqlalchemy import MetaData, Table, Column, Integer
metadata = MetaData()
Table("orders", metadata, Column("id", Integer, primary_key=True))
"""
NEXT_REVISION = f'''"""A later revision."""
from alembic import op
revision, down_revision, branch_labels, depends_on = "{NEXT}", "{HEAD}", None, None
DROPS = ("later",)
def upgrade():
    op.execute("CREATE TABLE " + op.get_context().version_table_schema + ".later (id int)")
    {{more}}
def downgrade():
    op.drop_table("later", schema=op.get_context().version_table_schema)
'''


class Chain:
    """A project with an alembic chain of its own, on this test's database."""

    def __init__(self, folder: Path, url: str):
        self.folder = folder
        self.url = url
        self.env = folder / "migrations" / "env.py"

    def init(self, *, template: str = "generic", driver: str = "psycopg") -> None:
        """What a user does: alembic init, the URL, the models."""
        self.alembic("init", "-t", template, "migrations")
        url = make_url(self.url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
        ini = self.folder / "alembic.ini"
        ini.write_text(ini.read_text().replace("driver://user:pass@localhost/dbname", url.replace("%", "%%")))
        (self.folder / "chain_models.py").write_text(MODELS)
        if template != "multidb":
            self.edit_env("target_metadata = None", "from chain_models import metadata as target_metadata")

    def edit_env(self, old: str, new: str) -> None:
        text = self.env.read_text()
        assert old in text
        self.env.write_text(text.replace(old, new))

    def look_at_every_schema(self) -> None:
        self.edit_env("from alembic import context", "from alembic import context\nfrom jobq import migrate")
        self.edit_env(
            "target_metadata=target_metadata",
            "target_metadata=target_metadata, include_schemas=True, include_name=migrate.include_name",
        )

    def alembic(self, *args: str) -> None:
        alembic(argv=["--raiseerr", *args], prog="alembic")

    def jobq(self, *args: str) -> Result:
        """Run `jobq migrate ...`."""
        return CliRunner().invoke(cli, ["migrate", *args], env={"JOBQ_DATABASE_URL": self.url})

    def write_ours(self) -> Path:
        result = self.jobq("init-alembic")
        assert result.exit_code == 0, result.output
        return Path(result.stdout.strip())

    def revisions(self) -> set[Path]:
        return set((self.folder / "migrations" / "versions").glob("*.py"))

    def tables(self) -> dict[str, list[str]]:
        return tables(self.url)


@pytest.fixture
def empty(database_url: str) -> str:
    """The URL of a database that jobq never saw."""
    with psycopg.connect(database_url) as connection:
        connection.execute("DROP SCHEMA jobq CASCADE")
    return database_url


@pytest.fixture
def chain(empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chain]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with logging_kept():  # an env.py switches every logger off that its alembic.ini does not name
        yield Chain(tmp_path, empty)
    sys.modules.pop("chain_models", None)


@contextmanager
def operations(url: str) -> Iterator[Operations]:
    """What a revision's `op` is, in a transaction that the block's end commits."""
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    try:
        with engine.begin() as connection:
            yield Operations(MigrationContext.configure(connection))
    finally:
        engine.dispose()


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Upgrade jobq to a release with one more revision, which ends with the given lines."""

    def upgrade(more: str = "") -> None:
        folder = tmp_path / "next_release"
        shutil.copytree(ROOT / "migrations", folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "versions" / f"{NEXT}_later.py").write_text(NEXT_REVISION.format(more=more))
        monkeypatch.setattr(migrate.versions, "scripts", lambda: folder)

    return upgrade


_PARTS = """
    SELECT c.relname, attname || ' ' || format_type(atttypid, atttypmod) || ' ' || attnotnull
    FROM pg_class AS c JOIN pg_attribute ON attrelid = c.oid
    WHERE relnamespace = to_regnamespace(%(schema)s) AND relkind IN ('r', 'i') AND attnum > 0
    UNION ALL
    SELECT c.relname, conname || ' ' || pg_get_constraintdef(o.oid)
    FROM pg_class AS c JOIN pg_constraint AS o ON conrelid = c.oid
    WHERE relnamespace = to_regnamespace(%(schema)s) AND contype <> 'n'
    UNION ALL
    SELECT c.relname, tgname || ' ' || pg_get_triggerdef(t.oid)
    FROM pg_class AS c JOIN pg_trigger AS t ON tgrelid = c.oid
    WHERE relnamespace = to_regnamespace(%(schema)s)
    ORDER BY 1, 2
"""


def tables(url: str, schema: str = "jobq") -> dict[str, list[str]]:
    """Every table and index of a schema with its columns, constraints and triggers."""
    found: dict[str, list[str]] = {}
    with psycopg.connect(url) as connection:
        for table, part in connection.execute(_PARTS, {"schema": schema}):
            found.setdefault(table, []).append(part.replace(f"{schema}.", ""))
    return found


def recorded(url: str) -> list[Any]:
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT * FROM jobq.alembic_version").fetchall()


# A whole chain


@pytest.mark.parametrize(("template", "driver"), [("generic", "psycopg"), ("async", "asyncpg")])
def test_one_chain_makes_the_tables_of_the_application_and_of_jobq_and_takes_them_away(chain, template, driver):
    chain.init(template=template, driver=driver)
    chain.look_at_every_schema()
    chain.alembic("revision", "--autogenerate", "-m", "orders")
    chain.write_ours()

    chain.alembic("upgrade", "head")

    assert recorded(chain.url) == [(HEAD,)]
    assert chain.jobq("current", "--check").exit_code == 0
    chain.alembic("check")  # raises if autogenerate would write anything
    before = chain.revisions()
    chain.alembic("revision", "--autogenerate", "-m", "nothing")
    [nothing] = chain.revisions() - before
    assert nothing.read_text().count("    pass") == 2
    chain.alembic("upgrade", "head")

    chain.alembic("downgrade", "base")

    assert chain.tables() == {}
    assert set(tables(chain.url, "public")) == {"alembic_version", "alembic_version_pkc"}
    assert chain.jobq("current", "--check").exit_code == 1


def test_autogenerate_that_looks_at_the_default_schema_only_needs_no_help(chain):
    chain.init()
    chain.alembic("revision", "--autogenerate", "-m", "orders")
    chain.write_ours()
    chain.alembic("upgrade", "head")

    chain.alembic("check")


def test_the_tables_are_those_that_jobq_migrate_makes_and_it_goes_on_from_them(chain, next_release):
    chain.init()
    chain.write_ours()
    chain.alembic("upgrade", "head")
    ours = chain.tables()
    chain.alembic("downgrade", "base")
    assert chain.jobq("upgrade").exit_code == 0
    assert chain.tables() == ours

    chain.alembic("stamp", "head")
    next_release()
    assert chain.jobq("current").stdout == f"{HEAD}\n"
    assert chain.jobq("upgrade").stdout == f"{NEXT}\n"
    chain.write_ours()
    chain.alembic("upgrade", "head")  # finds the tables there already
    chain.alembic("downgrade", "-1")
    assert recorded(chain.url) == [(HEAD,)]
    assert chain.tables() == ours


def test_a_revision_goes_on_after_the_call_and_takes_it_back_when_it_fails(chain):
    chain.init()
    path = chain.write_ours()
    call = f'migrate.upgrade(op, since="base", to="{HEAD}")'
    more = f'{call}\n    op.create_table("mine", sa.Column("id", sa.Integer))'
    path.write_text(path.read_text().replace(call, f"{more}\n    op.execute('SELECT 1 / 0')"))

    with pytest.raises(Exception, match="division by zero"):
        chain.alembic("upgrade", "head")
    assert chain.tables() == {}

    path.write_text(path.read_text().replace("    op.execute('SELECT 1 / 0')", ""))
    chain.alembic("upgrade", "head")
    assert "mine" in tables(chain.url, "public")
    assert recorded(chain.url) == [(HEAD,)]


def test_the_statements_of_alembic_sql_do_the_same(chain, capsys):
    chain.init()
    path = chain.write_ours()
    chain.alembic("upgrade", "head")
    made = chain.tables()
    chain.alembic("downgrade", "base")
    with psycopg.connect(chain.url) as connection:
        connection.execute("DROP TABLE public.alembic_version")
    capsys.readouterr()

    for way in (("upgrade", "head", "--sql"), ("downgrade", f"{path.name[:12]}:base", "--sql")):
        chain.alembic(*way)
        with psycopg.connect(chain.url, autocommit=True) as connection:
            connection.execute(capsys.readouterr().out)
        assert chain.tables() == (made if way[0] == "upgrade" else {})


def test_a_revision_of_jobq_may_build_an_index_concurrently(chain, next_release):
    chain.init()
    next_release(
        "with op.get_context().autocommit_block():\n"
        '        op.execute("CREATE INDEX CONCURRENTLY later_id ON jobq.later (id)")'
    )
    chain.write_ours()

    chain.alembic("upgrade", "head")

    assert "later_id" in chain.tables()
    assert recorded(chain.url) == [(NEXT,)]


# The calls of a revision


def test_one_call_leads_from_whatever_is_there(empty, next_release):
    next_release()
    for start in (None, HEAD, NEXT):
        with operations(empty) as op:
            if start is not None:
                migrate.upgrade(op, start)
            migrate.upgrade(op, to=NEXT)
        assert recorded(empty) == [(NEXT,)]
        with operations(empty) as op:
            migrate.downgrade(op, to=HEAD)
            assert "later" not in inspect(op.get_bind()).get_table_names("jobq")
            migrate.upgrade(op, to=NEXT)
            migrate.downgrade(op, to="base")
            migrate.downgrade(op, to="base")
        assert tables(empty) == {}


def test_tables_that_are_further_on_are_left_as_they_are(empty, next_release):
    next_release()
    with operations(empty) as op:
        migrate.upgrade(op, to=NEXT)
        migrate.upgrade(op, to=HEAD)

    assert recorded(empty) == [(NEXT,)]
    assert "later" in tables(empty)


def test_a_schema_of_another_name_is_another_set_of_tables(empty):
    with operations(empty) as op:
        migrate.upgrade(op, to=HEAD, schema="work")
        migrate.upgrade(op, to=HEAD)
    assert tables(empty, "work") == tables(empty)

    with operations(empty) as op:
        migrate.downgrade(op, to="base", schema="work")
    assert tables(empty, "work") == {}
    assert recorded(empty) == [(HEAD,)]


def test_a_role_that_owns_the_schema_needs_no_right_to_create_one(empty):
    with operations(empty) as op:
        op.execute("CREATE ROLE chain_owner; CREATE SCHEMA jobq AUTHORIZATION chain_owner; SET ROLE chain_owner")
        try:
            migrate.upgrade(op, to=HEAD)
        finally:
            op.execute("RESET ROLE; DROP OWNED BY chain_owner; DROP ROLE chain_owner")


@pytest.mark.parametrize("to", ["head", "base", "jobq_9999", "", "3fa1"])
def test_upgrade_names_the_revisions_that_there_are(empty, to):
    with operations(empty) as op, pytest.raises(ConfigurationError, match=f"cannot upgrade to '{to}'.*jobq_0001"):
        migrate.upgrade(op, to=to)


@pytest.mark.parametrize("to", ["head", "jobq_9999"])
def test_downgrade_names_the_revisions_that_there_are(empty, to):
    with operations(empty) as op, pytest.raises(ConfigurationError, match=f"cannot downgrade to '{to}'.*base, jobq"):
        migrate.downgrade(op, to=to)


def test_downgrade_does_not_go_forward(empty):
    with operations(empty) as op, pytest.raises(ConfigurationError, match=f"to {HEAD}: .* are at base, before it"):
        migrate.downgrade(op, to=HEAD)


def test_tables_of_a_later_release_are_left_alone(empty):
    with operations(empty) as op:
        migrate.upgrade(op, to=HEAD)
        op.execute("UPDATE jobq.alembic_version SET version_num = 'jobq_9999'")
        for change, to in ((migrate.upgrade, HEAD), (migrate.downgrade, "base")):
            with pytest.raises(SchemaMismatch, match=r"jobq_9999.*upgrade jobq"):
                change(op, to)


def test_a_revision_does_not_wait_for_another_migrator(empty):
    with psycopg.connect(empty) as other, operations(empty) as op:
        other.execute("SELECT pg_advisory_lock(%s, hashtext('jobq'))", [migrate.versions.LOCK])
        with pytest.raises(ConfigurationError, match="another migrator"):
            migrate.upgrade(op, to=HEAD)


def test_another_database_than_postgresql_is_refused():
    with create_engine("sqlite://").connect() as connection:
        op = Operations(MigrationContext.configure(connection))
        with pytest.raises(ConfigurationError, match="lives in PostgreSQL; this chain is on sqlite"):
            migrate.upgrade(op, to=HEAD)


def test_statements_alone_need_to_be_told_where_they_start():
    op = Operations(MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True}))
    with pytest.raises(ConfigurationError, match=r"--sql cannot look.*since="):
        migrate.upgrade(op, to=HEAD)
    with pytest.raises(SchemaMismatch, match="jobq_9999"):
        migrate.upgrade(op, to=HEAD, since="jobq_9999")


@pytest.mark.parametrize("schema", ["jobq", "work"])
def test_include_name_leaves_out_one_schema_and_nothing_else(schema):
    include = migrate.include_name if schema == "jobq" else partial(migrate.include_name, schema=schema)

    assert not include(schema, "schema", {})
    assert include("public", "schema", {})
    assert include(None, "schema", {})
    assert include(schema, "table", {"schema_name": None})


# jobq migrate init-alembic


def test_init_alembic_writes_one_revision_for_each_release_that_has_new_tables(chain, next_release):
    chain.init()
    first = chain.write_ours()
    assert chain.write_ours() == first
    assert chain.revisions() == {first}
    assert 'migrate.upgrade(op, since="base", to=' in first.read_text()

    next_release()
    second = chain.write_ours()
    assert chain.write_ours() == second
    assert chain.revisions() == {first, second}
    assert f'migrate.upgrade(op, since="{HEAD}", to="{NEXT}")' in second.read_text()
    assert f'migrate.downgrade(op, since="{NEXT}", to="{HEAD}")' in second.read_text()
    assert f"= '{first.name[:12]}'" in second.read_text()


@pytest.mark.parametrize(
    "call", [f'migrate.upgrade(\n        op,\n        to="{HEAD}",\n    )', f"migrate.upgrade(op, '{HEAD}')"]
)
def test_init_alembic_knows_a_revision_that_was_written_by_hand(chain, call):
    chain.init()
    path = chain.write_ours()
    path.write_text(path.read_text().replace(f'migrate.upgrade(op, since="base", to="{HEAD}")', call))

    result = chain.jobq("init-alembic")

    assert (result.exit_code, result.stdout) == (0, f"{path}\n")
    assert "nothing was written" in result.stderr
    assert chain.revisions() == {path}


def test_init_alembic_takes_a_schema_and_a_configuration_elsewhere(chain, monkeypatch, tmp_path_factory):
    chain.init()
    chain.write_ours()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))

    result = chain.jobq("init-alembic", "-c", str(chain.folder / "alembic.ini"), "--schema", "work")

    assert 'schema="work")' in Path(result.stdout.strip()).read_text()
    assert 'functools.partial(jobq.migrate.include_name, schema="work")' in result.stderr
    assert len(chain.revisions()) == 2


def test_init_alembic_finds_the_scripts_where_pyproject_says(chain):
    chain.init()
    ini = chain.folder / "alembic.ini"
    ini.write_text(ini.read_text().replace("script_location", "# script_location"))
    (chain.folder / "pyproject.toml").write_text('[tool.alembic]\nscript_location = "%(here)s/migrations"\n')

    assert chain.write_ours() in chain.revisions()


def test_init_alembic_without_a_configuration_is_wrong_usage(chain):
    result = chain.jobq("init-alembic")

    assert result.exit_code == 2
    assert "no alembic.ini here" in result.stderr
    assert "-c FILE" in result.stderr


def test_init_alembic_asks_for_one_head(chain):
    chain.init()
    chain.alembic("revision", "-m", "one")
    chain.alembic("revision", "-m", "two", "--head", "base", "--splice")
    before = chain.revisions()

    result = chain.jobq("init-alembic")

    assert result.exit_code == 1
    assert "has 2 heads" in result.stderr
    assert "alembic merge heads" in result.stderr
    assert chain.revisions() == before


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [("script_location =", "location =", "No 'script_location'"), ("%(here)s/migrations", "nowhere", "nowhere")],
)
def test_init_alembic_says_what_alembic_does_not_find(chain, old, new, says):
    chain.init()
    ini = chain.folder / "alembic.ini"
    ini.write_text(ini.read_text().replace(old, new, 1) if "location =" in old else ini.read_text().replace(old, new))

    result = chain.jobq("init-alembic")

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: alembic.ini: ")
    assert says in result.stderr


def test_init_alembic_refuses_a_template_that_takes_no_code_and_leaves_no_file(chain):
    chain.init()
    template = chain.folder / "migrations" / "script.py.mako"
    template.write_text(template.read_text().replace('${upgrades if upgrades else "pass"}', "pass"))

    result = chain.jobq("init-alembic")

    assert result.exit_code == 1
    assert "no place for ${imports} and ${upgrades}" in result.stderr
    assert f'jobq.migrate.upgrade(op, to="{HEAD}")' in result.stderr
    assert chain.revisions() == set()


def test_init_alembic_refuses_a_template_for_several_databases(chain):
    chain.init(template="multidb")

    result = chain.jobq("init-alembic")

    assert result.exit_code == 1
    assert f'yourself that calls jobq.migrate.upgrade(op, to="{HEAD}")' in result.stderr
    assert chain.revisions() == set()
