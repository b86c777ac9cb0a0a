"""The benchmarks run and leave results. Their figures are for people: nothing here looks at them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)


def test_measures_leave_a_line_for_each_figure_and_a_table_for_each_group(tmp_path: Path) -> None:
    measures = ("drain/uvloop-100", "floor/100", "latency/idle", "enqueue/16-writers", "enqueue/many")

    run = bench(*measures, "--jobs", "100", "--repeat", "1", "--results", str(tmp_path))

    assert run.returncode == 0, run.stderr
    lines = {line["name"]: line for line in map(json.loads, (tmp_path / "figures.jsonl").read_text().splitlines())}
    assert {"drain/uvloop-100", "floor/100/ratio", "enqueue/16-writers/of-plain", "enqueue/many"} <= set(lines)
    assert lines["latency/idle/start"]["count"] == 100
    for name, line in lines.items():
        group, _, variant = name.partition("/")
        assert line["versions"]["PostgreSQL"]
        assert line["median"] > 0
        assert f"`{variant}`" in (tmp_path / f"{group}.md").read_text()
    assert "| drain, one worker process | >= 30,000 jobs/s |" in run.stdout


def test_an_unknown_measure_is_named() -> None:
    run = bench("drian")

    assert run.returncode == 2
    assert "no measure is called 'drian'" in run.stderr


def test_measures_are_found_without_what_draws_their_plots() -> None:
    script = "import sys; sys.modules['matplotlib'] = None; from benchmarks import suite; print(len(suite.measures()))"

    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)

    assert int(run.stdout) > 20
