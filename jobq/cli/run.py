"""`jobq run`, `jobq relay`, `jobq worker`: the processes that serve.

Called by the command group. Calls serving_options, serving, worker, relay.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import click

from ..app import JobQ
from ..errors import ConfigurationError
from ..relay.leadership import Relay
from ..settings import RelaySettings, WakeUpBy, WorkerSettings
from ..worker.worker import Worker
from .options import app_argument, database_url_option, logging_options, open_app, redis_url_option, schema_option
from .probes import Address
from .processes import supervisor as supervisor_script
from .processes.supervised import Line
from .serving import end_with, serve_relay, serve_worker
from .serving_options import (
    beat_of,
    health_options,
    lease_options,
    loop_option,
    setting,
    wake_up_option,
    worker_options,
)
from .stores import find_stores


@click.command()
@app_argument
@lease_options
@wake_up_option
@health_options
@loop_option
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
    settings = RelaySettings(beat=beat_of(lease, beat), wake_up=wake_up, frozen_after=frozen_after)
    serving = Relay(stores.database, stores.redis_url, stores.schema, settings)
    end_with(loop, lambda: serve_relay(serving), serving, health=health)


@click.command()
@app_argument
@setting(
    "--processes",
    default=None,
    type=click.IntRange(1, 64),
    metavar="N",
    help="Keep this many processes running under a supervisor (default: this one, without).",
)
@worker_options
@lease_options
@health_options
@loop_option
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
@worker_options
@lease_options
@wake_up_option
@health_options
@loop_option
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
