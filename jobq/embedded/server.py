"""What both embedded servers share: the start under a keeper, the wait until ready, the end.

Invariant: a started server is *our* process and answers; what a killed one left behind is never taken for it.
Implemented by postgres and valkey.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Literal

from jobq.embedded import keeper
from jobq.embedded.account import Account
from jobq.embedded.directory import RunDirectory, take_lock
from jobq.embedded.programs import Program
from jobq.errors import ConfigurationError

READY_S = 120.0  # crash recovery, or a machine that starts many at once
STOP_S = 20.0
GONE_S = 10.0
POLL_S = 0.005

StopMode = Literal["fast", "immediate"]
StopSignals = dict[StopMode, signal.Signals]


class Server(ABC):
    """One server process and its data.

    1. `start` takes the lock of the data, starts the server under a keeper and waits until it answers.
    2. `stop` ends it in order, or at once without its last writes; `kill` is SIGKILL.
    3. All three return when the server is there, or when the last of its processes is gone.
    """

    name: ClassVar[str]
    stop_signals: ClassVar[StopSignals]

    def __init__(
        self, program: Program | None, account: Account, run: RunDirectory, directory: Path, *, durable: bool
    ) -> None:
        self.data = directory / self.name
        self._given_program = program
        self._account = account
        self._run = run
        self._durable = durable
        self._lock_path = self.data.with_suffix(".lock")
        self._log_path = self.data.with_suffix(".log")
        self._keeper: subprocess.Popen[bytes] | None = None
        self._pid = 0

    @property
    def is_running(self) -> bool:
        return self._keeper is not None and self._keeper.poll() is None

    @property
    def _program(self) -> Program:
        if self._given_program is None:
            raise ConfigurationError(f"The embedded {self.name} server was left out of the start.")
        return self._given_program

    @property
    def pid(self) -> int:
        if not self.is_running:
            raise ConfigurationError(f"The embedded {self.name} server is not running: call its start().")
        return self._pid

    def start(self, config: Mapping[str, str] | None = None) -> None:
        """Start the server on its data and wait until it answers.

        `config`: further settings, for this start only. Raises ConfigurationError with the end of the
        server's log when it does not come up.
        """
        if self.is_running:
            raise ConfigurationError(f"The embedded {self.name} server is running already: stop it first.")
        self._forget_keeper()
        lock = take_lock(self._lock_path, wait_s=GONE_S)
        try:
            self._prepare(lock)
            self._spawn(self._command(dict(config or {})), lock)
        finally:
            os.close(lock)  # the keeper and the server have it now
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def stop(self, mode: StopMode = "fast") -> None:
        """End the server: "fast" writes what is unwritten, "immediate" does not. May be repeated."""
        self._end(self.stop_signals[mode])

    def kill(self) -> None:
        """End the server by SIGKILL. May be repeated."""
        self._end(signal.SIGKILL)

    @abstractmethod
    def _prepare(self, lock: int) -> None:
        """Make the data directory unless it is there."""

    @abstractmethod
    def _command(self, config: dict[str, str]) -> list[str]:
        """Return the command line."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Tell whether this very process answers."""

    def _spawn(self, command: list[str], lock: int) -> None:
        uid, gid = (self._account.uid, self._account.gid) if self._account.is_dropped else (-1, -1)
        orders = map(str, (os.getpid(), uid, gid, int(self.stop_signals["immediate"])))
        with self._log_path.open("ab") as log:
            self._log_start = log.tell()
            self._keeper = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", keeper.__file__, *orders, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
                env=server_environment(),
                pass_fds=(self._run.lock, lock),
                start_new_session=True,  # Ctrl-C is for jobq alone
            )
        assert self._keeper.stdout is not None
        self._pid = int(self._keeper.stdout.readline() or 0)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while not self._is_ready():
            if not self.is_running or time.monotonic() > deadline:
                raise ConfigurationError(f"The embedded {self.name} did not start: {self._last_words()}")
            time.sleep(POLL_S)

    def _last_words(self) -> str:
        with self._log_path.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").strip().splitlines()
        return " | ".join(lines[-5:]) or "it said nothing"

    def _end(self, how: signal.Signals) -> None:
        if self._keeper is None:
            return
        self._send(how)
        try:
            self._keeper.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._send(signal.SIGKILL)
            self._keeper.wait()
        self._forget_keeper()
        # The postmaster's children notice its death a moment later; only then is a crash complete.
        os.close(take_lock(self._lock_path, wait_s=GONE_S))

    def _send(self, number: signal.Signals) -> None:
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        with suppress(BrokenPipeError):  # it has ended on its own
            # Through the keeper, whose child it is: this pid cannot be another process's by now.
            os.write(self._keeper.stdin.fileno(), bytes([number]))

    def _forget_keeper(self) -> None:
        if self._keeper is not None:
            for pipe in (self._keeper.stdin, self._keeper.stdout):
                if pipe is not None:
                    pipe.close()
            self._keeper.wait()
            self._keeper = None


def server_environment() -> dict[str, str]:
    """Nothing of ours: PGDATA, PGOPTIONS or a locale the server does not have would change what it does."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"LC_ALL": "C"}
