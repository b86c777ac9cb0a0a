"""What runs leave: one JSON line a figure, a Markdown table a group, and the tables within benchmarks/README.md.

Invariant: a new run replaces the lines of what it measured, and no others. Called by __main__. Calls targets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from .figures import Figure
from .targets import Verdict

Line: TypeAlias = dict[str, Any]
"""One figure as it is kept: name, unit, statistics, samples, and where, when and with what it was measured."""

Table: TypeAlias = Callable[[Sequence[Line]], str]
"""A group's lines in Markdown."""

PERCENTS = (50, 99, 99.9)
_SIGNIFICANT = 6


def line(figure: Figure, circumstances: Line) -> Line:
    """A figure as it is kept. Of a distribution that is not the samples, but how many there were."""
    kept: Line = {"name": figure.name, "unit": figure.unit, "about": figure.about}
    kept |= {"median": _rounded(figure.median)}
    kept |= {"min": _rounded(min(figure.samples)), "max": _rounded(max(figure.samples))}
    if figure.is_distribution:
        kept |= {f"p{percent}": _rounded(figure.percentile(percent)) for percent in PERCENTS}
        kept |= {"count": len(figure.samples)}
    else:
        kept |= {"samples": list(map(_rounded, figure.samples))}
    return kept | {"runs": len(figure.others_cpu), "others_cpu": max(map(_rounded, figure.others_cpu))} | circumstances


def failure(measure: str, reason: str, circumstances: Line) -> Line:
    """What is kept of a measure that yielded nothing."""
    return {"name": measure, "failed": reason} | circumstances


def merged(before: Sequence[Line], new: Sequence[Line], order: Sequence[str]) -> list[Line]:
    """The lines before without those of the measures that `new` is of, and `new`, in the order of the measures."""
    measured = {measure_of(line["name"], order) for line in new}
    kept = [line for line in before if measure_of(line["name"], order) not in measured]
    places = {name: place for place, name in enumerate(order)}
    return sorted([*kept, *new], key=lambda line: places.get(measure_of(line["name"], order), len(places)))


def read(directory: Path) -> list[Line]:
    path = directory / "figures.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def write(directory: Path, lines: Sequence[Line], tables: Mapping[str, Table] | None = None) -> None:
    """Write all lines, and the table of each group: as its own `tables` has it, or as all others."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "figures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for group in groups(lines):
        (directory / f"{group}.md").write_text((tables or {}).get(group, table)(of_group(lines, group)))


def groups(lines: Iterable[Line]) -> list[str]:
    return list(dict.fromkeys(_group(line) for line in lines))


def of_group(lines: Iterable[Line], group: str) -> list[Line]:
    return [line for line in lines if _group(line) == group]


def table(lines: Sequence[Line]) -> str:
    """A group in Markdown: figures with one sample a run, then distributions, then where they were measured."""
    plain = [line for line in lines if "samples" in line]
    spread = [line for line in lines if "count" in line]
    rows: list[str] = []
    if plain:
        rows += ["| | median | min to max | | others' CPU |", "|---|---:|---:|---|---:|"]
        rows += [
            f"| {_title(line)} | {number(line['median'])} | {number(line['min'])} to {number(line['max'])}"
            f" | {line['unit']} | {line['others_cpu']:.0%} |"
            for line in plain
        ]
        rows.append("")
    if spread:
        rows += ["| | p50 | p99 | p99.9 | | samples | others' CPU |", "|---|---:|---:|---:|---|---:|---:|"]
        rows += [
            f"| {_title(line)} | {' | '.join(number(line[f'p{percent}']) for percent in PERCENTS)}"
            f" | {line['unit']} | {line['count']:,} | {line['others_cpu']:.0%} |"
            for line in spread
        ]
        rows.append("")
    return "\n".join([*rows, *failures(lines), *notes([*plain, *spread]), ""])


def failures(lines: Sequence[Line]) -> list[str]:
    """Who could not be measured, and why, in Markdown."""
    failed = [line for line in lines if "failed" in line]
    found = [f"- `{line['name'].partition('/')[2]}` could not be measured: {line['failed']}" for line in failed]
    return [*found, ""] if found else []


def notes(lines: Sequence[Line]) -> list[str]:
    """Where, when and with what figures were measured, once for all that share it."""
    said: dict[str, list[str]] = {}
    for line in lines:
        versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
        machine = f"{line['cores']} cores ({line['cpu']})"
        note = f"{line['date']}, {line['runs']} runs, {machine}. {versions}. `{line['command']}`"
        said.setdefault(note, []).append(line["name"].partition("/")[2])
    if len(said) == 1:
        return list(said)
    return [f"- {note} ({', '.join(f'`{name}`' for name in names)})" for note, names in said.items()]


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Targets, figures, and whether they are met."""
    rows = ["| target | | found | |", "|---|---:|---:|---|"]
    for verdict in verdicts:
        target = verdict.target
        bound = f"{'<=' if target.is_most else '>='} {number(target.bound)} {target.unit}".strip()
        rows.append(f"| {target.what} | {bound} | {number(verdict.found)} | {'met' if verdict.is_met else 'missed'} |")
    return "\n".join([*rows, ""])


def with_tables(text: str, directory: Path) -> str:
    """A page with each block `<!-- results: NAME -->` ... `<!-- end -->` holding NAME.md and its plot."""

    def filled(match: re.Match[str]) -> str:
        name = match[1]
        path = directory / f"{name}.md"
        if not path.exists():
            return match[0]
        plot = f"\n![{name}](results/{name}.svg)\n" if (directory / f"{name}.svg").exists() else ""
        return f"<!-- results: {name} -->\n{path.read_text()}{plot}<!-- end -->"

    return re.sub(r"<!-- results: ([\w-]+) -->.*?<!-- end -->", filled, text, flags=re.DOTALL)


def number(value: float) -> str:
    """Three digits, and all of those before the point."""
    digits = 0 if abs(value) >= 100 or value == 0 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4
    return f"{value:,.{digits}f}"


def _title(line: Line) -> str:
    name = line["name"].partition("/")[2] or line["name"]
    return f"`{name}`: {line['about']}" if line["about"] else f"`{name}`"


def measure_of(name: str, order: Sequence[str]) -> str:
    """The measure that a figure is of: the longest name that it begins with."""
    found = [measure for measure in order if name == measure or name.startswith(f"{measure}/")]
    return max(found, key=len, default=name)


def _group(line: Line) -> str:
    return str(line["name"].partition("/")[0])


def _rounded(value: float) -> float:
    return float(f"{value:.{_SIGNIFICANT}g}")
