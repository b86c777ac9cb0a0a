"""`jobq migrate`: each verb, on a real PostgreSQL, as it is typed."""

from __future__ import annotations

import functools
import logging
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import anyio
import anyio.to_thread
import asyncpg
import pytest
from click.testing import CliRunner, Result

from jobq import migrate
from jobq.cli import cli
from jobq.cli.failures import ExitCode
from tests.leaks import process_kept
from tests.waiting import until

HEAD = migrate.heads()[0]
COMMAND = [sys.executable, "-c", "from jobq.cli import main; main()", "migrate"]
NOT_LISTENING = "postgresql://u:secret@127.0.0.1:1/db"
Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, no JOBQ_ variables, and loggers that are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("APP", "DATABASE_URL", "REDIS_URL", "SCHEMA", "DEBUG", "LOG_FORMAT", "LOG_LEVEL"):
        monkeypatch.delenv(f"JOBQ_{name}", raising=False)
    with process_kept():
        logging.root.handlers[:] = []
        yield
    for name in [name for name in sys.modules if name.startswith("shop_")]:
        del sys.modules[name]


@pytest.fixture
def run(database_url: str) -> Run:
    """Run `jobq migrate ...` in this process, on this test's database."""
    return lambda *args, **env: CliRunner().invoke(
        cli, ["migrate", *args], env={"JOBQ_DATABASE_URL": database_url, **env}
    )


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


@pytest.fixture
def app(tmp_path: Path) -> Callable[[str], str]:
    """Write an application with these arguments of JobQ; returns APP."""

    def write(arguments: str) -> str:
        name = f"shop_{uuid4().hex}"
        (tmp_path / f"{name}.py").write_text(f"from jobq import JobQ\njobs = JobQ({arguments})\n")
        return f"{name}:jobs"

    return write


def outcome(result: Result) -> tuple[int, str]:
    return result.exit_code, result.stdout


def test_downgrade_and_upgrade_print_where_the_tables_are_now(run):
    down = run("downgrade", "base", "--yes")
    nothing = run("current")
    up = run("upgrade")
    again = run("upgrade", HEAD)

    assert outcome(down) == (ExitCode.OK, "base\n")
    assert outcome(nothing) == (ExitCode.OK, "none\n")
    assert outcome(up) == outcome(again) == (ExitCode.OK, f"{HEAD}\n")
    assert f"revision taken back revision={HEAD} schema=jobq" in down.stderr
    assert f"revision applied    revision={HEAD} schema=jobq" in up.stderr
    assert again.stderr == ""


def test_current_check_fails_unless_the_tables_are_those_of_this_release(run):
    at_head = run("current", "--check")
    run("stamp", "base")
    missing = run("current", "--check")

    assert outcome(at_head) == (ExitCode.OK, f"{HEAD} (head)\n")
    assert outcome(missing) == (ExitCode.FAILED, "none\n")
    assert missing.stderr == "Error: the tables of jobq are missing in schema 'jobq': run `jobq migrate upgrade`\n"


def test_stamp_records_a_revision(run):
    assert outcome(run("stamp", "base")) == (ExitCode.OK, "base\n")
    assert outcome(run("current")) == (ExitCode.OK, "none\n")
    assert outcome(run("stamp", "head")) == (ExitCode.OK, "head\n")
    assert outcome(run("current")) == (ExitCode.OK, f"{HEAD} (head)\n")


def test_heads_history_and_sql_need_no_database():
    results = [CliRunner().invoke(cli, ["migrate", verb]) for verb in ("heads", "history", "sql")]

    assert [result.exit_code for result in results] == [ExitCode.OK] * 3
    assert results[0].stdout == f"{HEAD}\n"
    assert results[1].stdout.startswith("jobq_0001  Create the tables of jobq.\n")
    assert results[2].stdout == migrate.sql()


def test_sql_takes_a_way_and_a_schema():
    result = CliRunner().invoke(cli, ["migrate", "sql", "head:base", "--schema", "other"])

    assert outcome(result) == (ExitCode.OK, migrate.sql("head:base", schema="other"))


async def test_the_statements_run_in_psql_order_on_an_empty_database(run, connection):
    await connection.execute("DROP SCHEMA jobq CASCADE")

    await connection.execute(CliRunner().invoke(cli, ["migrate", "sql"]).stdout)

    await migrate.check(connection)


async def test_downgrade_without_a_terminal_drops_nothing_unless_told_yes(run, connection):
    await connection.execute("INSERT INTO jobq.step VALUES (gen_random_uuid(), 'charge', '1')")

    refused = await in_thread(run, "downgrade", "base")

    assert refused.exit_code == ExitCode.USAGE
    assert "The way to base drops these tables of schema jobq: outbox (0 rows)," in refused.stderr
    assert "step (1 row)" in refused.stderr
    assert "repeat with --yes" in refused.stderr
    await migrate.check(connection)


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", ExitCode.FAILED), (b"y\n", ExitCode.OK)])
async def test_downgrade_on_a_terminal_asks(database_url, connection, answer, code):
    controller, terminal = pty.openpty()
    os.write(controller, answer)
    process = await in_thread(
        subprocess.run,
        [*COMMAND, "downgrade", "base", "--database-url", database_url],
        stdin=terminal,
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(controller)
    os.close(terminal)

    assert (process.returncode, process.stdout) == (code, "" if code else "base\n")
    assert "Drop them? [y/N]" in process.stderr
    assert await connection.fetchval("SELECT to_regclass('jobq.outbox') IS NULL") is (code == ExitCode.OK)


async def test_two_migrators_at_once_both_succeed(database_url, connection):
    await connection.execute("DROP SCHEMA jobq CASCADE")
    await connection.execute("SELECT pg_advisory_lock($1, hashtext('jobq'))", migrate.versions.LOCK)
    started = [start("upgrade", "--database-url", database_url) for _ in range(2)]
    await until(lambda: waiting_migrators(connection, 2), "both migrators wait")

    await connection.execute("SELECT pg_advisory_unlock_all()")
    ended = [await in_thread(process.communicate) for process in started]

    assert [process.returncode for process in started] == [ExitCode.OK] * 2
    assert [stdout for stdout, _ in ended] == [f"{HEAD}\n"] * 2
    logged = "".join(stderr for _, stderr in ended)
    assert logged.count("waiting for another migrator") == 2
    assert logged.count("revision applied") == len(migrate.revisions())


async def test_ctrl_c_ends_a_migrator_that_waits(database_url, connection):
    await connection.execute("SELECT pg_advisory_lock($1, hashtext('jobq'))", migrate.versions.LOCK)
    process = start("upgrade", "--database-url", database_url)
    await until(lambda: waiting_migrators(connection, 1), "the migrator waits")

    process.send_signal(signal.SIGINT)
    stdout, stderr = await in_thread(process.communicate)

    assert (process.returncode, stdout) == (ExitCode.INTERRUPTED, "")
    assert "Traceback" not in stderr


def start(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


async def waiting_migrators(connection: asyncpg.Connection, number: int) -> bool:
    """Tell whether so many have been refused the lock: one whose statement still runs may yet get it."""
    return number == await connection.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'jobq migrate'"
        " AND datname = current_database() AND state <> 'active'"
        " AND (query = 'COMMIT;' OR query LIKE '%advisory_lock%')"
    )


async def in_thread(function, *args, **options):
    return await anyio.to_thread.run_sync(functools.partial(function, *args, **options))


# Which tables


def test_the_database_of_an_application_alone_suffices(app, database_url):
    result = CliRunner().invoke(cli, ["migrate", "current", "--app", app(f"database={database_url!r}")])

    assert outcome(result) == (ExitCode.OK, f"{HEAD} (head)\n")


def test_an_engine_of_an_application_is_used_and_closed(app, database_url, tmp_path):
    name = f"shop_{uuid4().hex}"
    url = database_url.replace("postgresql://", "postgresql+asyncpg://")
    (tmp_path / f"{name}.py").write_text(
        "from jobq import JobQ\nfrom sqlalchemy.ext.asyncio import create_async_engine\n"
        f"jobs = JobQ(database=create_async_engine({url!r}), schema='orders')\n"
    )

    for verb, *args in (["upgrade"], ["current"], ["downgrade", "base", "--yes"]):
        result = CliRunner().invoke(cli, ["migrate", verb, *args, "--app", f"{name}:jobs"])
        assert result.exit_code == ExitCode.OK, result.output
    assert "schema=orders" in result.stderr


def test_the_schema_of_the_code_wins_over_the_option(app, database_url):
    result = CliRunner().invoke(
        cli,
        ["migrate", "current", "--app", app(f"database={database_url!r}, schema='mine'"), "--schema", "jobq"],
    )

    assert outcome(result) == (ExitCode.OK, "none\n")
    assert "sets schema in its code to mine: jobq of --schema or JOBQ_SCHEMA is not used" in result.stderr


def test_an_application_without_a_database_takes_the_url(app, run):
    assert outcome(run("current", "--app", app(""))) == (ExitCode.OK, f"{HEAD} (head)\n")


def test_a_typed_url_stands_above_an_application_of_the_environment(database_url, run):
    result = run("current", "--database-url", database_url, JOBQ_APP="no_such:app", JOBQ_DATABASE_URL=NOT_LISTENING)

    assert outcome(result) == (ExitCode.OK, f"{HEAD} (head)\n")


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+asyncpg", "postgres"])
def test_each_way_to_write_the_scheme_works(database_url, scheme):
    url = database_url.replace("postgresql", scheme, 1)

    assert CliRunner().invoke(cli, ["migrate", "current", "--database-url", url]).exit_code == ExitCode.OK


def test_other_schemas_are_reached_by_option_and_environment(run):
    run("upgrade", "--schema", "other")

    assert outcome(run("current")) == outcome(run("current", JOBQ_SCHEMA="other")) == (0, f"{HEAD} (head)\n")
    assert outcome(run("current", "--schema", "third", JOBQ_SCHEMA="other")) == (0, "none\n")


# Failures


@pytest.mark.parametrize("args", [["upgrade", "jobq_7777"], ["downgrade"], ["upgrade", "--schema", "Jobq"]])
def test_wrong_usage_exits_2(run, args):
    assert run(*args).exit_code == ExitCode.USAGE


def test_no_database_at_all_is_wrong_usage():
    result = CliRunner().invoke(cli, ["migrate", "current"])

    assert result.exit_code == ExitCode.USAGE
    assert "Give --database-url or --app, or set JOBQ_DATABASE_URL" in result.stderr


def test_an_application_that_cannot_be_imported_exits_3(run):
    assert run("current", "--app", "no_such:app").exit_code == ExitCode.APP


@pytest.mark.parametrize("url", [NOT_LISTENING, "postgresql://u:secret@/db?host=/no/such/directory"])
def test_a_server_that_cannot_be_reached_exits_4_and_names_the_url_without_its_password(app, url):
    by_option = CliRunner().invoke(cli, ["migrate", "upgrade", "--database-url", url])
    by_code = CliRunner().invoke(cli, ["migrate", "upgrade", "--app", app(f"database={url!r}")])

    for result in (by_option, by_code):
        assert outcome(result) == (ExitCode.UNREACHABLE, "")
        assert f"cannot reach PostgreSQL at {url.replace('secret', '***')}: " in result.stderr
        assert result.stderr.endswith("that --database-url or JOBQ_DATABASE_URL is right\n")


def test_a_database_that_does_not_exist_exits_4(database_url, run):
    result = run("current", "--database-url", database_url.replace("jobq_test_", "no_jobq_test_"))

    assert result.exit_code == ExitCode.UNREACHABLE
    assert "does not exist; check that it runs" in result.stderr


async def test_tables_of_a_later_release_exit_5(run, connection):
    await connection.execute("UPDATE jobq.alembic_version SET version_num = 'jobq_9999'")

    result = await in_thread(run, "upgrade")

    assert result.exit_code == ExitCode.SCHEMA
    assert "this jobq knows" in result.stderr


async def test_a_table_lock_that_is_not_given_exits_1_and_changes_nothing(run, connection):
    async with connection.transaction():
        await connection.execute("SELECT FROM jobq.outbox")
        result = await in_thread(run, "downgrade", "base", "--yes", "--lock-timeout", "0.05")

    assert result.exit_code == ExitCode.FAILED
    assert "other transactions held a table for too long, so nothing was changed" in result.stderr
    await migrate.check(connection)


def test_version_names_the_release_and_its_tables():
    result = CliRunner().invoke(cli, ["version"])

    assert result.exit_code == ExitCode.OK
    assert result.stdout.splitlines()[:2] == ["jobq 0.1.0", f"tables {HEAD}"]
