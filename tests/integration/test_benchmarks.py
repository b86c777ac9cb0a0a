"""The benchmarks run. Their figures are for people: nothing here looks at them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_measure_but_the_slow_ones_prints_a_figure() -> None:
    names = ["enqueue-many", "relay", "drain"]
    command = [sys.executable, "-m", "benchmarks", *names, "--jobs", "300", "--repeat", "1"]

    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)

    assert run.returncode == 0, run.stderr
    assert re.findall(r"^(\S+) +[\d,]+\.\d\d ", run.stdout, re.MULTILINE) == names


def test_an_unknown_measure_is_named() -> None:
    command = [sys.executable, "-m", "benchmarks", "drian"]

    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)

    assert run.returncode == 2
    assert "no measure is called 'drian'" in run.stderr
