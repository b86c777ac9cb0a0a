"""What processes write down outside both stores, so that no fault of a store can take it back.

Each process appends to a file of its own, a line with every write: what it wrote stands, though it is killed at that
moment. A run begins with one line and ends with another; a run without the second was cut off.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

VARIABLE = "CHAOS_JOURNAL"
"""The folder that all processes of a run write to."""


class Journal:
    """One process's file. Safe from any thread."""

    def __init__(self, folder: Path, kind: str):
        self._token = secrets.token_hex(4)
        self._count = count()
        path = folder / f"{kind}-{os.getpid()}-{self._token}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def name(self) -> str:
        """A name that nothing else has."""
        return f"{self._token}-{next(self._count)}"

    def write(self, *words: object) -> None:
        """Append one line, beginning with the time."""
        line = "\t".join([f"{time.time():.6f}", *map(str, words)])
        os.write(self._file, f"{line}\n".encode())


def read(folder: Path, kind: str) -> Iterator[tuple[int, float, list[str]]]:
    """Every line of every process of one kind: its pid, the time, and the words."""
    for path in sorted(folder.glob(f"{kind}-*")):
        pid = int(path.name.split("-")[1])
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):  # else the process was killed while it wrote
                    at, *words = line.rstrip("\n").split("\t")
                    yield pid, float(at), words
