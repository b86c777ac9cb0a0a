"""Each peer's own environment, made when it is first needed: a venv, or a directory of Node.js packages.

Invariant: nothing of a peer is installed beside jobq. A stamp is written last, so what was interrupted is continued.
Called by trials. Calls pip and npm.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from .peers import Peer

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = (HERE / ".environments").resolve()
_STAMP = "installed.json"
_LONGEST_S = 900


class PeerFailed(Exception):
    """A peer could not be installed or run. The message says why, in a line."""


def directory_of(peer: Peer) -> Path:
    return ENVIRONMENTS / peer.environment


def make_ready(peer: Peer) -> None:
    """Install what the peer needs, unless that was done. Raises PeerFailed."""
    if not peer.install:
        return
    if peer.is_node and (shutil.which("node") is None or shutil.which("npm") is None):
        raise PeerFailed("there is no node and npm on this machine")
    directory = directory_of(peer)
    wanted = {"install": list(peer.install), "python": platform.python_version(), "place": str(directory)}
    stamp = directory / _STAMP
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return
    directory.mkdir(parents=True, exist_ok=True)
    if peer.is_node:
        options = ["--no-save", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"]
        _run(["npm", "install", "--prefix", str(directory), *options, *peer.install])
    else:
        _run([sys.executable, "-m", "venv", str(directory)])
        _run([str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", *peer.install])
    stamp.write_text(json.dumps(wanted))


def python_of(peer: Peer) -> str:
    return str(directory_of(peer) / "bin" / "python") if peer.install else sys.executable


def app_of(peer: Peer) -> Path:
    return HERE / peer.app


def variables() -> dict[str, str]:
    """The process environment that a peer starts from: without this one's Python."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, env=variables(), capture_output=True, text=True, timeout=_LONGEST_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerFailed(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise PeerFailed(f"`{' '.join(command[-3:])}` failed: {lines[-1] if lines else done.returncode}")
