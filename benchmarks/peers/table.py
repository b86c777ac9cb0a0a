"""The comparison in Markdown: a row a peer, the fastest first, and below what was set for each and why.

Invariant: a peer that could not be measured stands there with the reason. Called by __main__. Calls results.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..results import Line, failures, notes, number
from . import trials
from .peers import PEERS, Peer

US = "jobq"
"""Whose rate the others' are compared with."""
_NONE = "–"


def rates(lines: Sequence[Line]) -> list[Line]:
    """The rates of all peers, the fastest first."""
    names = {f"peers/{peer.name}" for peer in PEERS}
    found = [line for line in lines if line["name"] in names and "median" in line]
    return sorted(found, key=lambda line: -line["median"])


def table(lines: Sequence[Line]) -> str:
    """The whole section of the group `peers`."""
    found = {line["name"]: line for line in lines if "median" in line}
    fastest = sorted(PEERS, key=lambda peer: -_median(found, peer.as_fast_as or peer.name))
    there = [peer for peer in fastest if any(name in found for name in _names(peer))]
    rows = [
        "| | mode | jobs/s | min to max | of jobq | p50 ms | p99 ms | lost | twice | all done, s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(f"| {' | '.join(_cells(found, peer))} |" for peer in there),
        "",
        *_enqueues(found, there),
        f"| | jobs | settings | how jobs of a dead worker come back: what was set for the kill of {trials.KILL_JOBS} |"
        " from the documentation |",
        "|---|---:|---|---|---|",
        *(
            f"| `{peer.name}` | {peer.jobs:,} | {peer.settings} | {peer.recovery} | {peer.source} |"
            for peer in sorted(there, key=PEERS.index)
        ),
        "",
        *failures(lines),
    ]
    return "\n".join([*rows, *notes(rates(lines) or list(found.values())), ""])


def _names(peer: Peer) -> list[str]:
    return [f"peers/{peer.name}{suffix}" for suffix in ("", "-latency", "-enqueue", "-kill/lost")]


def _cells(found: dict[str, Line], peer: Peer) -> list[str]:
    rate, latency, _, lost = (found.get(name) for name in _names(peer))
    twice, done = (found.get(f"peers/{peer.name}-kill/{key}") for key in ("twice", "done"))
    version = next(found[name]["about"] for name in _names(peer) if name in found)
    cells = [f"`{peer.name}` {version}", peer.reliability]
    if rate:
        ours = _median(found, US)
        cells += [number(rate["median"]), f"{number(rate['min'])} to {number(rate['max'])}"]
        cells += [f"{rate['median'] / ours:.2f}" if ours else _NONE]
    else:
        cells += [f"as `{peer.as_fast_as}`" if peer.as_fast_as else _NONE, _NONE, _NONE]
    cells += [number(latency[key]) if latency else _NONE for key in ("p50", "p99")]
    cells += [f"{line['median']:.0f}" if line else _NONE for line in (lost, twice)]
    return [*cells, number(done["median"]) if done else _NONE]


def _enqueues(found: dict[str, Line], peers: Sequence[Peer]) -> list[str]:
    lines = {peer.name: found[f"peers/{peer.name}-enqueue"] for peer in peers if f"peers/{peer.name}-enqueue" in found}
    if not lines:
        return []
    return [
        "| one enqueue in a transaction, 16 writers | transactions/s | min to max |",
        "|---|---:|---:|",
        *(
            f"| `{name}` {line['about']} | {number(line['median'])} | {number(line['min'])} to {number(line['max'])} |"
            for name, line in sorted(lines.items(), key=lambda item: -item[1]["median"])
        ),
        "",
    ]


def _median(found: dict[str, Line], name: str) -> float:
    line = found.get(f"peers/{name}")
    return float(line["median"]) if line else 0.0
