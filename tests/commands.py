"""The command line in tests: in this process through click's runner, or as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
from click.testing import CliRunner, Result

from jobq.cli import cli
from tests.leaks import logging_kept
from tests.secrets import found_in
from tests.waiting import until


class Commands:
    """Runs `jobq ...` on the two stores of a test. Commands make event loops of their own, hence the thread."""

    def __init__(self, database_url: str, redis_url: str):
        self._urls = {"JOBQ_DATABASE_URL": database_url, "JOBQ_REDIS_URL": redis_url}

    async def run(self, *args: object, **env: str | None) -> Result:
        """Run to the end, with nobody to be asked."""
        invoke = partial(CliRunner().invoke, cli, list(map(str, args)), env=_clean() | self._urls | env)
        with logging_kept():  # a command configures it
            result = await anyio.to_thread.run_sync(invoke)
        assert "--args" in args or found_in(result.output) == []
        return result

    async def json(self, *args: object, code: int = 0, **env: str) -> Any:
        """Run with --json to this exit code, and return what was printed."""
        result = await self.run(*args, "--json", **env)
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)


class Process:
    """A `jobq` process, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path):
        self._process = process
        self._log = log

    @property
    def said(self) -> str:
        return self._log.read_text()

    async def says(self, phrase: str, *, times: int = 1, deadline: float = 60) -> None:
        """Wait until it has said something so often."""

        def has_said() -> bool:
            if self._process.poll() is not None and self.said.count(phrase) < times:
                raise AssertionError(
                    f"It ended with {self._process.returncode} before it said {phrase!r}:\n{self.said}"
                )
            return self.said.count(phrase) >= times

        try:
            await until(has_said, f"the process said {phrase!r}", deadline)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.said}") from None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def ends(self, deadline: float = 30) -> int:
        """Wait for its end; returns the exit code."""
        await until(lambda: self._process.poll() is not None, f"the process ended; it said:\n{self.said}", deadline)
        return self._process.returncode


@contextmanager
def started(*args: str, folder: Path, module: str = "jobq", **env: str) -> Iterator[Process]:
    """Start `python -m jobq ...` in a folder; it is killed with the block if it still runs."""
    log = folder / f"log-{len(list(folder.glob('log-*')))}"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("JOBQ_")}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *args],
            cwd=folder,
            env={**variables, "PYTHONUNBUFFERED": "1", **environment_of(args, env)},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
    try:
        yield Process(process, log)
    finally:
        process.kill()
        process.wait()
    assert found_in(log.read_text(errors="replace")) == []


def environment_of(args: tuple[str, ...], env: dict[str, str]) -> dict[str, str]:
    """What a process is given beside its command line."""
    return env


def _clean() -> dict[str, str | None]:
    """What takes the developer's own JOBQ_ variables away."""
    return {name: None for name in os.environ if name.startswith("JOBQ_")}
