"""How data looks on stdout: tables for people, JSON for programs.

Invariant: nothing that came from a database or from Redis can move a terminal's cursor. Called by the commands that
list. Calls masking.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import date, datetime
from typing import Any

import click

from .masking import mask


def show_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print aligned columns; those whose header begins with > to the right."""
    titles = [header.removeprefix(">") for header in headers]
    lines = [titles, *([cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        parts = (
            text.rjust(width) if header.startswith(">") else text.ljust(width)
            for text, width, header in zip(line, widths, headers, strict=True)
        )
        click.echo("  ".join(parts).rstrip())


def show_fields(fields: dict[str, Any]) -> None:
    """Print one value a line, with its name."""
    width = max(map(len, fields))
    for name, value in fields.items():
        click.echo(f"{name.ljust(width)}  {cell(value)}")


def as_document(row: Any, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """A named tuple as what the other functions print; JSON in `headers` and `args` becomes part of it."""
    document = {name: value for name, value in row._asdict().items() if name not in without}
    if document.get("last_error") is not None:
        document["last_error"] = mask(document["last_error"])
    for name in ("headers", "args"):
        if document.get(name) is not None:
            with suppress(ValueError, RecursionError):  # of another program: text, where it is too deep or too long
                document[name] = json.loads(document[name])
    return document


def show_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, default=_plain, indent=2))


def cell(value: Any) -> str:
    """One value as text without line breaks or control characters."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().isoformat(sep=" ", timespec="seconds")
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 3.2s, 12m, 5h, 9d."""
    if seconds is None:
        return "-"
    seconds = max(seconds, 0.0)
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"


def _plain(value: Any) -> str:
    return value.isoformat() if isinstance(value, date) else str(value)
