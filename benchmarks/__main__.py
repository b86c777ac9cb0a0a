"""`python -m benchmarks`: jobq's figures on this machine, on private servers that write to disk as production would.

Each figure is the median of --repeat runs, with the smallest and the largest; runs go round robin. Absolute figures
belong to one machine and one moment: compare only what one run printed.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import logging
import platform
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jobq import embedded

from . import cpu, plots, results, suite, targets
from .figures import Figure, Measure, Samples
from .peers import table as peers
from .results import Line
from .stage import ROOT, Stage

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "benchmarks" / "README.md"
_TABLES: dict[str, results.Table] = {"peers": peers.table}
"""Of groups that have one of their own."""
_LONGEST_RUN_S = 1_800.0


def main() -> None:
    parser, options = _parsed()
    if options.readme:
        _write_readme()
        return
    there = suite.measures()
    try:
        chosen = suite.chosen(there, options.names)
    except suite.UnknownMeasure as unknown:
        parser.error(f"no measure is called {str(unknown)!r}; there are {', '.join(m.name for m in there)}")
    logging.getLogger("jobq").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what ends the processes of other sessions has to run
    figures: dict[str, Figure] = {}
    failures: dict[str, str] = {}
    with embedded.start(durable=True) as servers:
        stage = Stage(servers, jobs=options.jobs)
        circumstances = asyncio.run(_circumstances(stage))
        _say(f"{circumstances['cores']} cores ({circumstances['cpu']}), {_versions(circumstances)}")
        try:
            _run_all(stage, chosen, options.repeat, figures, failures)
        finally:
            new = [results.line(figure, circumstances) for figure in figures.values()]
            order = [measure.name for measure in there]
            found = {results.measure_of(name, order) for name in figures}
            new += [results.failure(name, failures[name], circumstances) for name in failures if name not in found]
            _leave(new, options.results, order)
    sys.exit(1 if failures else 0)


def _parsed() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python3 dev.py bench", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"a group ({', '.join(suite.GROUPS)}), group/variant, or `all`; without one all that take no minutes",
    )
    parser.add_argument("--repeat", type=int, default=5, help="runs of each measure (default 5)")
    parser.add_argument("--jobs", type=int, default=100_000, help="jobs to drain (default 100000)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results go (default benchmarks/results)")
    parser.add_argument("--readme", action="store_true", help="measure nothing: put the results into the README")
    return parser, parser.parse_args()


def _run_all(
    stage: Stage, measures: Sequence[Measure], repeat: int, figures: dict[str, Figure], failures: dict[str, str]
) -> None:
    """Run all rounds. A run that fails leaves its reason, and takes no other with it."""
    for number, measure in suite.rounds(measures, repeat):
        began_at = time.monotonic()
        try:
            samples, others_cpu = asyncio.run(_run(stage, measure))
        except Exception as error:
            failures[measure.name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            _say(f"run {number} of {measure.name} failed")
            continue
        suite.note(figures, measure, samples, others_cpu)
        took_s = time.monotonic() - began_at
        of = f"{number}/{measure.repeat or repeat}"
        _say(f"{of:>5} {measure.name:24} {_told(measure, samples)}  ({took_s:.0f} s, others {others_cpu:.0%} CPU)")


async def _run(stage: Stage, measure: Measure) -> tuple[Samples, float]:
    async with asyncio.timeout(_LONGEST_RUN_S):
        await stage.clear()
        before = stage.cpu()
        samples = await measure.run(stage)
        return samples, stage.cpu().since(before).others_share


def _leave(new: Sequence[Line], directory: Path, order: Sequence[str]) -> None:
    """Write results, and say them."""
    if not new:
        return
    lines = results.merged(results.read(directory), new, order)
    results.write(directory, lines, _TABLES)
    for group in results.groups(new):
        of_group = results.of_group(lines, group)
        plotted = peers.rates(of_group) if group == "peers" else [line for line in of_group if "median" in line]
        if plots.can_plot() and plotted:
            plots.plot(directory / f"{group}.svg", plotted)
        _say(f"\n## {group}\n\n{_TABLES.get(group, results.table)(results.of_group(new, group))}")
    if verdicts := targets.verdicts({line["name"]: line for line in new if "median" in line}):
        _say(f"## targets\n\n{results.verdict_table(verdicts)}")
    if not plots.can_plot():
        _say("No plots: matplotlib is not installed (pip install jobq[bench]).")
    if directory == RESULTS:
        _write_readme()


def _write_readme() -> None:
    README.write_text(results.with_tables(README.read_text(), RESULTS))


async def _circumstances(stage: Stage) -> Line:
    async with stage.database() as connection, stage.redis() as client:
        postgresql = await connection.fetchval("SHOW server_version")
        info = await client.info("server")
    versions = {"jobq": version("jobq"), "Python": platform.python_version(), "PostgreSQL": postgresql.split()[0]}
    versions |= {"Valkey": info["valkey_version"]} if "valkey_version" in info else {"Redis": info["redis_version"]}
    versions |= {name: version(name) for name in ("asyncpg", "redis", "sqlalchemy", "uvloop")}
    now = datetime.datetime.now(datetime.UTC)
    command = shlex.join(["python3", "dev.py", "bench", *sys.argv[1:]])
    return {
        "versions": versions,
        "cores": cpu.cores(),
        "cpu": cpu.model(),
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
    }


def _versions(circumstances: Line) -> str:
    return ", ".join(f"{name} {number}" for name, number in circumstances["versions"].items())


def _told(measure: Measure, samples: Samples) -> str:
    """One run's samples in a line."""
    found = samples if isinstance(samples, dict) else {"": samples}
    told = []
    for key, sample in found.items():
        median = sorted(sample)[len(sample) // 2] if isinstance(sample, list) else sample
        told.append(f"{key} {results.number(median)} {measure.units.get(key, measure.unit)}".strip())
    return ", ".join(told)


def _say(text: str) -> None:
    print(text, flush=True)


main()
