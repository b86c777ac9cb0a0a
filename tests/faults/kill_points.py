"""Stopping jobq at one place in its code, exactly: a patch that only tests apply.

A point is the moment before or after a call of one of jobq's functions. There a process kills itself, by SIGKILL;
or, in the process of the tests, what came there goes no further.

`python -m tests.faults.kill_points` makes such processes, by fork, for tests that need dozens: it has imported
everything once. It takes orders on stdin, a line of JSON each, and answers each with one on stdout; what it made ends
with it.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

Call = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Arguments, keyword arguments, and for a point after the call its result."""


def any_call(call: Call) -> bool:
    return True


@dataclass(frozen=True)
class Point:
    """Before or after a call of `module:Class.function`; the `nth` of those calls that are `meant`, or each."""

    target: str
    is_after: bool
    meant: Callable[[Call], bool] = any_call
    nth: int | None = 1

    @property
    def owner(self) -> tuple[Any, str]:
        """What has the function, and by which name."""
        module, _, path = self.target.partition(":")
        *outer, name = path.split(".")
        found: Any = import_module(module)
        for part in outer:
            found = getattr(found, part)
        return found, name


def before(target: str, meant: Callable[[Call], bool] = any_call, *, nth: int | None = 1) -> Point:
    return Point(target, False, meant, nth)


def after(target: str, meant: Callable[[Call], bool] = any_call, *, nth: int | None = 1) -> Point:
    return Point(target, True, meant, nth)


class Stopped(BaseException):
    """Raised at a point: when all is over; and at once in code that cannot wait, a thread's or a plain function's."""


class Stop:
    """What comes to its point stays there until the test is over. Only the first to come."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.over = asyncio.Event()
        self.task: asyncio.Task[Any] | None = None
        """Which came there."""
        self._loop = asyncio.get_running_loop()

    async def wait(self) -> None:
        self.task = asyncio.current_task()
        self.reached.set()
        await self.over.wait()
        raise Stopped

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self.reached.set)
        raise Stopped


class Kill:
    """The process that comes to its point is killed there."""

    async def wait(self) -> None:
        self.end()

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Pause:
    """The process that comes to its point stops there, by SIGSTOP, until it is told to go on."""

    async def wait(self) -> None:
        self.end()

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


Strike = Stop | Kill | Pause


@contextmanager
def armed(point: Point, strike: Strike) -> Iterator[None]:
    """Have the strike happen at the point, once."""
    owner, name = point.owner
    is_own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, _struck(original, point, strike))
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def _struck(original: Callable[..., Any], point: Point, strike: Strike) -> Callable[..., Any]:
    calls = 0

    def is_due(is_after: bool, call: Call) -> bool:
        nonlocal calls
        if point.is_after is not is_after or not point.meant(call):
            return False
        calls += 1
        return point.nth in (None, calls)

    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        if is_due(False, (args, kwargs, None)):
            await strike.wait()
        result = await original(*args, **kwargs)
        if is_due(True, (args, kwargs, result)):
            await strike.wait()
        return result

    def function(*args: Any, **kwargs: Any) -> Any:
        if is_due(False, (args, kwargs, None)):
            strike.end()
        result = original(*args, **kwargs)
        if is_due(True, (args, kwargs, result)):
            strike.end()
        return result

    return coroutine if inspect.iscoroutinefunction(original) else function


# --- the process that makes processes --------------------------------------------------------------------------------


def main() -> None:
    """Obey orders until stdin ends."""
    for module in ("asyncpg", "sqlalchemy.dialects.postgresql.asyncpg", "jobq.cli.run", "uvloop", "alembic.command"):
        with suppress(ImportError):
            import_module(module)
    for module in ("tests.faults.windows", "jobq.cli.migrate"):
        import_module(module)
    made: dict[int, int | None] = {}
    while line := sys.stdin.readline():
        order = json.loads(line)
        if "start" in order:
            pid = _fork(partial(_command, order))
            made[pid] = None
            print(json.dumps(pid), flush=True)
        else:
            print(json.dumps(_look(made, order["look"])), flush=True)
    for pid in made:
        if _look(made, pid) is None:
            os.kill(pid, signal.SIGKILL)


def _look(made: dict[int, int | None], pid: int) -> int | None:
    """How a process ended, as subprocess says it; None while it lives."""
    if made[pid] is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        made[pid] = os.waitstatus_to_exitcode(status) if ended else None
    return made[pid]


def _fork(work: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _command(order: dict[str, Any]) -> None:
    """Be a process of its own: `jobq` with these words, that is struck in this window."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, stream in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, stream)
    for name in [name for name in os.environ if name.startswith("JOBQ_")]:
        del os.environ[name]
    os.environ.update(order["env"])
    os.chdir(Path(order["log"]).parent)
    from tests.faults.windows import POINTS, settings_of

    strike = {"kill": Kill(), "pause": Pause()}.get(order["strike"])
    with settings_of(order["window"]), nullcontext() if strike is None else armed(POINTS[order["window"]], strike):
        _run(order["start"])


def _run(words: list[str]) -> None:
    from jobq import embedded
    from jobq.cli import cli
    from tests.faults.crash_app import enqueue_one
    from tests.faults.windows import EMBED, ENQUEUE

    if words == [ENQUEUE]:
        asyncio.run(enqueue_one())
    elif words == [EMBED]:
        with embedded.start(postgres=False) as servers:
            print(servers.directory, flush=True)
    elif words[0] == EMBED:
        embedded.start(Path(words[1]), valkey=False).stop()
    else:
        cli(words, prog_name="jobq")


if __name__ == "__main__":
    main()
