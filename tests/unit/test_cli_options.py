"""jobq.cli: which application, which URLs, and how a failure is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import click
import pytest
from click.testing import CliRunner, Result

from jobq.cli import _COMMANDS, cli
from jobq.cli.failures import ExitCode, Failure, explain
from jobq.cli.options import (
    SIZE,
    app_argument,
    database_url_option,
    from_pyproject,
    mask,
    open_app,
    redis_url_option,
    schema_option,
)
from jobq.errors import ConfigurationError, SchemaMismatch

Write = Callable[[str], str]


@click.command()
@app_argument
@database_url_option
@redis_url_option
@schema_option
def show(app: str | None, database_url: str | None, redis_url: str | None, schema: str | None) -> None:
    jobs = open_app(app, database_url=database_url, redis_url=redis_url, schema=schema)
    click.echo(f"{jobs.given_database} {jobs.given_redis} {jobs.schema}")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, and no JOBQ_ variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("APP", "DATABASE_URL", "REDIS_URL", "SCHEMA", "DEBUG"):
        monkeypatch.delenv(f"JOBQ_{name}", raising=False)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith("shop_"):
            del sys.modules[name]


@pytest.fixture
def write(here: Path) -> Write:
    """Write a module into the working directory; returns its name."""

    def write(source: str) -> str:
        name = f"shop_{uuid4().hex}"
        (here / f"{name}.py").write_text(source)
        return name

    return write


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setitem(_COMMANDS, "show", (f"{__name__}:show", "Show the application."))
    return lambda *args, **env: CliRunner().invoke(cli, ["show", *args], env=env)


JOBS = "from jobq import JobQ\njobs = JobQ()\n"


# APP


def test_the_application_is_found_in_the_working_directory(run, write):
    result = run(f"{write(JOBS)}:jobs")

    assert (result.exit_code, result.stdout) == (0, "None None jobq\n")


def test_the_application_may_be_an_attribute_of_an_attribute(run, write):
    assert run(f"{write(f'{JOBS}class a: b = jobs')}:a.b").exit_code == 0


def test_environment_stands_above_pyproject_and_the_command_line_above_both(run, write, here):
    first, second, third = (write(f"from jobq import JobQ\njobs = JobQ(schema='{n}')") for n in ("a", "b", "c"))
    (here / "pyproject.toml").write_text(f'[tool.jobq]\napp = "{first}:jobs"\n')

    from_file = run()
    from_environment = run(JOBQ_APP=f"{second}:jobs")
    from_argument = run(f"{third}:jobs", JOBQ_APP=f"{second}:jobs")

    assert [result.stdout[-2] for result in (from_file, from_environment, from_argument)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("source", "spec", "sentence"),
    [
        (JOBS, "{}", "'{}' is no application: write it as module:attribute, like shop.jobs:jobs"),
        (JOBS, "{}:", "'{}:' is no application: write it as module:attribute, like shop.jobs:jobs"),
        (JOBS, "no_{}:jobs", "no module 'no_{}' here or where Python looks for modules"),
        (JOBS, "{}.x:jobs", "no module '{}.x' here or where Python looks for modules"),
        (JOBS, "{}:job", "{} has no 'job'; its JobQ is {}:jobs"),
        ("", "{}:jobs", "{} has no 'jobs'; no JobQ is made in {}"),
        (f"{JOBS}app = 1", "{}:app", "{}:app is no JobQ but of type int; its JobQ is {}:jobs"),
        ("import no_such_thing", "{}:jobs", "{} cannot be imported: No module named 'no_such_thing' ({}.py, line 1)"),
        ("1 / 0", "{}:jobs", "{} cannot be imported: ZeroDivisionError: division by zero ({}.py, line 1)"),
    ],
)
def test_an_application_that_cannot_be_had_is_told_in_one_sentence(run, write, source, spec, sentence):
    name = write(source)

    result = run(spec.replace("{}", name))

    assert result.stderr == f"Error: {sentence.replace('{}', name)}\n"
    assert (result.exit_code, result.stdout) == (ExitCode.APP, "")


def test_no_application_at_all_is_wrong_usage(run):
    result = run()

    assert result.exit_code == ExitCode.USAGE
    assert "Give APP as module:attribute, or set JOBQ_APP" in result.stderr


def test_a_broken_pyproject_is_wrong_usage(run, here):
    (here / "pyproject.toml").write_text("[tool.jobq\n")

    result = run()

    assert result.exit_code == ExitCode.USAGE
    assert "./pyproject.toml cannot be read" in result.stderr


def test_pyproject_may_write_a_name_with_hyphens(here):
    (here / "pyproject.toml").write_text('[tool.jobq]\nredis-url = "redis://h"\nqueues = ["a"]')

    assert (from_pyproject("redis_url")(), from_pyproject("queues")()) == ("redis://h", ["a"])
    assert from_pyproject("app")() is None


# URLs


def test_what_the_code_leaves_out_comes_from_the_environment(run, write):
    urls = {"JOBQ_DATABASE_URL": "postgresql://h/a", "JOBQ_REDIS_URL": "redis://h"}

    result = run(f"{write(JOBS)}:jobs", **urls)

    assert (result.stdout, result.stderr) == ("postgresql://h/a redis://h jobq\n", "")


def test_what_the_code_gives_wins_and_stderr_says_so(run, write):
    name = write("from jobq import JobQ\njobs = JobQ(database='postgresql://u:pw@h/a', redis='redis://h', schema='s')")

    result = run(
        f"{name}:jobs",
        "--schema",
        "t",
        JOBQ_DATABASE_URL="postgresql+asyncpg://v:other@h/b",
        JOBQ_REDIS_URL="redis://h",
    )

    assert result.stdout == "postgresql://u:pw@h/a redis://h s\n"
    assert result.stderr.splitlines() == [
        f"{name}:jobs sets database in its code to postgresql://u:***@h/a: "
        "postgresql+asyncpg://v:***@h/b of --database-url or JOBQ_DATABASE_URL is not used",
        f"{name}:jobs sets schema in its code to s: t of --schema or JOBQ_SCHEMA is not used",
    ]


def test_a_url_quoted_in_another_way_is_the_same_place(run, write):
    name = write(
        "from jobq import JobQ\nfrom sqlalchemy.ext.asyncio import create_async_engine\n"
        "jobs = JobQ(database=create_async_engine('postgresql+asyncpg://u@/a?host=%2Frun%2Fpg&port=1'))"
    )

    assert run(f"{name}:jobs", JOBQ_DATABASE_URL="postgresql://u@/a?port=1&host=/run/pg").stderr == ""


@pytest.mark.parametrize("given", ["postgresql://other@h:5432/a", "postgresql+asyncpg://u:pw@h:5432/a"])
def test_the_engine_of_an_application_is_compared_by_place(run, write, given):
    name = write(
        "from jobq import JobQ\nfrom sqlalchemy.ext.asyncio import create_async_engine\n"
        "jobs = JobQ(database=create_async_engine('postgresql+asyncpg://u:pw@h:5432/a'))"
    )

    same = run(f"{name}:jobs", JOBQ_DATABASE_URL=given)
    different = run(f"{name}:jobs", JOBQ_DATABASE_URL=given.replace("/a", "/b"))

    assert same.stderr == ""
    assert "sets database in its code to postgresql+asyncpg://u:***@h:5432/a" in different.stderr


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        (
            "--database-url",
            "mysql://u:pw@h",
            "begin with postgresql:// or postgresql+asyncpg:// or postgres://",
        ),
        ("--database-url", "u:pw@h/db", "begin with postgresql:// or postgresql+asyncpg:// or postgres://"),
        ("--redis-url", "http://u:pw@h", "begin with redis:// or rediss:// or unix://"),
        ("--schema", "Jobq", "'Jobq' cannot be the schema of jobq"),
    ],
)
def test_a_value_that_cannot_be_right_is_wrong_usage(run, option, value, sentence):
    result = run(option, value)

    assert result.exit_code == ExitCode.USAGE
    assert sentence in result.stderr
    assert "pw" not in result.output


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:pw@h:5432/db", "postgresql://u:***@h:5432/db"),
        ("postgresql+asyncpg://u:pw@/db?host=/run", "postgresql+asyncpg://u:***@/db?host=/run"),
        ("postgresql://u:p/w?#@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:p@w@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:@h/db", "postgresql://u:***@h/db"),
        ("redis://:pw@h:6379/0", "redis://:***@h:6379/0"),
        ("postgresql://u@h:5432/db", "postgresql://u@h:5432/db"),
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("unix:///run/redis.sock?db=0&password=pw", "unix:///run/redis.sock?db=0&password=***"),
        (
            "postgresql://h/db?user=u&PASSWORD=pw&sslmode=require",
            "postgresql://h/db?user=u&PASSWORD=***&sslmode=require",
        ),
        ("postgresql://h/db?sslpassword=pw#x", "postgresql://h/db?sslpassword=***#x"),
        ("no URL: a@b", "no URL: a@b"),
        ("from redis://:pw@a to redis://:pw@b", "from redis://:***@a to redis://:***@b"),
    ],
)
def test_mask_hides_passwords_and_nothing_else(url, shown):
    assert mask(url) == shown


# Failures


def test_every_kind_of_error_has_its_exit_code():
    async_errors = ExceptionGroup("unhandled errors", [SchemaMismatch("older"), ValueError("cancelled")])

    explained = [
        explain(error, {}) for error in (SchemaMismatch("s"), ConfigurationError("c"), ValueError("v"), async_errors)
    ]

    assert [(failure.exit_code, failure.message) for failure in explained] == [
        (ExitCode.SCHEMA, "s"),
        (ExitCode.FAILED, "c"),
        (ExitCode.FAILED, "ValueError: v (JOBQ_DEBUG=1 shows where)"),
        (ExitCode.SCHEMA, "older"),
    ]


def test_a_file_that_is_missing_is_not_taken_for_a_server():
    with pytest.raises(FileNotFoundError) as missing:
        Path("missing").read_text()

    assert explain(missing.value, {}).exit_code == ExitCode.FAILED


def test_a_failure_never_shows_a_password():
    assert Failure("cannot read redis://:secret@h").message == "cannot read redis://:***@h"


def test_jobq_debug_shows_the_traceback_before_the_sentence(run):
    quiet = run("shop_missing:jobs")
    debug = run("shop_missing:jobs", JOBQ_DEBUG="1")

    assert quiet.stderr.count("\n") == 1
    assert debug.stderr.startswith("Traceback")
    assert debug.stderr.endswith(quiet.stderr)


# The group


def test_help_lists_every_command_in_at_most_60_letters_and_imports_none():
    code = (
        "import sys\nfrom jobq.cli import main\nsys.argv = ['jobq', '--help']\n"
        "try: main()\n"
        "except SystemExit as done: assert done.code == 0\n"
        "allowed = {'failures', 'masking'}\n"
        "extra = [name for name in sys.modules if name.startswith('jobq.cli.') and name[9:] not in allowed]\n"
        "assert not extra and 'redis' not in sys.modules and 'alembic' not in sys.modules, extra"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    for name, (_, summary) in _COMMANDS.items():
        assert f"  {name}" in done.stdout
        assert summary in done.stdout
        assert len(summary) <= 60


def test_an_unknown_command_is_wrong_usage():
    assert CliRunner().invoke(cli, ["migrat"]).exit_code == ExitCode.USAGE


# --- sizes


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("536870912", 512 * 2**20),
        ("512M", 512 * 2**20),
        ("512 MiB", 512 * 2**20),
        ("1.5g", 3 * 2**29),
        ("1GB", 2**30),
        ("0.5K", 512),
        (2048, 2048),
    ],
)
def test_a_size_is_bytes_or_has_a_unit(value, size):
    assert SIZE.convert(value, None, None) == size


@pytest.mark.parametrize("value", ["", "0", "-1M", "lots", "1T", "1,5G", "M", "0.0001K"])
def test_what_is_no_size_is_told_how_to_write_one(value):
    with pytest.raises(click.BadParameter, match="is no size: write bytes, or a number with K, M or G"):
        SIZE.convert(value, None, None)


def test_a_deadline_that_passed_is_said_in_words():
    assert "TimeoutError: no answer in time (" in str(explain(TimeoutError(), {}))
