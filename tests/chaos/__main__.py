"""`python3 dev.py chaos`: break things for a while, and say whether anything was lost or happened twice."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import anyio
import click

from tests.chaos import report
from tests.chaos.faults import FAULTS
from tests.chaos.run import Plan, run
from tests.chaos.stage import Shape

SHAPE = Shape()
SOAKED = ("tests.chaos.store_faults", "tests.chaos.postgres_faults")
"""Where the faults are that leave every process alive."""


@click.command()
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(min=10), help="Time under load.")
@click.option("--rounds", type=click.IntRange(min=1), help="In place of a time: so many rounds of all faults.")
@click.option("--seed", type=int, help="Repeat the order of faults of another run (default: a new one).")
@click.option("--faults", metavar="NAME,...", help="These only; none: load without faults (default: all).")
@click.option("--lease", default=SHAPE.lease_s, show_default=True, help="Seconds.")
@click.option("--rate", default=SHAPE.orders_per_second, show_default=True, help="Orders per second.")
@click.option("--soak", is_flag=True, help="Leave all processes alive, and see whether they grow.")
@click.option("--python", "pythons", multiple=True, help="Relays and workers take turns with these interpreters.")
@click.option("--loop", "loops", multiple=True, help="The same for event loops: asyncio, uvloop.")
@click.option("--write", "page", type=click.Path(path_type=Path), help="Put the result into this page.")
def main(
    seconds: float,
    rounds: int | None,
    seed: int | None,
    faults: str | None,
    lease: float,
    rate: float,
    soak: bool,
    pythons: tuple[str, ...],
    loops: tuple[str, ...],
    page: Path | None,
) -> None:
    """Break things for a while, and say whether anything was lost or happened twice."""
    if seed is None:
        seed = random.SystemRandom().randrange(10**6)
        sys.argv += ["--seed", str(seed)]
    again = f"python3 dev.py chaos {shlex.join(sys.argv[1:])}"
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"{again}\nLogs, kept if it fails: {folder}\n", flush=True)
    shape = Shape(
        lease_s=lease,
        beat_s=lease / 6,
        orders_per_second=rate,
        pythons=tuple(map(os.path.abspath, pythons)) or SHAPE.pythons,
        loops=loops or SHAPE.loops,
        is_sampled=soak,
    )
    plan = Plan(seconds=seconds, rounds=rounds, seed=seed, faults=_chosen(faults, soak), folder=folder, shape=shape)
    try:
        outcome = anyio.run(run, plan, lambda line: print(line, flush=True))
    except AssertionError as error:
        sys.exit(f"\nThe run broke off: {error}\n\nLogs: {folder}\nAgain: {again}")
    print(f"\n{report.table(outcome)}\n\n{report.summary(outcome)}")
    if page is not None:
        report.write(page, again, outcome)
    if outcome.findings.broken:
        sys.exit(f"\nLogs: {folder}\nAgain: {again}")
    shutil.rmtree(folder)


def _chosen(faults: str | None, soak: bool) -> list[str]:
    if faults is None:
        return [name for name, fault in FAULTS.items() if not soak or fault.strike.__module__ in SOAKED]
    names = [name for name in faults.split(",") if name != "none"]
    if strangers := set(names) - FAULTS.keys():
        raise click.UsageError(f"no fault {', '.join(sorted(strangers))}; there are {', '.join(FAULTS)}")
    return names


if __name__ == "__main__":
    main()
