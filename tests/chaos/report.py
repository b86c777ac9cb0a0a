"""What is said of a run: one table of the faults, the distribution of restarts, and a verdict on each invariant."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from tests.chaos.checker import Window
from tests.chaos.faults import FAULTS
from tests.chaos.run import Outcome
from tests.chaos.samples import Growth

MARKS = {kind: (f"<!-- the {kind} begins -->", f"<!-- the {kind} ends -->") for kind in ("run", "soak")}
PAIR = "two of these, the second before the first was repaired"
NO_FAULT = "no fault"
INVARIANTS = {
    "I1": "every committed order has exactly one effect",
    "I2": "nothing ran, and no effect exists, for an order that was rolled back",
    "I3": "the outbox drained in time",
    "I4": "Redis holds nothing of finished jobs",
    "I5": "duplicate runs stayed under the bound of each fault",
    "I6": "generations only grew; no attempt or crash was counted twice or lost",
    "I7": "nothing leaked",
    "I8": "no completed job started again",
}


def write(page: Path, command: str, outcome: Outcome) -> None:
    """Put a run's result between the two marks that a page has for its kind."""
    begins, ends = MARKS["soak" if outcome.plan.shape.is_sampled else "run"]
    before, rest = page.read_text(encoding="utf-8").split(begins)
    _, after = rest.split(ends)
    told = f"```\n{command}\n```\n\n{table(outcome)}\n\n```\n{summary(outcome)}\n```"
    page.write_text(f"{before}{begins}\n\n{told}\n\n{ends}{after}", encoding="utf-8")


def table(outcome: Outcome) -> str:
    """The faults, as a table in Markdown."""
    groups: dict[str, list[Window]] = defaultdict(list)
    for window in outcome.windows:
        groups[_group(window)].append(window)
    lines = ["| fault | count | jobs | duplicate runs | allowed | slowest recovery |", "|---|---|---|---|---|---|"]
    for about in [*(fault.about for fault in FAULTS.values()), PAIR, NO_FAULT]:
        if windows := groups.get(about):
            count = len(windows) if about != NO_FAULT else ""
            jobs = sum(window.jobs for window in windows)
            duplicates = sum(len(window.duplicates) for window in windows)
            allowed = sum(window.bound for window in windows)
            slowest = f"{max(window.recovery_s for window in windows):.1f} s" if about != NO_FAULT else ""
            lines.append(f"| {about} | {count} | {jobs:,} | {duplicates} | {allowed} | {slowest} |")
    return "\n".join(lines)


def _group(window: Window) -> str:
    if len(window.faults) > 1:
        return PAIR
    return FAULTS[window.faults[0]].about if window.faults else NO_FAULT


def summary(outcome: Outcome) -> str:
    """Everything but the table."""
    found = outcome.findings
    faults = sum(len(window.faults) for window in outcome.windows)
    lines = [
        f"{faults} faults, {found.jobs:,} jobs, {found.runs:,} runs, {found.duplicates} of them duplicates; "
        f"{found.lost} commits lost by PostgreSQL.",
        f"Drained in {outcome.drained_s:.1f} s; {outcome.lasted_s:.0f} s in all.",
        restarts(found.restarts_s, outcome.plan.shape.lease_s),
        *growth(outcome.growth),
        "",
    ]
    for number, says in INVARIANTS.items():
        broken = {name: what for name, what in found.broken.items() if name.startswith(number)}
        lines.append(f"{number} {'BROKEN' if broken else 'holds'}: {says}")
        for name, what in broken.items():
            lines += [f"    {name}, but:", *[f"        {line}" for line in what]]
    return "\n".join(lines)


def growth(found: list[Growth]) -> list[str]:
    """The figures of every process, first quarter against last."""
    lines: dict[str, list[str]] = defaultdict(list)
    for one in found:
        lines[one.process].append(f"{one.figure} {one.first:.0f} -> {one.last:.0f}")
    return [f"{process}: {', '.join(figures)}" for process, figures in lines.items()]


def restarts(seconds: list[float], lease_s: float) -> str:
    if not seconds:
        return "No job was in the hands of a killed worker."
    shares = ", ".join(f"{share} % {_at(seconds, share):.1f} s" for share in (50, 90, 99))
    return (
        f"{len(seconds)} jobs of killed workers ran again: {shares}, the last {seconds[-1]:.1f} s after the SIGKILL "
        f"(lease {lease_s:g} s)."
    )


def _at(ordered: list[float], share: int) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * share // 100)]
