"""One mutation: an exact text of the code and what takes its place. Called by mutations and by the program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Edit(NamedTuple):
    """A piece of one file. `old` must stand there exactly once."""

    path: str
    old: str
    new: str


class Rotten(Exception):
    """The code is not what a mutation was written for."""


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A rule, and how to break it."""

    name: str
    breaks: str
    """What is so no longer, in one sentence."""
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    """What pytest is to run: files, or tests of files as `path::name`."""

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(edit.path for edit in self.edits))

    def mutated(self, tree: Path) -> dict[Path, str]:
        """The texts of the files that it changes, changed. Raises Rotten where one is not as it was."""
        texts: dict[Path, str] = {}
        for edit in self.edits:
            path = tree / edit.path
            text = texts[path] if path in texts else path.read_text(encoding="utf-8")
            if (found := text.count(edit.old)) != 1:
                raise Rotten(f"{self.name}: {edit.path} holds the text to be replaced {found} times, not once")
            texts[path] = text.replace(edit.old, edit.new)
        return texts
