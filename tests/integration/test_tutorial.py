"""The tutorial, followed word by word. Only its two servers are those of the tests, and its lease is shorter."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import anyio.to_thread
import pytest

from tests.commands import started
from tests.enqueuing import fetch
from tests.markdown import write_files
from tests.waiting import until

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"


class Step(NamedTuple):
    """A block to be run, and what the first terminal says after it, as the text below the block has it."""

    language: str
    text: str
    heard: list[str]


@pytest.mark.timeout(300)  # a dozen processes, one after the other
async def test_the_tutorial_does_what_it_says(database_url: str, redis_url: str, tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)
    urls = {"JOBQ_DATABASE_URL": database_url, "JOBQ_REDIS_URL": redis_url}
    (tmp_path / ".jobq").mkdir()
    (tmp_path / ".jobq" / "env").write_text("".join(f"export {name}='{url}'\n" for name, url in urls.items()))
    with ExitStack() as terminals:
        heard: list[str] = []
        for step in steps():
            if step.text.startswith("jobq dev "):
                # Its own servers are tested elsewhere.
                options = ("--postgres", database_url, "--redis", redis_url)
                words = (*shlex.split(step.text)[1:], *options)
                first = terminals.enter_context(started(*words, folder=tmp_path, JOBQ_LEASE="1.5"))
            elif "pip install" not in step.text:
                await follow(step, tmp_path, urls)
            for phrase in step.heard:
                heard.append(phrase)
                await first.says(phrase, times=heard.count(phrase))

        assert len(heard) >= 10
        packed = await fetch(database_url, "SELECT id, packed FROM orders ORDER BY id")
        assert [tuple(row) for row in packed] == [(1, 0), (3, 1), (4, 0)]
        assert first.said.count("receipt for order") == 1, "that of the rollback never ran"


def steps() -> Iterator[Step]:
    """The blocks that are no files, in their order."""
    page = PAGE.read_text(encoding="utf-8")
    found = list(re.finditer(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    for block, following in zip(found, [*found[1:], None], strict=True):
        prose = page[block.end() : following.start() if following else len(page)].replace("\n", " ")
        if block[1] in ("sh", "console"):
            yield Step(block[1], block[2], heard_in(prose))


def heard_in(prose: str) -> list[str]:
    """The phrases in code of the sentences about the first terminal."""
    about = re.findall(r"first terminal (?:says|shows)[^.]*", prose)
    return [phrase for sentence in about for phrase in re.findall(r"`([^`]+)`", sentence)]


async def follow(step: Step, folder: Path, urls: dict[str, str]) -> None:
    if step.language == "sh":
        done = await shell(step.text, folder, urls)
        assert done.returncode == 0, f"{step.text}{done.stdout}{done.stderr}"
        return
    command, _, shown = step.text.removeprefix("$ ").partition("\n")

    async def has_shown() -> bool:
        done = await shell(command, folder, urls)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return looks_like(done.stdout, shown)

    if command.startswith("jobq "):
        await until(has_shown, f"{command!r} shows {shown!r}", 30)
    else:  # it does something, so it is not repeated
        assert await has_shown()


async def shell(text: str, folder: Path, urls: dict[str, str]) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOBQ_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            ["bash", "-euc", text],
            cwd=folder,
            env={**clean, **urls, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    )


def looks_like(output: str, shown: str) -> bool:
    """Line by line; `...` stands for anything, and one blank for any number."""
    lines = [line for line in output.splitlines() if line.strip()]
    wanted = shown.splitlines()
    return len(lines) == len(wanted) and all(
        re.fullmatch(re.escape(want).replace(r"\.\.\.", ".*").replace(r"\ ", r"\s*"), line)
        for want, line in zip(wanted, lines, strict=True)
    )
