"""One process of a run, under the keeper of the embedded servers: nothing outlives the run, SIGKILL of it included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobq.embedded import keeper
from tests.waiting import until


class Process:
    """One process. Its output goes to a log."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, runtime: str = ""):
        self.name = name
        self.runtime = runtime
        self.log = log
        orders = (str(os.getpid()), "-1", "-1", str(int(signal.SIGKILL)))
        with log.open("ab") as output:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__, *orders, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C is for the run alone
            )
        assert self._keeper.stdout is not None
        self.pid = int(self._keeper.stdout.readline() or 0)

    @property
    def has_ended(self) -> bool:
        return self._keeper.poll() is not None

    def signal(self, number: signal.Signals) -> None:
        """Straight to it: faults are aimed at moments."""
        if not self.has_ended:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it by SIGKILL, and return when it is gone. May be repeated."""
        self.signal(signal.SIGKILL)
        self._keeper.wait()
        self._close()

    async def ends(self, deadline: float = 60) -> int:
        """Wait for its end; returns the exit code, 247 after a SIGKILL."""
        await until(lambda: self.has_ended, f"{self.name} ended; it said:\n{self.last_words()}", deadline)
        self._close()
        return self._keeper.returncode

    def said(self) -> str:
        """Everything it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_words(self, lines: int = 12) -> str:
        return "\n".join(f"  {self.name}: {line}" for line in self.said().splitlines()[-lines:])

    def size(self) -> tuple[int, int, int]:
        """Its resident memory in KiB, its open files, and its threads."""
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        files = len(os.listdir(f"/proc/{self.pid}/fd"))
        return int(status["VmRSS"].split()[0]), files, int(status["Threads"])

    def _close(self) -> None:
        for pipe in (self._keeper.stdin, self._keeper.stdout):
            if pipe is not None:
                pipe.close()
