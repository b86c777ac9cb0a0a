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
    run = bench("drain/uvloop-100", "enqueue", "--jobs", "200", "--repeat", "1", "--results", str(tmp_path))

    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    names = [line["name"] for line in lines]
    assert {"drain/uvloop-100", "enqueue/16-writers/of-plain", "enqueue/many"} <= set(names)
    assert all(line["samples"] and line["versions"]["PostgreSQL"] and line["cores"] for line in lines)
    for group in ("drain", "enqueue"):
        assert f"`{names[0].partition('/')[2]}`" in (tmp_path / "drain.md").read_text()
        assert (tmp_path / f"{group}.md").exists()
    assert "drain, one worker process" in run.stdout


def test_an_unknown_measure_is_named() -> None:
    run = bench("drian")

    assert run.returncode == 2
    assert "no measure is called 'drian'" in run.stderr


def test_measures_are_found_without_what_draws_their_plots() -> None:
    script = "import sys; sys.modules['matplotlib'] = None; from benchmarks import suite; print(len(suite.measures()))"

    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)

    assert int(run.stdout) > 20
