"""The windows in which a process may die: where each is, what both stores hold right after it, and how it ends.

One table for both ways to die: by being stepped no further, and by SIGKILL. Each row names a line `# Crash here` of
jobq, and the row of the README's crash table that it belongs to; test_crash_points_elsewhere.py sees that none is
forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

from jobq.broker.scripts import script
from jobq.outbox import follow
from tests.faults import crash_app
from tests.faults.kill_points import Call, Point, after, before

ENQUEUE = "enqueue"
"""In place of a `jobq` command: a process of the application."""
EMBED = "embed"
"""In place of a `jobq` command: private servers, started and stopped."""
DEAD = "w-dead"
"""The worker that others sweep: it held the job, and a transaction on its row."""

Generations = tuple[int, int, int]
"""generation, crashes, attempts"""
NEW: Generations = (1, 0, 0)
AGAIN: Generations = (2, 1, 0)
"""After one crash."""
Victim = Literal["application", "relay", "worker", "stopping worker", "sweeper"]


class Seen(NamedTuple):
    """What both stores hold."""

    rows: tuple[Generations, ...] = ()
    effects: int = 0
    calls: int = 0
    dead: int = 0
    alerts: int = 0
    ready: int = 0
    working: int = 0
    parked: int = 0
    known: int = 0


HELD = Seen(rows=(NEW,), working=1, known=1)
"""A worker has the job, and nothing has been written."""
PUSHED = Seen(rows=(NEW,), ready=1, known=1)
SETTLED = Seen(working=1, known=1)
"""The row is gone, and Redis has not heard of it."""


class Loss(NamedTuple):
    """What a real process never hears, in place of being struck: it is killed while it waits."""

    store: Literal["redis", "postgresql"]
    match: bytes
    """In the request. Empty: the id of the job."""
    is_reply: bool = True


@dataclass(frozen=True)
class Window:
    """One place to die in, with a job at stake."""

    name: str
    where: str
    """The comment at the place."""
    table: str
    """The row of the README's crash table, by how it begins; empty for none."""
    victim: Victim
    at: Point
    then: Seen
    """Right after the crash."""
    runs: Mapping[str, tuple[Generations, ...]]
    """Every run that starts, by task, from first to last."""
    jobs: tuple[str, ...] = ("book",)
    loss: Loss | None = None
    committed: Literal["before", "after", "too late"] = "before"
    """Whether the jobs are committed before the relay starts, after that, or after its death."""
    delay_s: float | None = None
    crashes: Mapping[str, int] = field(default_factory=dict)
    """What the jobs of a task have behind them."""
    arrives: Literal["ready", "unanswered", "parked"] = "ready"
    """How a worker comes by the job: by its fetch, by one that had no answer, or by calling back what is parked."""
    options: tuple[str, ...] = ()
    """Of the victim's command."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of a relay, that no option gives."""
    loses_redis: bool = False
    """Whether Redis is emptied under the relay."""
    effects: int = 1
    """For each job, in the end."""
    calls: int = 0
    dead: int = 0
    """With one alert for each."""


def _has_entries(call: Call) -> bool:
    args, _, _ = call
    return bool(args[2])


def _has_fetched(call: Call) -> bool:
    return bool(call[2] is not None and call[2].entries)


def _vouches_for_a_run(call: Call) -> bool:
    return any(entry.partition(b":")[0] in crash_app.noted for entry in call[1]["owned"])


def _of_the_dead(call: Call) -> bool:
    return bool(call[0][2] == DEAD)


def _is_true(call: Call) -> bool:
    return call[2] is True


def _reply_of(name: str) -> Loss:
    return Loss("redis", script(name).sha.encode())


ONCE = {"book": (NEW,)}
TWICE = {"book": (NEW, AGAIN)}
AS_CRASHED = {"book": (AGAIN,)}
"""It had not started, but its worker died with it in hand."""

_BEFORE_COMMIT = "before the commit"
_BEFORE_PUSH = "after the commit, before the push"
_PUSHED = "the push arrived, its reply was lost"
_FETCHED = "fetched, the reply was lost"
_RUNNING = "the worker dies while the job runs, or pauses past its lease"
_BEFORE_ACK = "after the commit of `ctx.complete()`, before the ack"
_NOT_FLUSHED = "a plain job is done, its batch not yet flushed"
_SWEEPER = "a sweeper dies half way"
_REDIS_LOST = "FLUSHALL, failover to a lagging replica, restart without AOF"

_PUSH = "jobq.broker.scripts:Broker.push"
_ACK = "jobq.broker.scripts:Broker.ack"
_SWEEP = "jobq.broker.scripts:Broker.sweep"
_COMMITTING = b"COMMIT;"
"""As asyncpg sends it. Without the semicolon it stands in comments of our statements too."""
_COMMIT = "sqlalchemy.ext.asyncio:AsyncSessionTransaction.__aexit__"

_CALLER = "jobq/outbox/enqueue.py: of the caller, or anywhere before its COMMIT: nothing exists."
_POLLED = "jobq/relay/relay.py: the next leader's snapshot is later, and its walk finds the rows."
_PUSHING = "jobq/relay/push.py: pushed again after the restart; push.lua drops the copy."
_WALKING = "jobq/relay/walk.py: or anywhere in a walk: the next leader's begins at the start."
_DUE = "jobq/relay/relay.py: with what is due out of the heap: the next leader's walk finds it."
_ASLEEP = (
    "jobq/relay/wake_up.py: or asleep: the locks end with the session, and the next leader's walk finds what has come."
)
_LOST = "jobq/relay/push.py: the next leader's walk looks everywhere, whether or not it hears of the loss."
_FETCHING = "jobq/worker/fetching.py: or no answer: the entries are in the working list, and are adopted or swept."
_READ = "jobq/worker/turns.py: or before the first line of a run: swept, and counted like one that had started."
_ADOPTING = "jobq/worker/turns.py: they are in the working list, and are swept."
_UNPARKED = "jobq/worker/turns.py: or no answer: what came to the working list is adopted or swept."
_BEATEN = "jobq/worker/heartbeat.py: or no answer: the counter has moved once more, and stands still from here on."
_IN_BLOCK = "jobq/complete.py: or in the block: the DELETE is rolled back with the session, and the job runs again."
_AT_COMMIT = "jobq/complete.py: nothing is committed, the job runs again."
_COMMITTED = "jobq/complete.py: all is committed; the entry comes back, and its pre-read finds no row."
_CALLED = "jobq/context.py: the call has been made and its result is not kept; the next run makes it again."
_KEPT = "jobq/context.py: the result is kept, and the next run makes no call."
_BUFFERED = (
    "jobq/worker/settler.py: nothing of this buffer is written; its jobs are swept, and those that were done run again."
)
_WRITTEN = "jobq/worker/settler.py: the rows are settled and the entries are not; each is dropped at its next pre-read."
_MOVED = "jobq/worker/settler.py: or no answer: Redis has moved them, and moving them again changes nothing."
_HOOK = "jobq/worker/burial.py: what the hooks wrote goes with the burial; whoever buries it then calls them."
_LIST_READ = "jobq/worker/sweeper.py: nothing is counted; the next sweeper reads the same list."
_COUNTED = (
    "jobq/worker/sweeper.py: counted; whoever sweeps next finds the generations moved on, and the poison by its"
    " crashes."
)
_NOT_SWEPT = (
    "jobq/worker/sweeper.py: the rows have new generations; the next sweep finds them so, and counts nothing twice."
)
_SWEPT = "jobq/worker/sweeper.py: or no answer: the entries are ready again, and the worker is forgotten."
_STILL_BEATING = (
    "jobq/worker/shutdown.py: or no PostgreSQL: what still runs keeps its entry, and is swept; that counts as a crash."
)
_DRAINED = "jobq/worker/shutdown.py: all is written and acked; a sweeper forgets this worker, and counts nothing."


def _application(name: str, where: str, table: str, **rest: Any) -> Window:
    return Window(name, where, table, "application", **rest)


def _relay(name: str, where: str, table: str, **rest: Any) -> Window:
    return Window(name, where, table, "relay", **({"committed": "after", "runs": ONCE} | rest))


def _worker(name: str, where: str, table: str = _RUNNING, then: Seen = HELD, **rest: Any) -> Window:
    return Window(name, where, table, "worker", then=then, **rest)


def _stopping(name: str, where: str, **rest: Any) -> Window:
    return Window(name, where, _RUNNING, "stopping worker", **({"jobs": ("wait",)} | rest))


def _sweeper(name: str, where: str, **rest: Any) -> Window:
    return Window(name, where, _SWEEPER, "sweeper", **({"runs": AS_CRASHED} | rest))


WINDOWS: tuple[Window, ...] = (
    # --- the application; it tries again afterwards, with the same idempotency key -----------------------------------
    _application(
        "inserted, not committed", _CALLER, _BEFORE_COMMIT, at=after("jobq.task:enqueue"), then=Seen(), runs=ONCE
    ),
    _application(
        "committed, the application never hears of it",
        _CALLER,
        _BEFORE_PUSH,
        at=after(_COMMIT),
        loss=Loss("postgresql", _COMMITTING),
        then=Seen(rows=(NEW,)),
        runs=ONCE,
    ),
    # --- the relay ---------------------------------------------------------------------------------------------------
    _relay(
        "polled, not pushed",
        _POLLED,
        _BEFORE_PUSH,
        at=before("jobq.relay.relay:Leader._push_new"),
        then=Seen(rows=(NEW,)),
    ),
    _relay(
        "half of a big push",
        _PUSHING,
        _BEFORE_PUSH,
        at=before(_PUSH, _has_entries, nth=2),
        jobs=("book",) * 5,
        settings={"push_limit": 2},
        then=Seen(rows=(NEW,) * 5, ready=2, known=2),
    ),
    _relay(
        "pushed, the reply is lost",
        _PUSHING,
        _PUSHED,
        at=after(_PUSH, _has_entries),
        loss=Loss("redis", b""),
        then=PUSHED,
    ),
    _relay(
        "pushed, before the next poll",
        _POLLED,
        _PUSHED,
        at=after("jobq.relay.relay:Leader._poll", _is_true),
        then=PUSHED,
    ),
    _relay(
        "the walk has read a page",
        _WALKING,
        _BEFORE_PUSH,
        committed="before",
        at=before("jobq.broker.scripts:Broker.known"),
        then=Seen(rows=(NEW,)),
    ),
    _relay(
        "the walk has asked Redis",
        _WALKING,
        _BEFORE_PUSH,
        committed="before",
        at=before("jobq.outbox.follow:reread"),
        then=Seen(rows=(NEW,)),
    ),
    _relay(
        "the walk has read what is missing again",
        _WALKING,
        _BEFORE_PUSH,
        committed="before",
        at=after("jobq.outbox.follow:reread"),
        then=Seen(rows=(NEW,)),
    ),
    _relay(
        "a timer is due, not pushed",
        _DUE,
        _BEFORE_PUSH,
        delay_s=1.0,  # polled before it is due, however busy the machine
        at=before("jobq.relay.relay:Leader._push_beyond_limit"),
        then=Seen(rows=(NEW,)),
    ),
    _relay(
        "asleep, with the leader's lock and K",
        _ASLEEP,
        _BEFORE_PUSH,
        committed="too late",
        at=after("jobq.relay.wake_up:WakeUp.fall_asleep", _is_true),
        then=Seen(rows=(NEW,)),
    ),
    _relay(
        "Redis lost everything, and nobody else has seen it",
        _LOST,
        _REDIS_LOST,
        loses_redis=True,
        at=before("jobq.relay.push:ReliablePush._note_refusal"),
        then=Seen(rows=(NEW,)),
    ),
    # --- the worker, up to the start of a run ------------------------------------------------------------------------
    _worker(
        "fetched, the reply is lost",
        _FETCHING,
        _FETCHED,
        at=after("jobq.broker.scripts:Broker.fetch", _has_fetched),
        loss=_reply_of("fetch"),
        runs=AS_CRASHED,
    ),
    _worker("fetched, not read", _FETCHING, _FETCHED, at=before("jobq.outbox.settle:read"), runs=AS_CRASHED),
    _worker("read, not started", _READ, at=after("jobq.outbox.settle:read"), runs=AS_CRASHED),
    _worker(
        "fetched without a reply, not adopted yet",
        _ADOPTING,
        _FETCHED,
        arrives="unanswered",
        at=before("jobq.worker.turns:Turns.adopt"),
        runs=AS_CRASHED,
    ),
    _worker(
        "adopted, not read",
        _READ,
        _FETCHED,
        arrives="unanswered",
        at=before("jobq.outbox.settle:read"),
        runs=AS_CRASHED,
    ),
    _worker(
        "not parked yet",
        _BUFFERED,
        "",
        jobs=("later",),
        at=before("jobq.broker.scripts:Broker.park"),
        runs={"later": (AGAIN,)},
    ),
    _worker(
        "parked, the reply is lost",
        _MOVED,
        "",
        jobs=("later",),
        at=after("jobq.broker.scripts:Broker.park"),
        loss=_reply_of("park"),
        then=Seen(rows=(NEW,), parked=1, known=1),
        runs={"later": (NEW,)},
    ),
    _worker(
        "unparked, the reply is lost",
        _UNPARKED,
        "",
        arrives="parked",
        at=after("jobq.broker.scripts:Broker.unpark", _has_fetched),
        runs=AS_CRASHED,
    ),
    # --- the worker, while a job runs --------------------------------------------------------------------------------
    _worker("running", _READ, at=before("jobq.complete:_begin"), runs=TWICE),
    _worker(
        "a beat's reply is lost",
        _BEATEN,
        jobs=("wait",),
        at=after("jobq.worker.heartbeat:beat", _vouches_for_a_run),
        loss=Loss("redis", b""),
        runs={"wait": (NEW, AGAIN)},
    ),
    _worker(
        "a step's call is made, its result is not kept",
        _CALLED,
        jobs=("charge",),
        at=before("jobq.outbox.steps:record"),
        then=HELD._replace(calls=1),
        runs={"charge": (NEW, AGAIN)},
        calls=2,
    ),
    _worker(
        "a step is kept",
        _KEPT,
        jobs=("charge",),
        at=after("jobq.outbox.steps:record"),
        then=HELD._replace(calls=1),
        runs={"charge": (NEW, AGAIN)},
        calls=1,
    ),
    _worker("complete(): before the DELETE", _READ, at=before("jobq.complete:begin_complete"), runs=TWICE),
    _worker(
        "complete(): between the DELETE and the block", _IN_BLOCK, at=after("jobq.complete:begin_complete"), runs=TWICE
    ),
    _worker("complete(): inside the block", _IN_BLOCK, at=before("tests.faults.crash_app:inside"), runs=TWICE),
    _worker(
        "complete(): between the block and COMMIT",
        _AT_COMMIT,
        at=after("jobq.complete:_check_still_open"),
        runs=TWICE,
    ),
    _worker(
        "complete(): COMMIT never arrives",
        _AT_COMMIT,
        at=before(_COMMIT),
        loss=Loss("postgresql", _COMMITTING, is_reply=False),
        runs=TWICE,
    ),
    _worker(
        "complete(): COMMIT is done, its reply is lost",
        _COMMITTED,
        _BEFORE_ACK,
        at=after(_COMMIT),
        loss=Loss("postgresql", _COMMITTING),
        then=SETTLED._replace(effects=1),
        runs=ONCE,
    ),
    _worker(
        "complete(): committed, not acked",
        _COMMITTED,
        _BEFORE_ACK,
        at=before(_ACK),
        then=SETTLED._replace(effects=1),
        runs=ONCE,
    ),
    _worker(
        "complete(): acked, the reply is lost",
        _MOVED,
        _BEFORE_ACK,
        at=after(_ACK),
        loss=_reply_of("ack"),
        then=Seen(effects=1),
        runs=ONCE,
    ),
    # --- the worker, after a run -------------------------------------------------------------------------------------
    _worker(
        "plain: done, not flushed",
        _BUFFERED,
        _NOT_FLUSHED,
        jobs=("plain",),
        effects=0,
        at=before("jobq.outbox.settle:complete"),
        runs={"plain": (NEW, AGAIN)},
    ),
    _worker(
        "plain: flushed, nobody knows",
        _WRITTEN,
        jobs=("plain",),
        effects=0,
        at=after("jobq.outbox.settle:complete"),
        then=SETTLED,
        runs={"plain": (NEW,)},
    ),
    _worker(
        "plain: flushed, not acked",
        _WRITTEN,
        jobs=("plain",),
        effects=0,
        at=before(_ACK),
        then=SETTLED,
        runs={"plain": (NEW,)},
    ),
    _worker(
        "failed, not rescheduled: the attempt is not counted",
        _BUFFERED,
        jobs=("retry",),
        at=before("jobq.outbox.settle:reschedule"),
        runs={"retry": (NEW, AGAIN, (3, 0, 1))},
    ),
    _worker(
        "rescheduled, not acked: the crash is not counted",
        _WRITTEN,
        jobs=("retry",),
        at=before(_ACK),
        then=Seen(rows=((2, 0, 1),), working=1, known=1),
        runs={"retry": (NEW, (2, 0, 1))},
    ),
    _worker(
        "on_dead: inside the hook",
        _HOOK,
        jobs=("reject",),
        effects=0,
        dead=1,
        at=before("tests.faults.crash_app:inside_hook"),
        runs={"reject": (NEW, AGAIN)},
    ),
    _worker(
        "buried, not acked",
        _WRITTEN,
        jobs=("reject",),
        effects=0,
        dead=1,
        at=before(_ACK),
        then=SETTLED._replace(dead=1, alerts=1),
        runs={"reject": (NEW,)},
    ),
    # --- a worker that was told to stop ------------------------------------------------------------------------------
    _stopping(
        "stopping: released what had not started",
        _MOVED,
        jobs=("wait", "book"),
        crashes={"book": 2},  # so it waits to run alone
        at=after("jobq.broker.scripts:Broker.release"),
        then=Seen(rows=(NEW, (1, 2, 0)), ready=1, working=1, known=2),
        runs={"wait": (NEW, AGAIN), "book": ((1, 2, 0),)},
    ),
    _stopping(
        "stopping: handed back what ran, not acked",
        _WRITTEN,
        options=("--grace", "0"),
        at=before(_ACK),
        then=Seen(rows=((2, 0, 0),), working=1, known=1),
        runs={"wait": (NEW, (2, 0, 0))},
    ),
    _stopping(
        "stopping: all is flushed, and its lease still kept",
        _STILL_BEATING,
        options=("--grace", "0"),
        at=before("jobq.worker.heartbeat:Heartbeat.stop"),
        then=Seen(rows=((2, 0, 0),)),
        runs={"wait": (NEW, (2, 0, 0))},
    ),
    _stopping(
        "stopping: not deregistered",
        _DRAINED,
        options=("--grace", "0"),
        at=before("jobq.worker.shutdown:Shutdown._deregister"),
        then=Seen(rows=((2, 0, 0),)),
        runs={"wait": (NEW, (2, 0, 0))},
    ),
    # --- a worker that sweeps a dead one -----------------------------------------------------------------------------
    _sweeper(
        "the working list is read", _LIST_READ, at=before("jobq.worker.sweeper:Sweeper._count_crashes"), then=HELD
    ),
    _sweeper("the dead one's sessions are ended", _LIST_READ, at=before("jobq.outbox.settle:crash"), then=HELD),
    _sweeper("counted, not swept", _NOT_SWEPT, at=before(_SWEEP, _of_the_dead), then=HELD._replace(rows=(AGAIN,))),
    _sweeper(
        "swept, the reply is lost",
        _SWEPT,
        at=after(_SWEEP, _of_the_dead),
        loss=_reply_of("sweep"),
        then=Seen(rows=(AGAIN,), ready=1, known=1),
    ),
    _sweeper(
        "the third crash is counted, its job not buried",
        _COUNTED,
        crashes={"book": 2},
        at=before("tests.faults.crash_app:inside_hook"),
        then=HELD._replace(rows=((2, 3, 0),)),
        runs={},
        effects=0,
        dead=1,
    ),
    _sweeper(
        "buried as poison, not swept",
        _NOT_SWEPT,
        crashes={"book": 2},
        at=before(_SWEEP, _of_the_dead),
        then=SETTLED._replace(dead=1, alerts=1),
        runs={},
        effects=0,
        dead=1,
    ),
)


JANITOR = "janitor: in the middle of its deletes"
IN_FIRST_REVISION = "migrate: inside the first revision"
IN_SECOND_REVISION = "migrate: inside the second revision"
BOTH_SWEEP = "two sweepers have read one working list"
NOT_RENAMED = "embedded: initdb is done, its directory has not its name yet"
HALF_DELETED = "embedded: all but the lock is deleted"
_MARK = "alembic.runtime.migration:HeadMaintainer.update_to_step"

POINTS: dict[str, Point] = {window.name: window.at for window in WINDOWS} | {
    JANITOR: before("jobq.outbox.follow:_ask", lambda call: call[0][0] is follow._tidy_dead),
    IN_FIRST_REVISION: before(_MARK),
    IN_SECOND_REVISION: before(_MARK, nth=2),
    BOTH_SWEEP: before("jobq.worker.sweeper:Sweeper._count_crashes", nth=None),
    NOT_RENAMED: before("pathlib:Path.rename", lambda call: call[0][0].name == "postgres.new"),
    HALF_DELETED: before("shutil:rmtree", lambda call: call[0][0].name.startswith("jobq-")),
}
"""By name: those of the table, and those with a test of their own."""
_SETTINGS: dict[str, Mapping[str, Any]] = {window.name: window.settings for window in WINDOWS} | {
    JANITOR: {"tidy_every": 0.05}
}


@contextmanager
def settings_of(name: str) -> Iterator[None]:
    """In a process of `jobq relay`: the settings of a window that no option gives."""
    from jobq.cli import run

    run.RelaySettings = partial(run.RelaySettings, **_SETTINGS.get(name, {}))  # type: ignore[misc]
    yield
