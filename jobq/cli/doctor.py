"""`jobq doctor`: is everything set up as it has to be. Called by the command group. Calls findings."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

import click

from ..settings import WorkerSettings
from .failures import ExitCode
from .findings import Finding
from .findings.examine import examine
from .options import app_argument, database_url_option, redis_url_option, schema_option
from .serving_options import setting
from .stores import find_stores
from .tables import show_json

_COLORS = {"ok": "green", "note": "cyan", "warn": "yellow", "fail": "red"}


@click.command()
@app_argument
@setting(
    "--concurrency",
    "-c",
    default=WorkerSettings().concurrency,
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="Slots of a worker, to compare with the pool of connections.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@database_url_option
@redis_url_option
@schema_option
def doctor(
    app: str | None,
    concurrency: int,
    as_json: bool,
    database_url: str | None,
    redis_url: str | None,
    schema: str | None,
) -> None:
    """Check the set-up and say what to do.

    Exits with 1 when something fails; what is to be mended (warn) or just known (note) does not change the code. It
    changes nothing, and takes up to 5 seconds to see who lives.

    \b
    Examples:
      jobq doctor shop.jobs:jobs
      jobq doctor --database-url postgresql://... --redis-url redis://...
    """
    stores = find_stores(app, database_url=database_url, redis_url=redis_url, schema=schema)
    findings = stores.run(lambda stores: examine(stores, concurrency))
    if as_json:
        show_json([asdict(finding) for finding in findings])
    else:
        _show(findings)
    if any(finding.level == "fail" for finding in findings):
        sys.exit(ExitCode.FAILED)


def _show(findings: Sequence[Finding]) -> None:
    has_color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    width = max(len(finding.about) for finding in findings)
    for finding in findings:
        level = f"{finding.level:4}"
        shown = click.style(level, fg=_COLORS[finding.level]) if has_color else level
        click.echo(f"{shown}  {finding.about.ljust(width)}  {finding.found}")
        if finding.remedy:
            click.echo(f"{' ' * (width + 8)}{finding.remedy}")
    number = sum(finding.level in ("warn", "fail") for finding in findings)
    click.echo(f"{number} of {len(findings)} need attention" if number else f"all {len(findings)} are well", err=True)
