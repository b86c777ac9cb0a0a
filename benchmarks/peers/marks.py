"""What a peer's process is told, and what its jobs leave behind for the run: runs, starts and ends.

Imported by every Python peer in its own environment, so nothing but the standard library is used here. `marks.mjs`
is the same for Node.js. Invariant: the same work for every peer, and small beside what it measures: a run adds one to
a number in shared memory. Called by the `*_app.py` files. Calls nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from threading import get_native_id
from typing import Any

DIRECTORY = Path(os.environ.get("PEERS_DIRECTORY", "."))
DATABASE_URL = os.environ.get("PEERS_DATABASE_URL", "")
SOCKET = os.environ.get("PEERS_SOCKET", "")
"""Valkey's unix socket."""
REDIS_URL = f"unix://{SOCKET}"
CONCURRENCY = int(os.environ.get("PEERS_CONCURRENCY", "100"))
RECOVERY_S = int(os.environ.get("PEERS_RECOVERY_S", "0"))
"""The lease, visibility or stall timeout to set; 0: leave it as the peer has it."""
MODE = os.environ.get("PEERS_MODE", "")
"""What tells two entries of one application apart."""
WORD = "word"
SLEEP_S = 0.2
SLOTS = 4096
WRITERS = 16

_WARM_UP = 6
"""psycopg prepares a statement at its sixth use."""
_IDLE_S = 0.02
_WRITE_S = 4.0
_LONGEST_S = 20.0
_CHUNK = 5_000


class _Files:
    """Opened at the first use, so that importing an application needs no run."""

    def __init__(self) -> None:
        self._opened: dict[str, int] = {}
        self._counts: memoryview | None = None

    @property
    def counts(self) -> memoryview:
        if self._counts is None:
            with (DIRECTORY / "runs").open("r+b") as file:
                self._counts = memoryview(mmap.mmap(file.fileno(), 8 * SLOTS)).cast("q")
        return self._counts

    def append(self, name: str, line: str) -> None:
        if name not in self._opened:
            self._opened[name] = os.open(DIRECTORY / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(self._opened[name], line.encode())


_files = _Files()


def ran() -> None:
    """Count one run, in the place of this thread: the body of the no-op job."""
    _files.counts[get_native_id() % SLOTS] += 1


def started(number: int) -> None:
    """Note when a job's first line ran."""
    now = time.monotonic_ns()
    _files.append("starts", f"{number} {now}\n")


def ended(number: int) -> None:
    """Note that a job of the kill test reached its end."""
    _files.append("ends", f"{number}\n")


def use_uvloop() -> None:
    """Run this process on uvloop, where its environment has it."""
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


One = Callable[[str, int], Awaitable[Any]]
"""Enqueue one job by the name of its task and its number; return when the store has it."""
Many = Callable[[str, range], Awaitable[Any]]
Producing = Callable[[], contextlib.AbstractAsyncContextManager[tuple[One, Many]]]
Write = Callable[[int], Awaitable[Any]]
"""Commit one transaction that enqueues one job of this number, on a connection of its own."""
Writing = Callable[[], contextlib.AbstractAsyncContextManager[Write]]


def main(
    producing: Producing, setup: Callable[[], Coroutine[Any, Any, None]] | None = None, writing: Writing | None = None
) -> None:
    """`setup` | `fill TASK COUNT` | `latency COUNT` | `trickle` | `enqueue`: what the run asks of a peer's producer."""
    command, *arguments = sys.argv[1:]
    if command == "setup":
        if setup is not None:
            asyncio.run(setup())
    elif command == "fill":
        asyncio.run(_fill(producing, arguments[0], int(arguments[1])))
    elif command == "latency":
        asyncio.run(_latency(producing, int(arguments[0])))
    elif command == "trickle":
        asyncio.run(_trickle(producing))
    elif command == "enqueue" and writing is not None:
        asyncio.run(_enqueue(writing))
    else:
        sys.exit(f"no command is called {command!r}")


async def gather(calls: Iterable[Awaitable[Any]], at_once: int = 100) -> None:
    """Await them all, some at once: bulk for a peer that has none."""
    iterator = iter(calls)

    async def take() -> None:
        for call in iterator:
            await call

    await asyncio.gather(*(take() for _ in range(at_once)))


async def _fill(producing: Producing, task: str, count: int) -> None:
    async with producing() as (_, many):
        for first in range(0, count, _CHUNK):
            await many(task, range(first, min(first + _CHUNK, count)))


async def _latency(producing: Producing, count: int) -> None:
    """Enqueue one job at a time, the next 20 to 60 ms after the last one's start: no polling stays in step with it."""
    until = time.monotonic() + _LONGEST_S
    async with producing() as (one, _):
        for number in range(-_WARM_UP, count):
            await one("note_start", number)
            returned = time.monotonic_ns()
            _files.append("returns", f"{number} {returned}\n")
            await _until_started(number + _WARM_UP + 1)
            await asyncio.sleep(_IDLE_S * (1 + 2 * random.random()))
            if number >= 0 and time.monotonic() > until:
                return


async def _until_started(count: int) -> None:
    path = DIRECTORY / "starts"
    while not path.exists() or path.read_bytes().count(b"\n") < count:  # noqa: ASYNC110  # another process writes it
        await asyncio.sleep(0.002)


async def _trickle(producing: Producing) -> None:
    """One no-op job a second, until killed: the traffic that a live system has."""
    async with producing() as (one, _):
        number = 0
        while True:
            await one("nothing", number)
            number += 1
            await asyncio.sleep(1)


async def _enqueue(writing: Writing) -> None:
    """Note the transactions a second of WRITERS at a time."""
    async with contextlib.AsyncExitStack() as stack:
        writes = [await stack.enter_async_context(writing()) for _ in range(WRITERS)]
        for number in range(_WARM_UP):
            await asyncio.gather(*(write(number) for write in writes))
        began_at = time.monotonic()

        async def count(write: Write) -> int:
            number = 0
            while time.monotonic() < began_at + _WRITE_S:
                await write(number)
                number += 1
            return number

        done = await asyncio.gather(*map(count, writes))
        rate = sum(done) / (time.monotonic() - began_at)
    _files.append("rate", f"{rate}\n")


@contextlib.asynccontextmanager
async def synchronously(send: Callable[[str, int], Any]) -> AsyncIterator[tuple[One, Many]]:
    """The producer of a peer whose client is synchronous."""

    async def one(task: str, number: int) -> None:
        send(task, number)

    async def many(task: str, numbers: range) -> None:
        for number in numbers:
            send(task, number)

    yield one, many
