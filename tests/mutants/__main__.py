"""`python3 dev.py mutants [NAME ...]`: break one rule after the other in a copy, and say which tests notice.

1. Copy the tree to a scratch folder, and see that the tests pass there as long as nothing is broken.
2. For each mutation: change the copy, run the tests named for it, change it back.
3. Print a table of what was broken and which tests failed. Exit code 1: one mutation or more went unnoticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from jobq.testing.servers import DATABASE_VARIABLE, REDIS_VARIABLE, servers
from tests.mutants.mutation import Mutation
from tests.mutants.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]
COPIED = ("jobq", "migrations", "examples", "tests", "docs", "jobq_pytest.py", "pyproject.toml", "README.md")
LONGEST_S = 900
NAMED_TESTS = 3


class Outcome(NamedTuple):
    """What the tests said of a tree."""

    red: list[str]
    seconds: float


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--list", action="store_true", help="say what there is, and break nothing")
    asked = parser.parse_args(arguments)
    by_name = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := [name for name in asked.names if name not in by_name]:
        parser.error(f"no such mutation: {', '.join(unknown)}; --list names them")
    chosen = [by_name[name] for name in asked.names] or MUTATIONS
    if asked.list:
        print("\n".join(f"{mutation.name:34} {mutation.breaks}" for mutation in chosen))
        return 0
    with scratch() as tree, servers() as urls:
        stores = {DATABASE_VARIABLE: urls.database_url, REDIS_VARIABLE: urls.redis_url}
        tests = sorted({test for mutation in chosen for test in mutation.tests})
        if red := run_tests(tree, tests, stores, at_most=len(tests)).red:
            sys.exit(f"Nothing is broken yet, and these tests fail: {', '.join(red)}")
        print("| broken | in | tests that failed | s |\n|---|---|---|---|")
        survivors = [mutation.name for mutation in chosen if not report(mutation, try_out(mutation, tree, stores))]
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} noticed.", file=sys.stderr)
    if survivors:
        print(f"NOT noticed: {', '.join(survivors)}", file=sys.stderr)
    return 1 if survivors else 0


def report(mutation: Mutation, outcome: Outcome) -> bool:
    """Print one line of the table. Returns whether a test failed."""
    red = ", ".join(f"`{name}`" for name in outcome.red) or "**none**"
    files = ", ".join(f"`{path}`" for path in mutation.files)
    print(f"| {mutation.name}: {mutation.breaks} | {files} | {red} | {outcome.seconds:.1f} |", flush=True)
    return bool(outcome.red)


def try_out(mutation: Mutation, tree: Path, stores: dict[str, str] | None = None) -> Outcome:
    """Run the tests of a mutation on a tree that has it; the tree is as before when this returns."""
    texts = mutation.mutated(tree)
    before = {path: path.read_text(encoding="utf-8") for path in texts}
    try:
        write(texts)
        return run_tests(tree, mutation.tests, stores or {})
    finally:
        write(before)


def write(texts: dict[Path, str]) -> None:
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


@contextmanager
def scratch() -> Iterator[Path]:
    """A copy of the tree, which python imports jobq from."""
    with tempfile.TemporaryDirectory(prefix="jobq-mutants-") as folder:
        tree = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name)
            else:
                shutil.copy(ROOT / name, tree / name)
        ask = [sys.executable, "-c", "import jobq; print(jobq.__file__)"]
        found = subprocess.run(ask, cwd=tree, env=variables(tree), capture_output=True, text=True, check=True).stdout
        if not Path(found.strip()).resolve().is_relative_to(tree.resolve()):
            sys.exit(f"In the copy {tree}, python imports jobq from {found.strip()}: nothing would be tested.")
        yield tree


def variables(tree: Path) -> dict[str, str]:
    """The environment of the tests: the copy before the installed jobq, in their children as well."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JOBQ_", "PYTEST_"))}
    # A file may change twice within the resolution of its time: python would take the old bytecode for the new. That
    # of the unbroken code was copied with it.
    return kept | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def run_tests(tree: Path, tests: Iterable[str], stores: dict[str, str], *, at_most: int = NAMED_TESTS) -> Outcome:
    """Run tests in the tree until `at_most` have failed; returns the names of those."""
    results = tree / "results.xml"
    plain = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=short", f"--maxfail={at_most}"]
    command = [sys.executable, "-m", "pytest", *plain, f"--rootdir={tree}", f"--junitxml={results}", *tests]
    results.unlink(missing_ok=True)
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=tree, env=variables(tree) | stores, capture_output=True, text=True, check=False, timeout=LONGEST_S
    )
    red = failed(results) if results.exists() else []
    if done.returncode not in (0, 1) or (done.returncode == 1 and not red):
        sys.exit(
            f"The tests did not come to a verdict ({done.returncode}):\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
        )
    return Outcome(red, time.monotonic() - began)


def failed(results: Path) -> list[str]:
    """The tests that failed by what they assert; an error around a test proves nothing."""
    cases = ElementTree.parse(results).iter("testcase")
    return [str(case.get("name")) for case in cases if case.find("failure") is not None]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
