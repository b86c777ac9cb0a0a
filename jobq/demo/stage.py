"""The processes of the demo: a shop, two relays, two workers.

Invariant: none of them outlives the demo, killed or not: each runs under a keeper, as the embedded servers do.
Called by demo and faults. Calls the command line and uvicorn, as processes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

from ..embedded import Servers, keeper
from ..errors import ConfigurationError, JobqError

LEASE_S = 5
BEAT_S = 1
SLOTS = 8
"""Jobs that one worker runs at the same time."""
QUEUES = ("mail", "ledger")
APP = "shop.jobs:jobs"

_PYTHON = [sys.executable, "-P"]  # -P: what happens to lie in the working directory is not imported
_JOBQ = [*_PYTHON, "-c", "from jobq.cli import main; main()"]
_RELAY = [*_JOBQ, "relay"]
_WORKER = [*_JOBQ, "worker", APP, "-q", ",".join(QUEUES), "-c", str(SLOTS)]
_SHOP = [*_PYTHON, "-m", "uvicorn", "shop.web:app", "--host", "127.0.0.1", "--port", "0", "--no-access-log"]
_NOT_HANDED_ON = ("JOBQ_", "SHOP_", "UVICORN_", "WEB_CONCURRENCY")
_POLL_S = 0.01
_START_S = 60.0


class DemoFailed(JobqError):
    """The demo could not go on. That says nothing about the jobs."""


class Process:
    """One process under its keeper. Its output goes to a log."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path):
        self.name = name
        self._log = log
        orders = (str(os.getpid()), "-1", "-1", str(int(signal.SIGKILL)))
        with log.open("ab") as output:
            self._keeper = subprocess.Popen(  # noqa: S603  our own commands
                [sys.executable, "-I", "-S", keeper.__file__, *orders, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd="/",
                env=environment,
                start_new_session=True,  # Ctrl-C is for the demo alone
            )
        assert self._keeper.stdout is not None
        self.pid = int(self._keeper.stdout.readline() or 0)

    @property
    def has_ended(self) -> bool:
        return self._keeper.poll() is not None

    def kill(self) -> None:
        """End it by SIGKILL, and return when it is gone. May be repeated."""
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        if not self.has_ended:
            # Not by way of the keeper, which may take milliseconds: faults are aimed at moments.
            os.kill(self.pid, signal.SIGKILL)
        self._keeper.wait()
        self._keeper.stdin.close()
        self._keeper.stdout.close()

    def said(self) -> str:
        """Everything it has written so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")


class Stage:
    """All processes, and the environment they share.

    1. `start` starts them and returns when each does its work;
    2. `kill`, `add_worker` and `add_relay` are the faults and the supervisor that repairs them;
    3. `check` raises DemoFailed when a process ended that nobody killed;
    4. `stop` kills them all: what they work on is thrown away with the servers.
    """

    def __init__(self, servers: Servers, smtp: str):
        self.logs = servers.directory / "logs"
        self.logs.mkdir(mode=0o700)
        path = [str(examples()), os.environ.get("PYTHONPATH", "")]
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(_NOT_HANDED_ON)},
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "JOBQ_DATABASE_URL": servers.database_url,
            "JOBQ_REDIS_URL": servers.redis_url,
            "JOBQ_LEASE": str(LEASE_S),
            "JOBQ_BEAT": str(BEAT_S),
            "SHOP_SMTP": smtp,
        }
        self._running: list[Process] = []
        self._count = 0
        self.workers: list[Process] = []
        self.relays: list[Process] = []
        self.shop_url = ""

    async def start(self) -> None:
        """Start everything, and return when all of it is at work."""
        shop = self._add("shop", _SHOP)
        for _ in range(2):
            self.add_relay()
            self.add_worker()
        await self.until(lambda: all("worker ready" in worker.said() for worker in self.workers), "the workers start")
        await self.until(lambda: all("relay stands by" in relay.said() for relay in self.relays), "the relays start")
        await self.until(lambda: self.leader() is not None, "a relay leads")
        await self.until(lambda: _address(shop.said()) is not None, "the shop starts")
        self.shop_url = _address(shop.said()) or ""

    def add_worker(self) -> Process:
        self.workers.append(self._add("worker", _WORKER))
        return self.workers[-1]

    def add_relay(self) -> Process:
        self.relays.append(self._add("relay", _RELAY))
        return self.relays[-1]

    def kill(self, process: Process) -> None:
        """Kill one on purpose."""
        for group in (self._running, self.workers, self.relays):
            if process in group:
                group.remove(process)
        process.kill()

    def leader(self) -> Process | None:
        """The relay that leads, as the logs say."""
        return next((relay for relay in self.relays if _leads(relay.said())), None)

    async def until(
        self,
        condition: Callable[[], bool | Awaitable[bool]],
        what: str,
        *,
        within_s: float = _START_S,
        every_s: float = _POLL_S,
    ) -> None:
        """Wait until `condition` holds. Raises DemoFailed after `within_s`, or when a process has ended."""
        ends_at = time.monotonic() + within_s
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            self.check()
            if time.monotonic() > ends_at:
                raise DemoFailed(f"the demo waited {within_s:.0f} s in vain until {what}{self._last_words()}")
            await anyio.sleep(every_s)

    def check(self) -> None:
        """Raise DemoFailed when a process ended that nobody killed."""
        ended = [process for process in self._running if process.has_ended]
        if ended:
            names = ", ".join(process.name for process in ended)
            raise DemoFailed(f"ended without being asked to: {names}{self._last_words(ended)}")

    def stop(self) -> None:
        for process in self._running:
            process.kill()
        self._running.clear()

    def _add(self, kind: str, command: list[str]) -> Process:
        self._count += 1
        name = f"{kind}-{self._count}"
        process = Process(name, command, self._environment, self.logs / f"{name}.log")
        self._running.append(process)
        return process

    def _last_words(self, processes: list[Process] | None = None) -> str:
        """The end of each log: the logs themselves are gone when somebody reads this."""
        chosen = self._running if processes is None else processes
        ends = [f"{process.name}: {line}" for process in chosen for line in process.said().splitlines()[-5:]]
        return "".join(f"\n  {line}" for line in ends)


def examples(package: Path = Path(__file__).parents[1]) -> Path:
    """Find the folder of the shop: inside the package where it was installed, beside it in a checkout."""
    for folder in (package / "examples", package.parent / "examples"):
        if (folder / "shop" / "jobs.py").is_file():
            return folder
    raise ConfigurationError(f"the demo's shop is missing beside {package}: install jobq again")


def _leads(log: str) -> bool:
    return log.rfind("relay leads") > log.rfind("relay stands by")


def _address(log: str) -> str | None:
    found = re.search(r"running on (http://[\w.:]+)", log)
    return found[1] if found else None
