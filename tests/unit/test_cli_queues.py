"""-q and --strict, and what says the same in the environment and in pyproject.toml."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from jobq.cli.failures import ExitCode
from jobq.cli.queues import Queues, queues_options


@click.command()
@queues_options
def show(queues: Queues, strict: bool) -> None:
    click.echo(f"{dict(queues)} {strict}")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command in an empty folder, with the lines of `[tool.jobq]` that are given."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str, pyproject: str = "", **env: str) -> Result:
        (tmp_path / "pyproject.toml").write_text(f"[tool.jobq]\n{pyproject}\n")
        return CliRunner().invoke(show, args, env={"JOBQ_QUEUES": None, "JOBQ_STRICT": None, **env})

    return run


@pytest.mark.parametrize(
    ("args", "env", "pyproject", "shown"),
    [
        ([], {}, "", "{} False"),
        (["-q", "mail:5,default:3"], {}, "", "{'mail': 5, 'default': 3} False"),
        (["-q", "mail:100, default", "-q", "news:1"], {}, "", "{'mail': 100, 'default': None, 'news': 1} False"),
        (["-q", "mail:5", "-q", "mail:05,mail:5"], {}, "", "{'mail': 5} False"),
        (["--strict", "-q", "urgent,default"], {}, "", "{'urgent': None, 'default': None} True"),
        ([], {"JOBQ_QUEUES": "mail:5, default"}, "queues = 'news'", "{'mail': 5, 'default': None} False"),
        ([], {"JOBQ_QUEUES": "a,b", "JOBQ_STRICT": "1"}, "", "{'a': None, 'b': None} True"),
        (["-q", "a"], {"JOBQ_QUEUES": "mail:5"}, "", "{'a': None} False"),
        ([], {}, "queues = 'mail:5,default'", "{'mail': 5, 'default': None} False"),
        ([], {}, "queues = ['mail:5', 'default']", "{'mail': 5, 'default': None} False"),
        ([], {}, "queues = {mail = 5, default = 1}", "{'mail': 5, 'default': 1} False"),
        ([], {}, "queues = ['a', 'b']\nstrict = true", "{'a': None, 'b': None} True"),
        (["--no-strict", "-q", "a:5"], {}, "strict = true", "{'a': 5} False"),
        (["-q", "a:5"], {"JOBQ_STRICT": "0"}, "strict = true", "{'a': 5} False"),
    ],
    ids=str,
)
def test_queues_and_their_weights_or_order(run, args, env, pyproject, shown):
    result = run(*args, pyproject=pyproject, **env)

    assert (result.exit_code, result.stdout) == (0, f"{shown}\n")


@pytest.mark.parametrize(
    ("args", "pyproject", "sentence"),
    [
        (["-q", "Mail"], "", "'Mail' is no queue: 1 to 64 of a-z, 0-9, underscore, dot, hyphen"),
        (["-q", ":5"], "", "':5' is no queue"),
        (["-q", "mail:5,mail:3"], "", "queue 'mail' is named twice, with different weights: name it once"),
        (["-q", "mail", "-q", "mail:1"], "", "queue 'mail' is named twice, with different weights"),
        (["--strict"], "", "--strict serves queues in the order of -q: name them, as in -q urgent,default"),
        (["--strict", "-q", "a:1,b"], "", "--strict and weights exclude each other: drop the weights (a:1) or say"),
        (["-q", "a:1"], "strict = true", "--strict and weights exclude each other"),
        ([], "queues = 5", "queues in [tool.jobq] of ./pyproject.toml is 5: write"),
        ([], "queues = ['a', 1]", "queues in [tool.jobq] of ./pyproject.toml is ['a', 1]: write"),
        ([], "queues = {mail = 'five'}", "'mail:five': a weight is a whole number from 1 to 100, as in mail:5"),
        ([], "queues.mail.eu = 5", "a weight is a whole number from 1 to 100, as in mail:5"),
        ([], "strict = 'often'", "strict in [tool.jobq] of ./pyproject.toml is 'often': write true or false"),
        *(
            (["-q", f"mail:{weight}"], "", f"'mail:{weight}': a weight is a whole number from 1 to 100, as in mail:5")
            for weight in ("0", "-1", "1.5", "101", "9" * 5000, "", "5:3", "\u0665", "x")
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_says_nothing_is_wrong_usage_and_told_in_a_sentence(run, args, pyproject, sentence):
    result = run(*args, pyproject=pyproject)

    assert result.exit_code == ExitCode.USAGE
    assert sentence in result.stderr
