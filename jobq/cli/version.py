"""`jobq version`: what to write into a bug report. Called by the command group. Calls migrate."""

from __future__ import annotations

import platform

import click

from .. import __version__, migrate


@click.command()
def version() -> None:
    """Show the versions of jobq and its tables."""
    click.echo(f"jobq {__version__}")
    click.echo(f"tables {migrate.heads()[0]}")
    click.echo(f"python {platform.python_version()}")
