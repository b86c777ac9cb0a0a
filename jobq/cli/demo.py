"""`jobq demo`: whether the promise is kept, on this machine, in half a minute.

Called by the command group. Calls demo.
"""

from __future__ import annotations

import random
import signal
import sys
from importlib.util import find_spec

import click

from .failures import ExitCode, Failure

_NEEDED = ("aiosmtpd", "aiosmtplib", "httpx", "rich", "starlette", "uvicorn")


@click.command()
@click.option(
    "--jobs", "orders", type=click.IntRange(10, 1_000_000), default=2_000, show_default=True, help="Orders to send."
)
@click.option("--seed", type=click.IntRange(0), help="Repeat the random choices of an earlier demo.")
@click.option("--keep", is_flag=True, help="Leave servers, shop and workers up afterwards, until Ctrl-C.")
def demo(orders: int, seed: int | None, keep: bool) -> None:
    """Run a shop on private servers, break them, count the jobs.

    Each order is a row and two jobs, in one transaction. While customers order, a worker is killed, the leading
    relay is killed and Redis is emptied. In the end everything is counted: exit 1 if anything was lost, was
    booked twice, or ran for an order that was rolled back.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise Failure(f"the demo needs {', '.join(missing)}: pip install 'jobq[demo]'")
    from ..demo import run

    end_in_order()
    is_kept = run(orders, random.randrange(100_000) if seed is None else seed, keep=keep)  # noqa: S311
    sys.exit(ExitCode.OK if is_kept else ExitCode.FAILED)


def end_in_order() -> None:
    """Make TERM and HUP what Ctrl-C is, and Ctrl-C work also where a shell had switched it off."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
