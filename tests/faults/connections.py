"""What the tests of jobq's connections share: a call to be struck, and what every one must survive.

`survive(calls, ...)` strikes each call with each fault, in one world a fault and without a restart: an order is placed
that provokes the call, the fault strikes it, and everything must come to its end. A fault that strikes nothing fails
the test.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Literal

import pytest

from jobq.broker import client, scripts
from jobq.outbox import database, follow, line, patience, settle
from jobq.relay import relay, walk
from jobq.worker import fetching, sweeper, worker
from tests.faults.proxy import Fault, Proxy
from tests.faults.world import KINDS, LONGEST_S, World, open_world
from tests.waiting import until

log = logging.getLogger(__name__)

FAULTS = (Fault.DROP_BEFORE, Fault.DROP_AFTER, Fault.BLACK_HOLE, Fault.LATE, Fault.HALF_OPEN, Fault.RESET)
ANOTHER_S = 0.2
"""After this long a call that was not made is provoked again."""
EXPECTED = {
    "store away",
    "store back",
    "job retried",
    "job dead",
    "no such task in this worker, parked until one comes that has it",
    "adopted entries whose fetch had no answer",
    "swept a dead worker",
    "ended a leader that did nothing",
    "cannot keep the result of a step yet, trying again",
    "could not tidy, trying again later",
    "could not deregister, a sweeper will",
    "job failed after completion",  # its COMMIT took longer than the task's own time
    "redis lost data, rebuilding",  # a relay's first push, which takes any token, came late
    "event loop blocked",  # on a busy machine
}
"""What may be logged as a warning or worse."""


_UNREPAIRED = ("push.lua", "complete.sql", "COMMIT of complete_one.sql")
"""Calls after whose loss no other part of jobq has anything to repair."""
Store = Literal["postgres", "valkey"]
_PARAMETER = re.compile(r"\{schema\}|(?<!:):[a-z_]+")


@dataclass(frozen=True)
class Call:
    """One request on the main path of jobq."""

    name: str
    match: tuple[bytes, ...]
    """What is in it on the wire."""
    by: str = "book"
    """The kind of order that provokes it."""
    is_application: bool = False
    """Whether the application makes it, and not jobq's processes."""

    def __str__(self) -> str:
        return self.name


@contextmanager
def short_patience(store: Store) -> Iterator[float]:
    """Shorten what jobq waits for from one store: its deadlines and pauses are constants of their modules.

    The other store may take its time: on a busy machine it would be taken for away. Gives the seconds that jobq now
    waits for an answer, 5 to 75 times as short; longer on a machine that is busy.
    """
    answer_s = 0.4 * min(max(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0), 5.0)
    with pytest.MonkeyPatch.context() as patch:
        if store == "valkey":
            patch.setattr(scripts, "CALL_TIMEOUT_S", answer_s)
            patch.setattr(client, "CALL_TIMEOUT_S", answer_s)
            patch.setattr(client, "SYNC_TIMEOUT_S", answer_s)
            patch.setattr(fetching, "_ANSWER_S", answer_s)
        else:
            patch.setattr(follow, "ANSWER_TIMEOUT_S", answer_s)
            patch.setattr(line, "DEADLINE_S", 1.5 * answer_s)  # it may have to connect
            patch.setattr(database, "_CONNECT_TIMEOUT_S", answer_s)
            patch.setattr(settle, "LOCK_TIMEOUT_MS", round(1000 * answer_s / 4))
            patch.setattr(patience, "ANSWER_TIMEOUT_S", answer_s)
        patch.setattr(fetching, "_BELL_S", answer_s / 4)
        patch.setattr(sweeper, "SWEEP_EVERY_S", 0.1)
        patch.setattr(worker, "SWEEP_EVERY_S", 0.1)
        patch.setattr(relay, "_ANNOUNCE_EVERY_S", 0.2)
        yield answer_s


async def survive(calls: Sequence[Call], store: Store, database_urls: Sequence[str], redis_url: str) -> None:
    """Strike each call with each fault: one world a fault, all worlds at the same time, since most of it is waiting."""
    with short_patience(store) as answer_s:
        async with asyncio.TaskGroup() as group:
            for fault, database_url in zip(FAULTS, database_urls, strict=True):
                group.create_task(survives(calls, fault, store, database_url, redis_url, answer_s))


async def requests(store: Store, database_url: str, redis_url: str) -> list[bytes]:
    """All that is asked of a store while every kind of order is placed once, and nothing goes wrong."""
    with short_patience(store) as answer_s:
        async with open_world(database_url, redis_url, answer_s) as world:
            heard = getattr(world, store).requests = []
            for kind in KINDS:
                world.is_application_struck = kind in ("book", "delayed", "many", "alike", "renamed", "cancel")
                await world.place(kind)
                await until(world.is_done, f"everything is done after {kind}", LONGEST_S)
            await world.check()
    return list(heard)


async def survives(
    calls: Sequence[Call], fault: Fault, store: Store, database_url: str, redis_url: str, answer_s: float
) -> None:
    """Strike each call once, one after the other, and see each time that all comes to its end."""
    call: Call | None = None
    try:
        async with open_world(database_url, redis_url, answer_s) as world:
            for call in calls:
                await _survives(world, call, fault, getattr(world, store))
            call = None
    except Exception as error:
        error.add_note(f"{call or 'the end'}: {fault.value}")
        raise


async def _survives(world: World, call: Call, fault: Fault, proxy: Proxy) -> None:
    before, begun_at = proxy.losses, monotonic()
    world.is_application_struck = call.is_application
    if call.by == "held":
        await world.hold()
    proxy.arm(fault, *call.match)

    async def is_over() -> bool:
        return proxy.losses > before or await world.is_done()

    while proxy.losses == before:
        assert monotonic() < begun_at + LONGEST_S, "the fault never struck"
        await world.place(call.by)
        with suppress(TimeoutError):
            async with asyncio.timeout(ANOTHER_S):
                await until(lambda: proxy.losses > before, "it struck")
        await until(is_over, "it struck, or will not", LONGEST_S)
    struck_at = monotonic()
    await until(world.is_done, "every job is done", LONGEST_S)
    repaired_s = monotonic() - struck_at
    await world.check()
    _assert_not_run_again(world, is_redis_struck=proxy is world.valkey)
    if (
        call.name in _UNREPAIRED
        and fault in (Fault.DROP_BEFORE, Fault.DROP_AFTER)
        and repaired_s < walk._SCRUB_OVERDUE_S
    ):
        # What was pushed again was acked unsettled, and a ghost was in Redis twice. Longer outages may bring either,
        # and so may a machine so busy that the scrub finds a job due for long.
        stats = await world.bench.stats()
        assert stats.keys() & {"repushed", "ghost", "rewound", "stale", "garbage"} == set(), (
            f"{repaired_s:.1f} s: {stats}"
        )
    if call.name == "fetch.lua" and fault is Fault.DROP_AFTER:

        async def is_adopted() -> bool:
            return "adopted" in await world.bench.stats()

        await until(is_adopted, "what it fetched unheard was adopted")
    waited_s, took_s = round(struck_at - begun_at, 2), round(monotonic() - struck_at, 2)
    log.info("%s: %s: struck after %s s, all done %s s later", call, fault.value, waited_s, took_s)
    await world.forget()


def _assert_not_run_again(world: World, *, is_redis_struck: bool) -> None:
    """Nobody took the worker for dead, so that none of its runs is lost; what it was not told of, it adopts unrun.

    Only a run whose ctx.complete() met the fault is made again.
    """
    runs = Counter(name for name, _ in world.runs)
    once = [name for name in runs if is_redis_struck or name.startswith(("plain", "reject"))]
    assert [name for name in once if runs[name] > 1 + name.startswith(("fail", "hand_back"))] == []


def assert_quiet(records: Sequence[logging.LogRecord]) -> None:
    """Nothing unusual was logged."""
    told = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    # The pool says so when it could not say goodbye to a connection that is half open.
    told = [message for message in told if not message.startswith("Exception closing connection")]
    assert set(told) - EXPECTED == set()


def words_of(path: Path) -> bytes:
    """What an SQL file has that no other one has, whichever way its parameters are written."""
    others = [_source(other) for other in path.parent.glob("*.sql") if other != path]
    own = [piece for piece in _PARAMETER.split(_source(path)) if not any(piece in other for other in others)]
    return max(own, key=len).encode()


def _source(path: Path) -> str:
    return re.sub(r"--[^\n]*\n", "", path.read_text())
