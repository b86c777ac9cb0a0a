"""`jobq dev`: the jobs of an application on private servers, started again when its code changes.

Invariant: this process never imports the application, so no error in it ends the session, and each start runs the
code as it is then. Called by the command group and, for the tables, by run. Calls embedded, reload, migrate.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import shlex
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import embedded, migrate
from ..embedded.account import ELSEWHERE, Account
from ..embedded.directory import keep_directory
from ..embedded.server import Server
from ..errors import ConfigurationError
from .demo import end_in_order
from .failures import POSTGRESQL, REDIS, ExitCode, Failure
from .options import REDIS_SCHEMES, Url, app_argument, logging_options, mask, names_database, split_spec
from .processes.children import environment
from .processes.reload import Session

if TYPE_CHECKING:
    from ..app import JobQ

log = logging.getLogger(__name__)

_FOLDER = ".jobq"
_LOOK_EVERY_S = 1.0
_NO_PRIVATE_SERVERS = "Or give --postgres and --redis, to use servers of your own."


@click.command()
@app_argument
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help=f"Keep the private servers' data here (default {_FOLDER}).",
)
@click.option(
    "--postgres",
    "database_url",
    type=Url(POSTGRESQL, "postgresql", "postgresql+asyncpg", "postgres"),
    metavar="URL",
    help="Use this PostgreSQL, and start none. The tables of jobq are made in it, or upgraded.",
)
@click.option(
    "--redis",
    "redis_url",
    type=Url(REDIS, *REDIS_SCHEMES),
    metavar="URL",
    help="Use this Redis, and start none.",
)
@click.option(
    "--watch",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    metavar="DIR",
    help="Watch the Python files below it (default: the working directory, and where APP is). May be repeated.",
)
@click.option("--no-reload", is_flag=True, help="Do not watch; end when APP's process does, with its code.")
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default="1",
    metavar="SECONDS",
    help="Given to running jobs before a restart, and at the end. What still runs then runs again later.",
)
@logging_options
def dev(
    app: str | None,
    data: Path | None,
    database_url: str | None,
    redis_url: str | None,
    watch: tuple[Path, ...],
    no_reload: bool,
    grace: float,
) -> None:
    """Run APP's jobs on private servers, and start again when its code changes.

    PostgreSQL and Valkey are started for this session, and their data is kept. APP's process is `jobq run`: relay and
    worker. Its other settings come from JOBQ_QUEUES, JOBQ_CONCURRENCY ... or pyproject.toml.

    \b
    Examples:
      jobq dev shop.jobs:jobs
      jobq dev shop.jobs:jobs --postgres postgresql://localhost/shop_dev
    """
    module, _ = split_spec(app)
    if watch and no_reload:
        raise click.UsageError("--watch and --no-reload contradict each other: leave one out")
    if data is not None and database_url is not None and redis_url is not None:
        raise click.UsageError("--data is where private servers keep their data, and none is started: leave it out")
    if not no_reload and find_spec("watchfiles") is None:
        raise Failure("to watch the code needs watchfiles: pip install 'jobq[embedded]', or give --no-reload")
    end_in_order()
    watched = [] if no_reload else list(watch) or places_of(module)
    log_options = [
        word
        for name in ("log_format", "log_level")
        for word in ("--" + name.replace("_", "-"), click.get_current_context().params[name])
    ]
    with _stores(data, database_url, redis_url) as urls:
        if watched:
            click.echo(f"Watching the Python files in {', '.join(map(str, watched))}. Ctrl-C ends it.", err=True)
        command = [sys.executable, "-m", "jobq", "run", str(app), "--migrate", "--grace", f"{grace:g}", *log_options]
        session = Session(command, environment() | urls, watched, grace)
        code = asyncio.run(session.run())
        if session.is_in_a_hurry:
            code = ExitCode.INTERRUPTED
    sys.exit(code)


async def make_tables(jobs: JobQ, named: str | None) -> None:
    """Bring the tables up to date where the database is the one that was `named` for development.

    In one that only the application's code names, tables that are there are not touched: others may use them.
    """
    engine, schema = jobs.database.engine, jobs.schema
    if names_database(jobs, named) or await migrate.current(engine, schema=schema) is None:
        await migrate.upgrade(engine, schema=schema)


@contextmanager
def _stores(data: Path | None, database_url: str | None, redis_url: str | None) -> Iterator[dict[str, str]]:
    """The variables that lead to both stores; private ones are up in the block, and their data is kept."""
    if database_url is not None and redis_url is not None:
        yield {"JOBQ_DATABASE_URL": database_url, "JOBQ_REDIS_URL": redis_url}
        return
    try:
        folder, _lock = _take_folder(data)  # held until this process ends
        servers = embedded.start(folder, durable=True, postgres=database_url is None, valkey=redis_url is None)
    except ConfigurationError as error:
        raise Failure(str(error).replace(ELSEWHERE, _NO_PRIVATE_SERVERS)) from error
    own = [*([servers.postgres] if database_url is None else []), *([servers.valkey] if redis_url is None else [])]
    with servers, _kept_up(own):
        urls = {
            "JOBQ_DATABASE_URL": database_url or servers.database_url,
            "JOBQ_REDIS_URL": redis_url or servers.redis_url,
        }
        _tell(folder, urls)
        yield urls


@contextmanager
def _kept_up(servers: Sequence[Server]) -> Iterator[None]:
    """Start a server again that has ended by itself, by the kernel's hand say: on its data, and at its URL."""
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(_LOOK_EVERY_S):
            for server in servers:
                if not server.is_running:
                    log.warning(
                        "a private server has ended, starting it again", extra={"fields": {"server": server.name}}
                    )
                    try:
                        server.start()
                    except (ConfigurationError, OSError) as error:
                        log.error("it does not start", extra={"fields": {"error": str(error)}})  # noqa: TRY400

    watcher = threading.Thread(target=look, name="jobq dev servers", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def _take_folder(given: Path | None) -> tuple[Path, int]:
    """The folder of the data, and the descriptor that locks it for this session."""
    try:
        folder = _kept_folder(given)
        return folder, _take(folder)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        raise Failure(
            f"the private servers' data cannot be kept there: {reason}; give --data DIR, a folder of yours"
        ) from error


def _kept_folder(given: Path | None) -> Path:
    """Make the folder of the data, or take the one that is there."""
    account = Account.choose()
    folder = Path.cwd() / given if given is not None else default_folder(Path.cwd(), account)
    is_new = not folder.exists()
    keep_directory(folder, account)
    if is_new:
        (folder / ".gitignore").write_text("*\n")
    return folder


def _take(folder: Path) -> int:
    """Lock the folder for this session. The servers' own locks are waited for, as after a session that was killed."""
    lock = os.open(folder / "dev.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Failure(f"another `jobq dev` uses {folder}: end that one, or give this one its own --data DIR") from None
    return lock


def default_folder(here: Path, account: Account) -> Path:
    """Where the data of the application in `here` is kept: there, unless the servers' account cannot get there."""
    if account.can_reach(here):
        return here / _FOLDER
    # Root's own folders are closed to `nobody`. In this one, nobody but root makes files.
    digest = hashlib.sha256(str(here).encode()).hexdigest()[:8]
    return Path("/var/lib/jobq") / f"dev-{here.name}-{digest}"


def _tell(folder: Path, urls: dict[str, str]) -> None:
    exports = {name: f"export {name}={shlex.quote(url)}" for name, url in urls.items()}
    variables = folder / "env"
    variables.write_text("".join(f"{line}\n" for line in exports.values()))
    variables.chmod(0o600)
    for name, option in (("JOBQ_DATABASE_URL", "--postgres"), ("JOBQ_REDIS_URL", "--redis")):
        if os.environ.get(name, urls[name]) != urls[name]:
            click.echo(f"{name} of the environment is not used here; {option} would say to use it.", err=True)
    shown = "\n".join(f"  {mask(line)}" for line in exports.values())
    click.echo(
        f"Private servers run for this session. Their data is kept in {folder}\n"
        f"(to start afresh: end this, then rm -r {shlex.quote(str(folder))}).\n"
        f"For a web process in another terminal: . {shlex.quote(str(variables))}\n{shown}",
        err=True,
    )


def places_of(module: str) -> list[Path]:
    """Where to watch: the working directory, and the application's own folder or file if that is elsewhere."""
    here = Path.cwd()
    spec = PathFinder.find_spec(module.partition(".")[0], [str(here), *sys.path])
    if spec is None:
        return [here]
    found = [Path(place).resolve() for place in spec.submodule_search_locations or [spec.origin or str(here)]]
    return [here, *(place for place in found if not place.is_relative_to(here))]
