"""What `doctor` looks at, one finding a line.

Invariant: it changes nothing, and what cannot be looked at fails one line and not the others.
Called by doctor. Calls report, outbox.browse, broker.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Literal

import anyio
import click

from .. import __version__
from ..broker import inspect
from ..broker.client import UNAVAILABLE, check_server
from ..broker.scripts import Broker
from ..errors import ConfigurationError, JobqError
from ..outbox import browse
from ..outbox.browse import Server, SnapshotHolder
from .failures import POSTGRESQL, REDIS, ExitCode, explain
from .report import Report, gather
from .stores import Stores
from .tables import cell, duration

if TYPE_CHECKING:
    import asyncpg

    from ..app import JobQ
    from ..broker.client import AsyncClient

_LIBRARIES = ("sqlalchemy", "asyncpg", "redis", "hiredis", "anyio", "pydantic", "alembic", "click", "uvloop")
_OLDEST_POSTGRESQL = 140_000
_OLDEST_REDIS = {"redis": (7, 0), "valkey": (7, 2)}
_LATE_AFTER_S = 60.0
_HELD_TOO_LONG_S = 300.0
_BEATS_WATCHED_S = 5.0
_BEATS_LOOK_S = 0.25
_EXPECTED: tuple[type[Exception], ...] = (*UNAVAILABLE, JobqError)
"""What a store that is away or set up wrongly raises."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: how it is, and what to do about it."""

    level: Literal["ok", "warn", "fail"]
    about: str
    found: str
    remedy: str = ""


async def examine(stores: Stores, concurrency: int) -> list[Finding]:
    """Look at everything."""
    findings = [_versions()]
    if stores.app is not None:
        findings += _application(stores.app)
    try:
        async with stores.postgresql("doctor") as connection:
            findings += await _postgresql(stores, connection, concurrency)
            findings += await _redis_and_work(stores, connection)
    except Exception as error:
        if not isinstance(error, ConfigurationError) and explain(error, {}).exit_code != ExitCode.UNREACHABLE:
            raise
        findings.append(_failure("postgresql", error))
        findings += await _redis_alone(stores)
    return findings


def _versions() -> Finding:
    libraries = [f"{name} {version}" for name in _LIBRARIES if (version := _version_of(name)) is not None]
    return Finding("ok", "versions", f"jobq {__version__}, python {platform.python_version()}, {', '.join(libraries)}")


def _version_of(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _application(app: JobQ) -> Iterator[Finding]:
    try:
        app.check()
    except ConfigurationError as error:
        yield Finding("fail", "tasks", str(error), "no worker starts with it")
        return
    if not app.tasks:
        yield Finding("fail", "tasks", "the application has none", "import the modules that define them beside it")
        return
    queues = sorted({task.queue for task in app.tasks.values()})
    yield Finding("ok", "tasks", f"{len(app.tasks)} in {', '.join(queues)}")


async def _postgresql(stores: Stores, connection: asyncpg.Connection, concurrency: int) -> list[Finding]:
    server = await browse.server(connection, stores.schema)
    findings = [_server(server), Finding("ok", "tables", f"those of this release, in schema {stores.schema}")]
    # Again: behind a balancer the next connection may lead elsewhere, and is refused then.
    async with stores.postgresql("doctor"):
        findings.append(Finding("ok", "primary", "two connections lead to the primary of one database"))
    if stores.app is not None:
        findings.append(await _sessions(stores))
        findings.append(_pool(stores.database.pool_limit, concurrency))
    holders = await browse.snapshot_holders(connection, stores.schema, longer_than_s=_HELD_TOO_LONG_S)
    findings += _snapshots(holders)
    return findings


def _server(server: Server) -> Finding:
    found = f"PostgreSQL {server.version}"
    if server.version_number < _OLDEST_POSTGRESQL:
        return Finding("fail", "postgresql", found, "jobq needs 14 or later")
    if not server.has_fsync:
        return Finding(
            "warn", "postgresql", f"{found}, fsync is off", "turn it on: a power cut loses what was committed"
        )
    return Finding("ok", "postgresql", found)


async def _sessions(stores: Stores) -> Finding:
    if await browse.commits_by_itself(stores.database):
        return Finding(
            "fail",
            "sessions",
            "the engine's isolation level is AUTOCOMMIT, so enqueue() raises NotInTransaction",
            "give JobQ an engine that opens transactions",
        )
    return Finding("ok", "sessions", "they open transactions")


def _pool(limit: int | None, concurrency: int) -> Finding:
    if limit is None or limit >= concurrency:
        return Finding("ok", "pool", f"{'no limit' if limit is None else limit}, for {concurrency} slots")
    return Finding(
        "warn",
        "pool",
        f"{limit} connections for {concurrency} slots: jobs may wait for one at ctx.complete()",
        "raise pool_size and max_overflow of the engine, or start workers with a lower --concurrency",
    )


def _snapshots(holders: Sequence[SnapshotHolder]) -> Iterator[Finding]:
    remedies = {
        "session": "end it: pg_terminate_backend(its first number), or set idle_in_transaction_session_timeout",
        "prepared": "COMMIT PREPARED or ROLLBACK PREPARED it",
        "slot": "reconnect its standby, or pg_drop_replication_slot() it",
    }
    for holder in holders:
        since = "" if holder.held_s is None else f" for {duration(holder.held_s)}"
        found = f"vacuum is held up{since} by {holder.kind} {cell(holder.name)}"
        yield Finding("warn", "snapshots", found, remedies[holder.kind])
    if not holders:
        yield Finding("ok", "snapshots", f"none is held for longer than {duration(_HELD_TOO_LONG_S)}")


async def _redis_alone(stores: Stores) -> list[Finding]:
    """What can be said of Redis without knowing which database its keys are of."""
    try:
        async with stores.redis() as client:
            return await _redis(client)
    except _EXPECTED as error:
        return [_failure("redis", error)]


async def _redis_and_work(stores: Stores, connection: asyncpg.Connection) -> list[Finding]:
    try:
        async with stores.redis() as client:
            findings = await _redis(client)
            report = await gather(stores, connection, client)
            if report.redis_error is not None:
                raise report.redis_error
            living = await _living(stores, connection, client, report)
            return [*findings, *_work(report, living)]
    except _EXPECTED as error:
        return [_failure("redis", error)]


async def _redis(client: AsyncClient) -> list[Finding]:
    server = await check_server(client)
    found = f"{server['server'].capitalize()} {server['version']}"
    policy, limit = server["maxmemory_policy"], server["maxmemory"]
    if _numbers(server["version"]) < _OLDEST_REDIS[server["server"]]:
        version = Finding("fail", "redis", found, "jobq needs Redis 7.0 or Valkey 7.2, or later")
    else:
        version = Finding("ok", "redis", found)
    if policy == "noeviction":
        eviction = Finding("ok", "eviction", "maxmemory-policy is noeviction")
    elif limit:
        eviction = Finding(
            "fail",
            "eviction",
            f"maxmemory-policy is {policy}: whole queues vanish when memory is full, and are rebuilt again and again",
            "CONFIG SET maxmemory-policy noeviction, and in the server's configuration",
        )
    else:
        eviction = Finding(
            "warn",
            "eviction",
            f"maxmemory-policy is {policy}, without a limit to begin at",
            "set noeviction before somebody sets maxmemory",
        )
    kept = "append-only file" if server["aof_enabled"] else "no append-only file: after a restart the relay rebuilds it"
    return [version, eviction, Finding("ok", "persistence", kept)]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


async def _living(
    stores: Stores, connection: asyncpg.Connection, client: AsyncClient, report: Report
) -> set[tuple[str, str]]:
    """Watch the counters of registered workers for a while; returns (queue, worker) of those that moved."""
    broker = Broker(client, await stores.database.database_id(connection, stores.schema))
    queues = sorted({queue for worker in report.workers for queue in worker.queues})
    first = await inspect.counters(broker, queues)
    living: set[tuple[str, str]] = set()
    with anyio.move_on_after(_BEATS_WATCHED_S):
        while len(living) < len(first):
            await anyio.sleep(_BEATS_LOOK_S)
            now = await inspect.counters(broker, queues)
            living |= {place for place, counter in first.items() if now.get(place, counter) != counter}
    return living


def _work(report: Report, living: set[tuple[str, str]]) -> Iterator[Finding]:
    yield _relay(report)
    yield from _workers(report, living)
    served = {queue for queue, _ in living}
    for queue in report.queues:
        name = cell(queue.queue)
        if queue.queue not in served and queue.waiting + queue.scheduled + queue.retrying:
            level: Literal["warn", "fail"] = "fail" if queue.waiting else "warn"
            rows = f"{queue.waiting} waiting, {queue.scheduled + queue.retrying} later"
            yield Finding(level, "queue", f"no live worker serves {name} ({rows})", f"jobq worker APP -q {name}")
    yield _oldest(report)
    for parked in report.parked:
        found = f"{parked.jobs} jobs of task {cell(parked.task)} are parked in {cell(parked.queue)}"
        if any((parked.queue, name) in living for name in parked.offered_by):
            yield Finding("ok", "parked", f"{found}; a live worker offers it, and will call them back")
            continue
        remedy = "start a worker that does, or give a renamed task this name as an alias"
        yield Finding("warn", "parked", f"{found}: no live worker offers it", remedy)
    if report.total.dead:
        yield Finding("warn", "dead", f"{report.total.dead} jobs need a person", "jobq dead list")


def _relay(report: Report) -> Finding:
    if report.leader is not None:
        return Finding("ok", "relay", f"one leads, connected for {duration(report.leader.connected_s)}")
    is_missed = report.total.waiting > 0
    return Finding("fail" if is_missed else "warn", "relay", "none leads, so nothing reaches Redis", "jobq relay")


def _workers(report: Report, living: set[tuple[str, str]]) -> Iterator[Finding]:
    alive = [worker for worker in report.workers if any((queue, worker.name) in living for queue in worker.queues)]
    for worker in report.workers:
        if worker not in alive:
            where = f"{cell(worker.name)} ({cell(worker.host)}, pid {worker.pid})"
            found = f"{where} does not beat and holds {worker.running} jobs"
            yield Finding("warn", "worker", found, "another worker takes them back after its lease: let one run")
    if alive:
        slots = sum(worker.slots for worker in alive)
        yield Finding("ok", "workers", f"{len(alive)} live, with {slots} slots and {report.total.running} jobs")
    else:
        yield Finding("warn", "workers", "none live", "jobq worker APP")


def _oldest(report: Report) -> Finding:
    age = report.total.oldest_waiting_s
    if age is None:
        return Finding("ok", "oldest", "nothing waits")
    found = f"the oldest job that waits has been due for {duration(age)}"
    if age > _LATE_AFTER_S:
        return Finding("warn", "oldest", found, "more workers or slots, unless something above explains it")
    return Finding("ok", "oldest", found)


def _failure(about: str, error: Exception) -> Finding:
    meta = click.get_current_context().meta
    store = {"postgresql": POSTGRESQL, "redis": REDIS}[about]
    sentence = explain(error, {store: meta[store]} if store in meta else {}).message
    found, _, remedy = sentence.partition("; ")
    return Finding("fail", about, found, remedy)
