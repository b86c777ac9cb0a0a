"""Killing a relay, a worker or an application in a window, in two ways, and what is left of them.

`Steps` runs it in this process: what comes to the point goes no further, its sessions end, it beats no more.
`Processes` runs a real one, which gets SIGKILL there. Called by test_crash_points.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from jobq import JobQ
from jobq.broker.client import connect
from jobq.outbox import follow
from jobq.worker.worker import Worker
from tests.builders import Bench
from tests.faults import crash_app
from tests.faults.kill_points import Stop, armed
from tests.faults.proxy import Proxy, postgres_proxy, redis_proxy
from tests.faults.windows import ENQUEUE, Window
from tests.waiting import until

ROOT = Path(__file__).parents[2]
_SESSION = "victim"
"""The application_name of its sessions that are not jobq's own."""
OTHER_QUEUE = "other"
"""Of a worker that sweeps: it does not take what it has swept."""


class Scene(Protocol):
    """What a victim is given to do."""

    window: Window
    ids: list[UUID]

    async def provoke(self, victim: Victim) -> None:
        """What is to happen once the victim has started."""


class Victim(Protocol):
    """A relay, worker or application that has started."""

    async def serves(self) -> None:
        """Wait until it does."""

    def stop(self) -> None:
        """Tell the worker to stop."""

    def loses(self, job_id: UUID) -> None:
        """The victim never hears of the call about this job, where its window says so."""


# --- by steps --------------------------------------------------------------------------------------------------------


class Steps:
    """A victim in this process, which takes step after step until it comes to the point."""

    def __init__(self, bench: Bench):
        self._bench = bench
        url = str(bench.app.given_database)
        self._app = JobQ(
            database=f"{url}{'&' if '?' in url else '?'}application_name={_SESSION}", redis=bench.app.redis_url
        )
        self._app.tasks, self._app.dead_hooks = crash_app.jobs.tasks, crash_app.jobs.dead_hooks
        self._stop = Stop()
        self._worker: Worker | None = None
        self._steps: set[asyncio.Task[Any]] = set()
        self._serving: asyncio.Task[Any] | None = None

    async def kill(self, scene: Scene) -> None:
        """Let it serve until it comes to its point, and end what the system ends with a process."""
        with armed(scene.window.at, self._stop):
            await self._start(scene.window)
            await scene.provoke(self)
            await until(self._stop.reached.is_set, f"it came to the point {scene.window.name!r}")
            await until(lambda: self._serving in (None, self._stop.task) or self._serving.done(), "nothing goes on")
        if self._worker is not None:
            self._worker.heartbeat.stop()
        # The system closes the sockets of a process that dies, and PostgreSQL ends their sessions.
        await self._bench.db.fetch(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND (application_name = $1 OR application_name LIKE 'jobq:%')",
            _SESSION,
        )

    async def serves(self) -> None:
        pass  # it takes its steps

    def stop(self) -> None:
        assert self._worker is not None
        self._worker.orders.stopping.set()
        self._go_on(self._worker.settler.run())
        self._go_on(self._worker.shutdown.run())

    def loses(self, job_id: UUID) -> None:
        pass  # it is stopped before it hears

    async def close(self) -> None:
        """Let go of what was stopped: its sessions are gone, so nothing comes of it."""
        self._stop.over.set()
        stopped = self._steps | (self._worker.turns.runs if self._worker is not None else set())
        for task in stopped:
            task.cancel()
        await asyncio.gather(*stopped, return_exceptions=True)
        await self._app.database.close()

    async def _start(self, window: Window) -> None:
        if window.victim == "application":
            self._go_on(crash_app.place_order(self._app))
        elif window.victim == "relay":
            leader = await self._bench.leader(sleep_after=3, detect_loss_every=0.05, **window.settings)
            assert await follow.try_lead(leader._connection, "jobq")
            self._serving = self._go_on(self._take(leader.step))
        elif window.victim == "sweeper":
            self._worker = worker = await self._bench.worker(app=self._app, queues=(OTHER_QUEUE,))
            worker.sweeper._lease_s = 0.01
            self._serving = self._go_on(self._take(worker.sweeper.step))
        else:
            grace = 0.0 if window.options else 3600.0
            self._worker = worker = await self._bench.worker(app=self._app, grace=grace)
            self._serving = self._go_on(self._take(partial(_turn, worker)))

    def _go_on(self, steps: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(steps)
        self._steps.add(task)
        return task

    async def _take(self, step: Callable[[], Awaitable[Any]]) -> None:
        """Step after step, until anything of the victim comes to the point."""
        while not self._stop.reached.is_set() and not (self._worker and self._worker.orders.stopping.is_set()):
            await step()
            await asyncio.sleep(0.001)


async def _turn(worker: Worker) -> None:
    worker.orders.wake()
    await worker.turns.step()
    await worker.turns.unpark("default")
    await asyncio.to_thread(worker.heartbeat.step)
    await worker.settler.step()


# --- by SIGKILL ------------------------------------------------------------------------------------------------------


class Forge:
    """Makes processes that are struck in a window. See kill_points.py."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self._process = process

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Forge]:
        command = [sys.executable, "-m", "tests.faults.kill_points"]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            yield cls(process)
            assert process.stdin is not None
            process.stdin.close()

    def start(self, *words: str, window: str, strike: str | None = "kill", log: Path, **env: str) -> Process:
        """Start `jobq` with these words, to be struck in this window: killed, stopped (`pause`), or not at all."""
        order = {"start": words, "window": window, "strike": strike, "log": str(log), "env": env}
        return Process(self, self._ask(order), log)

    def look(self, pid: int) -> int | None:
        """How the process ended; None while it lives."""
        return self._ask({"look": pid})  # type: ignore[no-any-return]

    def _ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Process:
    """One process that a Forge made."""

    def __init__(self, forge: Forge, pid: int, log: Path):
        self.pid = pid
        self._forge = forge
        self._log = log

    @property
    def said(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    async def until(self, condition: Callable[[], object], message: str) -> None:
        """Wait for something that it does, while it lives."""

        def is_so() -> bool:
            code = self._forge.look(self.pid)
            if condition():
                return True
            assert code is None, f"it ended with {code}"
            return False

        try:
            await until(is_so, message)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.said}") from None

    async def says(self, phrase: str) -> None:
        await self.until(lambda: phrase in self.said, f"it said {phrase!r}")

    async def ends(self) -> int:
        """Wait for its end; returns the exit code."""
        await self.until(lambda: self._forge.look(self.pid) is not None, "it ended")
        code = self._forge.look(self.pid)
        assert code is not None
        return code

    def kill(self) -> None:
        """Kill it, if it still lives."""
        if self._forge.look(self.pid) is None:
            os.kill(self.pid, signal.SIGKILL)


class Processes:
    """A victim that is a process of its own."""

    def __init__(self, bench: Bench, forge: Forge, folder: Path):
        self._bench = bench
        self._forge = forge
        self._folder = folder
        self._window: Window | None = None
        self._process: Process | None = None
        self._proxy: Proxy | None = None

    async def kill(self, scene: Scene) -> None:
        """Start it; it kills itself in the window, or is killed while it waits for what the proxy keeps."""
        window = self._window = scene.window
        urls = {"postgresql": str(self._bench.app.given_database), "redis": self._bench.app.redis_url}
        async with AsyncExitStack() as stack:
            if (loss := window.loss) is not None:
                before = redis_proxy if loss.store == "redis" else postgres_proxy
                self._proxy, urls[loss.store] = await stack.enter_async_context(before(urls[loss.store]))
                if loss.match:
                    self._lose(loss.match)
            self._process = self._forge.start(
                *_words(window),
                window=window.name,
                strike="kill" if loss is None else None,
                log=self._folder / "log",
                JOBQ_DATABASE_URL=urls["postgresql"],
                JOBQ_REDIS_URL=urls["redis"],
            )
            await scene.provoke(self)
            if self._proxy is not None:
                await self._process.until(lambda: self._proxy.losses == 1, "it waits for what is lost")
                self._process.kill()
            assert await self._process.ends() == -signal.SIGKILL, self._process.said

    async def serves(self) -> None:
        assert self._process is not None
        assert self._window is not None
        if self._window.victim == "relay":
            await self._process.says("relay leads")
        else:
            await self._process.says("worker ready")
            await until(lambda: self._bench.broker.beats("default"), "it has beaten")

    def stop(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGTERM)

    def loses(self, job_id: UUID) -> None:
        assert self._window is not None
        if self._window.loss is not None and not self._window.loss.match:
            self._lose(job_id.hex.encode())

    async def close(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _lose(self, match: bytes) -> None:
        assert self._proxy is not None
        assert self._window is not None
        assert self._window.loss is not None
        lose = self._proxy.lose_reply if self._window.loss.is_reply else self._proxy.lose_request
        lose(match, silent=True)


def _words(window: Window) -> tuple[str, ...]:
    match window.victim:
        case "application":
            return (ENQUEUE,)
        case "relay":
            return ("relay", "--lease", "60", "--beat", "0.05")
        case "sweeper":
            return ("worker", "tests.faults.crash_app:jobs", "-q", OTHER_QUEUE, "--lease", "1", "--beat", "0.1")
        case _:
            return ("worker", "tests.faults.crash_app:jobs", "--lease", "60", "--beat", "0.1", *window.options)


async def loaded_scripts(redis_url: str) -> None:
    """Have Redis know every script, so that a call of one is one request."""
    from jobq.broker.scripts import script

    client = connect(redis_url)
    for name in ("push", "fetch", "beat", "ack", "release", "sweep", "park", "unpark", "mend"):
        await client.script_load(script(name).source)
    await client.aclose()
