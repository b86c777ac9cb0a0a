"""The comparison as a Markdown table and as JSON, one line for each peer.

Invariant: whoever could not be run stands there too, with the reason. Called by the command line. Calls nothing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from .peers import Peer
from .verdict import Verdict

_HEAD = (
    "peer",
    "version",
    "mode",
    "jobs/s, median (min-max)",
    "p50 ms",
    "p99 ms",
    "lost of 500",
    "twice",
    "all done after s",
    "settings",
)


@dataclass
class Row:
    """What was found of one peer."""

    peer: Peer
    version: str = ""
    jobs: int = 0
    drains: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    verdict: Verdict | None = None
    failures: dict[str, str] = field(default_factory=dict)
    """The reason for each trial that could not be made."""

    def quantile_ms(self, percent: int) -> float | None:
        if len(self.latencies_ms) < 2:
            return None
        return statistics.quantiles(self.latencies_ms, n=100, method="inclusive")[percent - 1]

    def as_json(self, machine: dict[str, object]) -> str:
        peer = self.peer
        return json.dumps(
            {
                "peer": peer.name,
                "version": self.version,
                "mode": peer.reliability,
                "settings": peer.settings,
                "source": peer.source,
                "recovery": peer.recovery,
                "jobs": self.jobs,
                "drain": [round(rate, 1) for rate in self.drains],
                "latency_ms": {
                    "samples": len(self.latencies_ms),
                    "p50": self.quantile_ms(50),
                    "p99": self.quantile_ms(99),
                },
                "killed": asdict(self.verdict) if self.verdict else None,
                "failures": self.failures,
                "machine": machine,
            }
        )


def markdown(rows: Iterable[Row], machine: dict[str, object]) -> str:
    """The whole page: what was run where, the table, who failed, and where the settings are from."""
    rows = list(rows)
    lines = [
        "# jobq and its peers",
        "",
        ", ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        "Rate: from the first run of a task to the last, as the tasks count them, one worker process.",
        "Latency: from the return of enqueue to the task's first line, one job at a time, idle system; 0: it had begun",
        "before enqueue returned.",
        "Lost, twice: 500 jobs of 0.2 s, 10 at a time, SIGKILL of the worker and its children 1 s after the first has",
        "ended, a second worker at once; lost is what had not come back when nothing had moved for longer than the",
        "recovery takes with the timeout that was set, or after 90 s. The work alone takes some 9 s.",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|" + " --- |" * len(_HEAD),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        "",
        *(f"- **{row.peer.name}**: {trial}: {reason}" for row in rows for trial, reason in row.failures.items()),
        "",
        "| peer | jobs drained | how jobs of a dead worker come back, and what was set for the kill | settings from |",
        "| --- | --- | --- | --- |",
        *(f"| {row.peer.name} | {row.jobs:,} | {row.peer.recovery} | {row.peer.source} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    return [
        row.peer.name,
        row.version or "-",
        row.peer.reliability,
        f"as {row.peer.as_fast_as}" if row.peer.as_fast_as else _rate(row.drains),
        _number(row.quantile_ms(50)),
        _number(row.quantile_ms(99)),
        str(row.verdict.lost) if row.verdict else "-",
        str(row.verdict.twice) if row.verdict else "-",
        _number(row.verdict.done_s if row.verdict else None),
        row.peer.settings,
    ]


def _rate(rates: list[float]) -> str:
    if not rates:
        return "-"
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
