"""What the demo shows while it runs: a bar on a terminal, plain lines elsewhere. All of it on stderr.

Invariant: rich is imported only for a terminal. Called by demo and faults.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_EVERY_S = 3.0


class Standing(NamedTuple):
    """How far it all is."""

    sent: int
    booked: int
    mailed: int
    waiting: int


class Screen:
    """Lines with the time since the start, and now and then how far it is."""

    def __init__(self, total: int):
        self._total = total
        self._started_at = time.monotonic()
        self._next_line_at = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_at

    def say(self, text: str) -> None:
        """Tell one thing that happened."""
        click.echo(self._line(text), err=True)

    def show(self, standing: Standing) -> None:
        """Show how far it is, not more often than every few seconds."""
        if standing.sent and time.monotonic() >= self._next_line_at:
            self._next_line_at = time.monotonic() + _LINE_EVERY_S
            self.say(f"{standing.sent:,} of {self._total:,} orders sent, {_rest(standing)}")

    def end(self) -> None:
        """Make way for what comes on stdout."""

    def _line(self, text: str) -> str:
        return f"{self.elapsed_s:5.1f} s  {text}"


class BarScreen(Screen):
    """The same lines above a bar that moves."""

    def __init__(self, total: int, progress: Progress, bar: TaskID):
        super().__init__(total)
        self._progress = progress
        self._bar = bar

    def say(self, text: str) -> None:
        self._progress.console.print(self._line(text), markup=False, highlight=False)

    def show(self, standing: Standing) -> None:
        self._progress.update(self._bar, completed=standing.sent, rest=_rest(standing))

    def end(self) -> None:
        self._progress.stop()


@contextmanager
def open_screen(total: int) -> Iterator[Screen]:
    """Choose what fits stderr."""
    if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield Screen(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("orders"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rest]}"))
    # Not redirected: what goes to stdout, a file perhaps, is none of the bar's.
    progress = Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
    with progress:
        yield BarScreen(total, progress, progress.add_task("orders", total=total, rest=""))


def _rest(standing: Standing) -> str:
    return f"{standing.booked:,} booked, {standing.mailed:,} receipts mailed, {standing.waiting:,} jobs wait or run"
