"""`python -m benchmarks.peers [NAME ...]`: the comparison alone, into benchmarks/results/peers.md and peers.jsonl.

The rounds go through all peers in turn, so that what else the machine does falls on all of them. About 20 minutes for
all; each peer is installed at its first use.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import platform
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from jobq import embedded

from . import environments, trials
from .environments import PeerFailed
from .peers import PEERS
from .table import Row, markdown

RESULTS = Path(__file__).resolve().parent.parent / "results"
TRIALS = ("drain", "latency", "kill")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(peer.name for peer in PEERS)}")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of drain and latency (default 3)")
    parser.add_argument("--jobs", type=int, default=1_000_000, help="at most so many to drain (default: each its own)")
    parser.add_argument("--samples", type=int, default=trials.LATENCY_SAMPLES, help="of latency, in all rounds")
    parser.add_argument("--only", choices=TRIALS, help="leave the other trials out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the directory to write to")
    options = parser.parse_args()
    try:
        rows = [Row(peer) for peer in environments.find(options.names)]
    except KeyError as unknown:
        parser.error(f"no peer is called {unknown}; there are {', '.join(peer.name for peer in PEERS)}")
    # The peers' processes are in sessions of their own: let what ends them run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with embedded.start(durable=True) as servers:
        asyncio.run(_measure_all(rows, servers, options))
    machine: dict[str, object] = {
        "Python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[2], 1),
    }
    page = markdown(rows, machine)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "peers.md").write_text(page)
    (options.results / "peers.jsonl").write_text("".join(row.as_json(machine) + "\n" for row in rows))
    print(page)


async def _measure_all(rows: list[Row], servers: embedded.Servers, options: argparse.Namespace) -> None:
    wanted = [options.only] if options.only else list(TRIALS)
    for row in rows:
        await _install(row)
    samples = math.ceil(options.samples / options.repeat)
    for _ in range(options.repeat):
        for row in rows:
            if row.peer.as_fast_as:
                continue
            if "drain" in wanted:
                await _try(row, "drain", lambda row=row: _drain(row, servers, options.jobs))
            if "latency" in wanted:
                await _try(row, "latency", lambda row=row: _latency(row, servers, samples))
    if "kill" in wanted:
        for row in rows:
            await _try(row, "kill", lambda row=row: _kill(row, servers))


async def _install(row: Row) -> None:
    try:
        await asyncio.to_thread(environments.make_ready, row.peer)
        row.version = await asyncio.to_thread(environments.version_of, row.peer)
    except PeerFailed as reason:
        row.failures["install"] = str(reason)
        _say(f"{row.peer.name}: install: {reason}")


async def _try(row: Row, trial: str, measure: Callable[[], Awaitable[str]]) -> None:
    """Make the trial, unless it or the installation has failed before."""
    if trial in row.failures or "install" in row.failures:
        return
    try:
        _say(f"{row.peer.name}: {trial}: {await measure()}")
    except PeerFailed as reason:
        row.failures[trial] = str(reason)
        _say(f"{row.peer.name}: {trial} failed: {reason}")


async def _drain(row: Row, servers: embedded.Servers, most: int) -> str:
    row.jobs = min(row.peer.jobs, most)
    row.drains.append(await trials.drain(row.peer, servers, row.jobs))
    return f"{row.drains[-1]:,.0f} jobs/s"


async def _latency(row: Row, servers: embedded.Servers, samples: int) -> str:
    row.latencies_ms += await trials.latencies(row.peer, servers, samples)
    return f"p50 {row.quantile_ms(50):.1f} ms, p99 {row.quantile_ms(99):.1f} ms of {len(row.latencies_ms)}"


async def _kill(row: Row, servers: embedded.Servers) -> str:
    row.verdict = await trials.kill(row.peer, servers)
    return str(row.verdict)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
