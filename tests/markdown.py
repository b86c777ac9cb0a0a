"""Code in Markdown pages, so that the tests run what a reader would paste.

A fenced block whose first line is a comment with nothing but a path, `# shop/web.py` or `-- report.sql`, is that
file. A page may show one file piece by piece: its blocks are put together in their order.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

_FENCED = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.M)
_PATH = re.compile(r"(?:#|--) (?P<path>[\w./-]*[\w-]\.\w+)")


class Block(NamedTuple):
    """One fenced block; `language` is "" where the page names none."""

    language: str
    text: str


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """Return the fenced blocks of a page in their order; those of one language, if given."""
    source = page.read_text(encoding="utf-8")
    found = [Block(match["language"], textwrap.dedent(match["text"])) for match in _FENCED.finditer(source)]
    return [block for block in found if language in (None, block.language)]


def files(page: Path) -> dict[str, str]:
    """Return the text of every file that a page shows, by its path."""
    found: dict[str, str] = {}
    for block in blocks(page):
        named = _PATH.fullmatch(block.text.partition("\n")[0])
        if named is not None:
            path = named["path"]
            found[path] = f"{found[path]}\n\n{block.text}" if path in found else block.text
    return found


def write_files(page: Path, folder: Path) -> list[Path]:
    """Write every file that a page shows below `folder`, and return where."""
    written = []
    for path, text in files(page).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        written.append(target)
    return written
