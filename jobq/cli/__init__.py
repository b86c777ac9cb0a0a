"""The `jobq` command: the table of its subcommands.

Invariant: `jobq --help` imports no subcommand.
Called by the console script. Calls the module of the one subcommand that was asked for, and failures.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from .failures import failures_explained

_COMMANDS = {
    "demo": ("jobq.cli.demo:demo", "Run a shop on private servers, break them, count the jobs."),
    "dev": ("jobq.cli.dev:dev", "Run APP's jobs on private servers, reloading its code."),
    "run": ("jobq.cli.run:run", "Run relay and worker of APP in one process."),
    "relay": ("jobq.cli.run:relay", "Bring committed jobs from PostgreSQL to Redis."),
    "worker": ("jobq.cli.run:worker", "Run the jobs of APP."),
    "migrate": ("jobq.cli.migrate:migrate", "Create, upgrade or inspect the tables."),
    "status": ("jobq.cli.status:status", "Count what waits, runs and failed."),
    "jobs": ("jobq.cli.jobs:jobs", "List, show, cancel or hasten waiting jobs."),
    "dead": ("jobq.cli.dead:dead", "List, show, retry or discard dead jobs."),
    "doctor": ("jobq.cli.doctor:doctor", "Check the set-up and say what to do."),
    "version": ("jobq.cli.version:version", "Show the versions of jobq and its tables."),
}


class _Commands(click.Group):
    """A group whose commands are imported when one is called, and whose failures end in one place."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        with failures_explained(ctx):
            return super().invoke(ctx)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a check or command failed, 2 usage, 3 APP cannot be imported, "
    "4 PostgreSQL or Redis cannot be reached, 5 the tables do not fit, 6 stopped by force or frozen, 130 Ctrl-C. "
    "JOBQ_DEBUG=1 shows tracebacks.",
)
def cli() -> None:
    """Run jobs that were committed with your data.

    APP is the module:attribute of a JobQ. JOBQ_APP, or app in [tool.jobq] of pyproject.toml, is its default.
    """


def main() -> None:
    """Run the command line of this process, and exit."""
    cli(prog_name="jobq")
