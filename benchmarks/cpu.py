"""What processes cost: CPU seconds of process trees, of the whole machine, and resident memory, from Linux's /proc.

Invariant: a tree's CPU seconds only grow, since what a process used that has ended is its parent's. Elsewhere than on
Linux all figures are NaN. Called by stage. Calls nothing.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_IS_LINUX = sys.platform == "linux"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Reading:
    """CPU seconds so far."""

    at: float
    seconds: dict[str, float]
    """By role."""
    ours: float
    """Of this process and all that descend from it."""
    machine: float

    def since(self, before: Reading) -> Usage:
        roles = {role: seconds - before.seconds.get(role, 0.0) for role, seconds in self.seconds.items()}
        return Usage(self.at - before.at, roles, self.ours - before.ours, self.machine - before.machine)


@dataclass(frozen=True)
class Usage:
    """CPU seconds of a span of time."""

    elapsed_s: float
    seconds: dict[str, float]
    ours: float
    machine: float

    @property
    def others_share(self) -> float:
        """Share of the CPU time of all cores that processes took which are not of the benchmark."""
        return max(0.0, self.machine - self.ours) / (self.elapsed_s * cores())


def read(roles: Mapping[str, Iterable[int]]) -> Reading:
    """CPU seconds of the trees below the processes of each role."""
    if not _IS_LINUX:
        return Reading(time.perf_counter(), dict.fromkeys(roles, math.nan), math.nan, math.nan)
    children: dict[int, list[int]] = defaultdict(list)
    own: dict[int, float] = {}
    for path in _PROC.iterdir():
        if path.name.isdecimal() and (fields := _stat(int(path.name))) is not None:
            children[int(fields[1])].append(int(path.name))
            own[int(path.name)] = sum(map(int, fields[11:15])) / _TICKS

    def tree(pid: int) -> float:
        return own.get(pid, 0.0) + sum(map(tree, children[pid]))

    seconds = {role: sum(map(tree, pids)) for role, pids in roles.items()}
    return Reading(time.perf_counter(), seconds, tree(os.getpid()), _machine())


def resident_bytes(pid: int, *, peak: bool = False) -> float:
    """Resident memory of one process: now, or at its highest."""
    if not _IS_LINUX:
        return math.nan
    word = "VmHWM:" if peak else "VmRSS:"
    lines = (_PROC / str(pid) / "status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(word))


def cores() -> int:
    return os.cpu_count() or 1


def model() -> str:
    """The CPU's name, as far as it has one."""
    lines = (_PROC / "cpuinfo").read_text().splitlines() if _IS_LINUX else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _stat(pid: int) -> list[str] | None:
    """What follows the name in /proc/PID/stat; None for a process that has gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _machine() -> float:
    user, nice, system, _idle, _wait, interrupts, soft, steal = map(int, (_PROC / "stat").read_text().split()[1:9])
    return (user + nice + system + interrupts + soft + steal) / _TICKS
