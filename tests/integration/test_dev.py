"""dev.py without its installs: when it makes an environment, where, and what it says when it cannot."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DEV = Path(__file__).parents[2] / "dev.py"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of nothing but dev.py and a pyproject.toml, in a path with a space."""
    directory = tmp_path / "a checkout"
    directory.mkdir()
    shutil.copy(DEV, directory)
    (directory / "pyproject.toml").write_text("[project]\nname = 'jobq'\n")
    return directory


@pytest.fixture
def dev(checkout: Path) -> ModuleType:
    return load(checkout)


def load(checkout: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("dev_under_test", checkout / "dev.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(dev: ModuleType, extra: str) -> Any:
    """An environment that dev.py has finished, all but for the installed packages."""
    environment = dev.Environment(dev.choose_directory())
    environment.directory.mkdir(parents=True)
    environment.create()
    environment.write_stamp(environment.wanted(extra))
    return environment


def run(checkout: Path, *arguments: str, prelude: str = "pass", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run dev.py as a script, in an interpreter that was changed by the prelude."""
    script = "runpy.run_path('dev.py', run_name='__main__')"
    program = f"import runpy, sys; {prelude}; sys.argv[1:] = {arguments}; {script}"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=checkout,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_older_python_can_read_the_file() -> None:
    ast.parse(DEV.read_text(), feature_version=(3, 6))


def test_an_older_python_says_which_one_is_needed(checkout: Path) -> None:
    ended = run(checkout, "demo", prelude="sys.version_info = (3, 9, 18)")

    assert ended.returncode == 1
    assert ended.stderr.startswith("jobq needs Python 3.11 or newer, and this is Python 3.9: ")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("arguments", [(), ("demos",)])
def test_an_unknown_command_prints_the_usage(checkout: Path, arguments: tuple[str, ...]) -> None:
    ended = run(checkout, *arguments)

    assert ended.returncode == 1
    assert ended.stderr.startswith("usage: python3 dev.py demo")
    assert not (checkout / ".venv").exists()


def test_a_finished_environment_is_entered_with_the_arguments_and_nothing_else_is_done(
    checkout: Path, dev: ModuleType
) -> None:
    environment = made(dev, "demo")
    command = environment.directory / "bin" / "jobq"
    command.write_text('#!/bin/sh\nprintf "%s|" "$VIRTUAL_ENV" "$@"\n')
    command.chmod(0o755)

    ended = run(checkout, "demo", "--jobs", "a b")

    assert ended.stdout == f"{checkout / '.venv'}|demo|--jobs|a b|"
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("extra", "serves"),
    [("demo", ["demo"]), ("dev", ["demo", "dev"]), ("bench", ["demo", "dev", "bench"]), ("uvloop", [])],
)
def test_an_extra_serves_the_commands_of_those_it_holds(dev: ModuleType, extra: str, serves: list[str]) -> None:
    environment = made(dev, extra)

    assert [extra for extra in dev.EXTRAS if environment.is_ready(extra)] == serves


def test_a_larger_extra_is_kept_when_a_smaller_one_is_wanted(
    checkout: Path, dev: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev, "installer", lambda python: ["true"])
    environment = made(dev, "bench")

    (checkout / "pyproject.toml").write_text("[project]\nname = 'jobq'\nversion = '1'\n")
    environment.make_ready("demo")

    assert environment.is_ready("bench")


def test_a_smaller_extra_is_replaced_when_a_larger_one_is_wanted(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev, "installer", lambda python: ["true"])
    environment = made(dev, "demo")

    environment.make_ready("dev")

    assert environment.is_ready("dev")
    assert not environment.is_ready("bench")


def test_a_changed_pyproject_is_installed_again(checkout: Path, dev: ModuleType) -> None:
    environment = made(dev, "dev")

    (checkout / "pyproject.toml").write_text("[project]\nname = 'jobq'\ndependencies = ['anyio']\n")

    assert not environment.is_ready("dev")


def test_an_interrupted_install_is_made_again(checkout: Path, dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = made(dev, "dev")
    (environment.directory / "half-installed").touch()
    monkeypatch.setattr(dev, "installer", lambda python: ["false"])  # as a network that is down

    (checkout / "pyproject.toml").write_text("[project]\nname = 'jobq'\nversion = '1'\n")
    with pytest.raises(SystemExit, match="this command failed: false"):
        environment.make_ready("dev")
    assert not environment.is_ready("dev")
    assert (environment.directory / "half-installed").exists()

    monkeypatch.setattr(dev, "installer", lambda python: ["true"])
    environment.make_ready("dev")
    assert environment.is_ready("dev")
    assert not (environment.directory / "half-installed").exists()


def test_a_moved_checkout_is_not_taken_for_finished(checkout: Path, dev: ModuleType) -> None:
    made(dev, "dev")
    moved = checkout.rename(checkout.with_name("moved"))

    there = load(moved)

    assert not there.Environment(there.choose_directory()).is_ready("dev")


def test_an_environment_whose_python_is_gone_is_not_taken_for_finished(dev: ModuleType) -> None:
    environment = made(dev, "dev")

    environment.python.unlink()
    environment.python.symlink_to("/nonexistent/python3")

    assert not environment.is_ready("dev")


def test_an_environment_that_something_else_made_is_left_alone(
    checkout: Path, dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    foreign = checkout / ".venv"
    foreign.mkdir()
    (foreign / "pyvenv.cfg").touch()

    assert dev.choose_directory().is_relative_to(tmp_path / "cache")
    assert [path.name for path in foreign.iterdir()] == ["pyvenv.cfg"]


def test_an_environment_of_another_user_is_left_alone(
    checkout: Path, dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = made(dev, "dev").directory
    if os.geteuid() == 0:
        os.chown(directory, 65534, 65534)
    else:
        directory.chmod(0o555)

    assert dev.choose_directory().is_relative_to(tmp_path / "cache")


def test_without_pip_and_uv_the_message_says_what_to_install(checkout: Path) -> None:
    ended = run(checkout, "test", prelude="sys.modules.update(pip=None, ensurepip=None)", PATH="")

    assert ended.returncode == 1
    assert "neither pip 22.3 or newer for this Python nor uv" in ended.stderr
    assert "Traceback" not in ended.stderr
