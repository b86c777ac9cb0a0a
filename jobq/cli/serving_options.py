"""The options of the processes that serve, as the command line, JOBQ_<NAME> and `[tool.jobq]` give them.

Called by run and doctor. Calls options, queues, probes, settings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..app import JobQ
from ..settings import WorkerSettings
from .options import SIZE, from_pyproject
from .probes import AddressType
from .queues import Queues, queues_options

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])

_DEFAULTS = WorkerSettings()
_SHORTEST_FROZEN_S = 60.0
"""One call to PostgreSQL may take 30 s: a store that is slow must not count as a crash of every job that runs."""


def setting(flag: str, *flags: str, default: float | None, **options: Any) -> Callable[[Command], Command]:
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


def lease_options(command: Command) -> Command:
    """--lease and --beat, which all workers and relays of a database are to share."""
    lease = setting(
        "--lease",
        default=_DEFAULTS.lease,
        type=click.FloatRange(min=1),
        metavar="SECONDS",
        help="A worker not heard of for this long loses its jobs. The same for every worker and relay.",
    )
    beat = setting(
        "--beat",
        default=None,
        type=click.FloatRange(min=0.05),
        metavar="SECONDS",
        help="Between two heartbeats (default: a fifth of the lease, 2 at most). The same for every worker and relay.",
    )
    return lease(beat(command))


def health_options(command: Command) -> Command:
    """--health and --frozen-after: how others see that the process lives, and when it gives up by itself."""
    health = setting(
        "--health",
        default=None,
        type=AddressType(),
        metavar="HOST:PORT",
        help="Answer /healthz and /readyz over HTTP there.",
    )
    frozen_after = setting(
        "--frozen-after",
        default=_DEFAULTS.frozen_after,
        type=click.FloatRange(min=_SHORTEST_FROZEN_S),
        metavar="SECONDS",
        help="Exit with 6 when no turn was taken for this long, so that a supervisor starts another.",
    )
    return health(frozen_after(command))


def beat_of(lease: float, beat: float | None) -> float:
    """Seconds between two heartbeats, given or after the lease. Raises UsageError."""
    if beat is None:
        return min(_DEFAULTS.beat, lease / 5)
    if beat > lease / 3:
        raise click.UsageError(f"--beat {beat:g} is too long for --lease {lease:g}: a third of it at most")
    return beat


def worker_options(command: Callable[..., T]) -> Callable[..., T]:
    """The options of a worker, passed on as `make_settings`, which wants the application."""

    @queues_options
    @setting(
        "--concurrency",
        "-c",
        default=_DEFAULTS.concurrency,
        type=click.IntRange(1, 10_000),
        metavar="N",
        help="Jobs that run at the same time.",
    )
    @setting(
        "--threads",
        default=_DEFAULTS.threads,
        type=click.IntRange(1, 1_000),
        metavar="N",
        help="Synchronous tasks that run at the same time.",
    )
    @setting(
        "--grace",
        default=_DEFAULTS.grace,
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="Given to running jobs when the worker is to stop.",
    )
    @setting(
        "--max-jobs",
        default=None,
        type=click.IntRange(min=1),
        metavar="N",
        help="Make room for a fresh process after this many runs: fetch no more, let what runs end, exit 0.",
    )
    @setting(
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
        beat_s = beat_of(lease, beat)

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


loop_option = click.option(
    "--loop",
    type=click.Choice(["auto", "asyncio", "uvloop"]),
    default="auto",
    show_default=True,
    help="auto: uvloop where it is installed.",
)


wake_up_option = click.option(
    "--wake-up",
    type=click.Choice(["notify", "poll"]),
    envvar="JOBQ_WAKE_UP",
    show_envvar=True,
    default="notify",
    show_default=True,
    help="How the relay learns of a commit. poll: every 2 to 25 ms, where NOTIFY is not to be used.",
)
