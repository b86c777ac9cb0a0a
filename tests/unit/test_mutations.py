"""The mutations that `dev.py mutants` runs, without running them."""

from __future__ import annotations

from pathlib import Path

from tests.mutants.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]


def test_every_mutation_finds_what_it_changes() -> None:
    for mutation in MUTATIONS:
        assert mutation.mutated(ROOT)
