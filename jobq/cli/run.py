"""`jobq run`, `jobq relay`, `jobq worker`: the options of the processes that serve.

Called by the command group. Calls serving, worker, relay.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click

from ..app import JobQ
from ..errors import ConfigurationError
from ..relay.leadership import Relay
from ..settings import RelaySettings, WakeUpBy, WorkerSettings
from ..worker.worker import Worker
from . import supervisor as supervisor_script
from .options import (
    SIZE,
    app_argument,
    database_url_option,
    from_pyproject,
    logging_options,
    open_app,
    redis_url_option,
    schema_option,
)
from .probes import Address, AddressType
from .queues import Queues, queues_options
from .serving import end_with, serve_relay, serve_worker
from .stores import find_stores
from .supervised import Line

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])

_DEFAULTS = WorkerSettings()
_SHORTEST_FROZEN_S = 60.0
"""One call to PostgreSQL may take 30 s: a store that is slow must not count as a crash of every job that runs."""


def _setting(flag: str, *flags: str, default: float | None, **options: Any) -> Callable[[Command], Command]:
    """An option with a variable JOBQ_<name> and a place in [tool.jobq]."""
    name = flag.removeprefix("--").replace("-", "_")

    def from_file() -> Any:
        found = from_pyproject(name)()
        return default if found is None else found

    shown = None if default is None else f"{default:g}"
    return click.option(
        flag,
        *flags,
        envvar=f"JOBQ_{name.upper()}",
        show_envvar=True,
        default=from_file,
        show_default=shown or False,
        **options,
    )


def _lease_options(command: Command) -> Command:
    """--lease and --beat, which all workers and relays of a database are to share."""
    lease = _setting(
        "--lease",
        default=_DEFAULTS.lease,
        type=click.FloatRange(min=1),
        metavar="SECONDS",
        help="A worker not heard of for this long loses its jobs. The same for every worker and relay.",
    )
    beat = _setting(
        "--beat",
        default=None,
        type=click.FloatRange(min=0.05),
        metavar="SECONDS",
        help="Between two heartbeats (default: a fifth of the lease, 2 at most). The same for every worker and relay.",
    )
    return lease(beat(command))


def _health_options(command: Command) -> Command:
    """--health and --frozen-after: how others see that the process lives, and when it gives up by itself."""
    health = _setting(
        "--health",
        default=None,
        type=AddressType(),
        metavar="HOST:PORT",
        help="Answer /healthz and /readyz over HTTP there.",
    )
    frozen_after = _setting(
        "--frozen-after",
        default=_DEFAULTS.frozen_after,
        type=click.FloatRange(min=_SHORTEST_FROZEN_S),
        metavar="SECONDS",
        help="Exit with 6 when no turn was taken for this long, so that a supervisor starts another.",
    )
    return health(frozen_after(command))


def _beat_of(lease: float, beat: float | None) -> float:
    if beat is None:
        return min(_DEFAULTS.beat, lease / 5)
    if beat > lease / 3:
        raise click.UsageError(f"--beat {beat:g} is too long for --lease {lease:g}: a third of it at most")
    return beat


def _worker_options(command: Callable[..., T]) -> Callable[..., T]:
    """The options of a worker, passed on as `make_settings`, which wants the application."""

    @queues_options
    @_setting(
        "--concurrency",
        "-c",
        default=_DEFAULTS.concurrency,
        type=click.IntRange(1, 10_000),
        metavar="N",
        help="Jobs that run at the same time.",
    )
    @_setting(
        "--threads",
        default=_DEFAULTS.threads,
        type=click.IntRange(1, 1_000),
        metavar="N",
        help="Synchronous tasks that run at the same time.",
    )
    @_setting(
        "--grace",
        default=_DEFAULTS.grace,
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="Given to running jobs when the worker is to stop.",
    )
    @_setting(
        "--max-jobs",
        default=None,
        type=click.IntRange(min=1),
        metavar="N",
        help="Make room for a fresh process after this many runs: fetch no more, let what runs end, exit 0.",
    )
    @_setting(
        "--max-rss",
        default=None,
        type=SIZE,
        metavar="SIZE",
        help="The same when the process holds this much memory: bytes, or 512M, 1.5G.",
    )
    @functools.wraps(command)
    def with_worker(
        queues: Queues,
        strict: bool,
        concurrency: int,
        threads: int,
        grace: float,
        max_jobs: int | None,
        max_rss: int | None,
        lease: float,
        beat: float | None,
        frozen_after: float,
        **options: Any,
    ) -> T:
        beat_s = _beat_of(lease, beat)

        def make_settings(jobs: JobQ) -> WorkerSettings:
            return WorkerSettings(
                queues=tuple(queues or sorted({task.queue for task in jobs.tasks.values()})),
                weights={name: weight for name, weight in queues.items() if weight is not None},
                strict=strict,
                concurrency=concurrency,
                threads=threads,
                grace=grace,
                max_jobs=max_jobs,
                max_rss=max_rss,
                lease=lease,
                beat=beat_s,
                frozen_after=frozen_after,
            )

        return command(make_settings=make_settings, beat=beat_s, frozen_after=frozen_after, **options)

    return with_worker


_loop_option = click.option(
    "--loop",
    type=click.Choice(["auto", "asyncio", "uvloop"]),
    default="auto",
    show_default=True,
    help="auto: uvloop where it is installed.",
)


_wake_up_option = click.option(
    "--wake-up",
    type=click.Choice(["notify", "poll"]),
    envvar="JOBQ_WAKE_UP",
    show_envvar=True,
    default="notify",
    show_default=True,
    help="How the relay learns of a commit. poll: every 2 to 25 ms, where NOTIFY is not to be used.",
)


@click.command()
@app_argument
@_lease_options
@_wake_up_option
@_health_options
@_loop_option
@database_url_option
@redis_url_option
@schema_option
@logging_options
def relay(
    app: str | None,
    lease: float,
    beat: float | None,
    wake_up: WakeUpBy,
    frozen_after: float,
    health: Address | None,
    loop: str,
    database_url: str | None,
    redis_url: str | None,
    schema: str | None,
) -> None:
    """Bring committed jobs from PostgreSQL to Redis.

    One relay leads, others stand by: run two. APP is not needed where both URLs are given.

    \b
    Examples:
      jobq relay shop.jobs:jobs
      JOBQ_DATABASE_URL=postgresql://... JOBQ_REDIS_URL=redis://... jobq relay
    """
    stores = find_stores(app, database_url=database_url, redis_url=redis_url, schema=schema)
    assert stores.redis_url is not None
    settings = RelaySettings(beat=_beat_of(lease, beat), wake_up=wake_up, frozen_after=frozen_after)
    serving = Relay(stores.database, stores.redis_url, stores.schema, settings)
    end_with(loop, lambda: serve_relay(serving), serving, health=health)


@click.command()
@app_argument
@_setting(
    "--processes",
    default=None,
    type=click.IntRange(1, 64),
    metavar="N",
    help="Keep this many processes running under a supervisor (default: this one, without).",
)
@_worker_options
@_lease_options
@_health_options
@_loop_option
@database_url_option
@redis_url_option
@schema_option
@logging_options
def worker(
    app: str | None,
    processes: int | None,
    make_settings: Callable[[JobQ], WorkerSettings],
    beat: float,
    frozen_after: float,
    health: Address | None,
    loop: str,
    database_url: str | None,
    redis_url: str | None,
    schema: str | None,
) -> None:
    """Run the jobs of APP.

    Signals: TSTP fetches nothing more; TERM or INT stops, and what still runs after the grace goes back to run
    elsewhere; the same again stops at once.

    \b
    Examples:
      jobq worker shop.jobs:jobs
      jobq worker shop.jobs:jobs -q mail:5,default:3 -c 50
      jobq worker shop.jobs:jobs -q urgent,default --strict
      jobq worker shop.jobs:jobs --processes 4 --max-rss 512M
    """
    supervisor = Line.find()
    if processes is not None and health is not None:
        raise click.UsageError(
            "--health and --processes exclude each other: every process would want the address. "
            "Run one process a container, or leave liveness to the supervisor"
        )
    if processes is not None and supervisor is None:
        _become_supervisor(processes)
    jobs = open_app(app, database_url=database_url, redis_url=redis_url, schema=schema)
    serving = _make_worker(app, jobs, make_settings)
    end_with(loop, lambda: serve_worker(serving, None, supervisor), serving, health=health)


@click.command()
@app_argument
@_worker_options
@_lease_options
@_wake_up_option
@_health_options
@_loop_option
@database_url_option
@redis_url_option
@schema_option
@logging_options
@click.option("--migrate", is_flag=True, hidden=True)  # for `jobq dev`
def run(
    app: str | None,
    migrate: bool,
    make_settings: Callable[[JobQ], WorkerSettings],
    beat: float,
    wake_up: WakeUpBy,
    frozen_after: float,
    health: Address | None,
    loop: str,
    database_url: str | None,
    redis_url: str | None,
    schema: str | None,
) -> None:
    """Run relay and worker of APP in one process.

    For development and small services; several of them share the work, and one of the relays leads.

    \b
    Example:
      jobq run shop.jobs:jobs
    """
    supervisor = Line.find()
    jobs = open_app(app, database_url=database_url, redis_url=redis_url, schema=schema)
    serving = _make_worker(app, jobs, make_settings)
    relay_settings = RelaySettings(beat=beat, wake_up=wake_up, frozen_after=frozen_after)
    beside = Relay(jobs.database, jobs.redis_url, jobs.schema, relay_settings)

    async def serve() -> int:
        if migrate:
            from .dev import make_tables

            await make_tables(jobs, database_url)
        return await serve_worker(serving, beside, supervisor)

    end_with(loop, serve, serving, beside, health=health)


def _become_supervisor(processes: int) -> NoReturn:
    """Turn this process into a light one, which starts this command again as its children."""
    options = click.get_current_context().params
    script = [supervisor_script.__file__, str(processes), options["log_format"], options["log_level"]]
    # They find themselves supervised, and so do not come here.
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execv(sys.executable, [sys.executable, "-I", "-S", *script, *command])  # noqa: S606


def _make_worker(spec: str | None, jobs: JobQ, make_settings: Callable[[JobQ], WorkerSettings]) -> Worker:
    if not jobs.tasks:
        raise ConfigurationError(
            f"{spec} has no tasks, so every job would be set aside: import the modules that define them beside it"
        )
    return Worker(jobs, make_settings(jobs))
