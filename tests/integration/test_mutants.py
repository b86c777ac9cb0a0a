"""The mutants of `python3 dev.py mutants`: each still has its text and its tests, and one is really tried out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.__main__ import ROOT, main, scratch, try_out
from tests.mutants.mutation import Edit, Mutation, Rotten
from tests.mutants.mutations import MUTATIONS

BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}


def test_every_mutation_has_a_name_of_its_own():
    assert len(BY_NAME) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_still_applies_and_is_python_where_it_should_be(mutation: Mutation):
    for path, text in mutation.mutated(ROOT).items():
        assert text != path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            compile(text, path, "exec")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_tests_of_every_mutation_are_there(mutation: Mutation):
    for test in mutation.tests:
        path, _, name = test.partition("[")[0].partition("::")
        assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8")


def test_a_mutation_whose_text_is_gone_fails_loudly(tmp_path: Path):
    (tmp_path / "code.py").write_text("one = 1\none = 1\n")

    for old, found in (("two", 0), ("one", 2)):
        mutation = Mutation(name="m", breaks="", edits=(Edit("code.py", old, ""),), tests=())
        with pytest.raises(Rotten, match=f"code.py holds the text to be replaced {found} times, not once"):
            mutation.mutated(tmp_path)


def test_a_mutant_of_the_real_code_is_noticed_by_its_tests():
    with scratch() as tree:
        found = try_out(BY_NAME["beat-lists-the-dead"], tree)

    assert "test_a_run_whose_task_is_gone_is_not_listed_and_may_be_taken_anew" in found.red


def test_a_mutant_that_nobody_notices_has_no_red_tests_and_the_code_is_as_before(tmp_path: Path):
    (tmp_path / "code.py").write_text("one = 1\n")
    (tmp_path / "test_code.py").write_text("def test_nothing(): ...\n")
    mutation = Mutation(name="m", breaks="", edits=(Edit("code.py", "1", "2"),), tests=("test_code.py",))

    assert try_out(mutation, tmp_path).red == []
    assert (tmp_path / "code.py").read_text() == "one = 1\n"


def test_a_name_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["walk-of"])

    assert "no such mutation: walk-of; --list names them" in capsys.readouterr().err
