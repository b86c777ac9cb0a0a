"""`python3 dev.py chaos`: break things for a while, and say whether anything was lost or happened twice."""

from __future__ import annotations

import random
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


@click.command()
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(min=10), help="Time under load.")
@click.option("--seed", type=int, help="Repeat the order of faults of another run (default: a new one).")
@click.option("--faults", metavar="NAME,...", help="These only; none: load without faults (default: all).")
@click.option("--lease", default=SHAPE.lease_s, show_default=True, help="Seconds.")
@click.option("--rate", default=SHAPE.orders_per_second, show_default=True, help="Orders per second.")
def main(seconds: float, seed: int | None, faults: str | None, lease: float, rate: float) -> None:
    """Break things for a while, and say whether anything was lost or happened twice."""
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    names = list(FAULTS) if faults is None else [name for name in faults.split(",") if name != "none"]
    if strangers := set(names) - FAULTS.keys():
        raise click.UsageError(f"no fault {', '.join(sorted(strangers))}; there are {', '.join(FAULTS)}")
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    plan = Plan(
        seconds=seconds,
        seed=seed,
        faults=names,
        folder=folder,
        shape=Shape(lease_s=lease, beat_s=lease / 6, orders_per_second=rate),
    )
    again = f"python3 dev.py chaos --seconds {seconds:g} --seed {seed} --lease {lease:g} --rate {rate:g}"
    again += f" --faults {faults}" if faults else ""
    print(f"{again}\n", flush=True)
    try:
        outcome = anyio.run(run, plan, lambda line: print(line, flush=True))
    except AssertionError as error:
        sys.exit(f"\nThe run broke off: {error}\nLogs: {folder}\nAgain: {again}")
    print(f"\n{report.table(outcome)}\n\n{report.summary(outcome)}")
    if outcome.findings.broken:
        sys.exit(f"\nLogs: {folder}\nAgain: {again}")
    shutil.rmtree(folder)


main()
