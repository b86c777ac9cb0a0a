"""What `doctor` finds in PostgreSQL. Called by examine. Calls outbox.inspect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

from ...outbox import inspect
from ...outbox.inspect import Skew
from ..tables import duration
from . import About, Finding, Scene, looked
from .transactions import locks, prepared, slots, snapshots, wake_up

_OLDEST = 140_000
_FEW_CONNECTIONS = 5
_SKEW_S = 1.0


async def pooler(scene: Scene) -> Iterable[Finding]:
    mode = await inspect.pooling(scene.connection, scene.stores.database)
    if mode == "direct":
        return [Finding("ok", "pooler", "none stands between")]
    if mode == "session":
        return [Finding("ok", "pooler", "one stands between, in session mode, which keeps sessions")]
    found = "one stands between, in transaction mode: a relay polls there, and migrations refuse to run"
    remedy = "give migrations a URL that leads to PostgreSQL itself, and relays too if their polling is too much"
    return [Finding("note", "pooler", found, remedy)]


async def server(scene: Scene) -> Iterable[Finding]:
    server = await inspect.server(scene.connection, scene.schema)
    found = f"PostgreSQL {server.version}"
    if server.version_number < _OLDEST:
        return [Finding("fail", "postgresql", found, "jobq needs 14 or later")]
    if not server.has_fsync:
        remedy = "turn it on: a power cut loses what was committed"
        return [Finding("warn", "postgresql", f"{found}, fsync is off", remedy)]
    return [Finding("ok", "postgresql", found)]


async def tables(scene: Scene) -> Iterable[Finding]:
    # The connection that is looked through was refused if they did not fit.
    return [Finding("ok", "tables", f"those of this release, in schema {scene.schema}")]


async def primary(scene: Scene) -> Iterable[Finding]:
    # Again: behind a balancer the next connection may lead elsewhere, and is refused then.
    async with scene.stores.postgresql("doctor"):
        return [Finding("ok", "primary", "two connections lead to the primary of one database")]


async def sessions(scene: Scene) -> Iterable[Finding]:
    if scene.stores.app is None:
        return []
    if await inspect.commits_by_itself(scene.stores.database):
        return [
            Finding(
                "fail",
                "sessions",
                "the engine's isolation level is AUTOCOMMIT, so enqueue() raises NotInTransaction",
                "give JobQ an engine that opens transactions",
            )
        ]
    return [Finding("ok", "sessions", "they open transactions")]


async def pool(scene: Scene) -> Iterable[Finding]:
    if scene.stores.app is None:
        return []
    limit, concurrency = scene.stores.database.pool_limit, scene.concurrency
    if scene.stores.database.is_own:
        return [Finding("ok", "pool", f"{limit}, made from the URL: jobs take turns at ctx.complete()")]
    if limit is None or limit >= concurrency:
        return [Finding("ok", "pool", f"{'no limit' if limit is None else limit}, for {concurrency} slots")]
    return [
        Finding(
            "warn",
            "pool",
            f"{limit} connections for {concurrency} slots: jobs may wait for one at ctx.complete()",
            "raise pool_size and max_overflow of the engine, or start workers with a lower --concurrency",
        )
    ]


async def connections(scene: Scene) -> Iterable[Finding]:
    limits = await inspect.connection_limits(scene.connection, scene.schema)
    tightest = min(limits, key=lambda limit: limit.allowed - limit.used)
    free = max(tightest.allowed - tightest.used, 0)
    found = f"{free} of {tightest.allowed} are free, by {tightest.which}"
    if free < _FEW_CONNECTIONS:
        return [Finding("warn", "connections", found, "raise it, or make the pools of the applications smaller")]
    return [Finding("ok", "connections", found)]


async def vacuum(scene: Scene) -> Iterable[Finding]:
    found = await inspect.vacuums(scene.connection, scene.schema)
    if not found.runs:
        return [
            Finding("fail", "vacuum", "autovacuum or track_counts is off, so the outbox grows for ever", "turn it on")
        ]
    if found.is_left_out:
        remedy = f"ALTER TABLE {scene.schema}.outbox RESET (autovacuum_enabled)"
        return [Finding("fail", "vacuum", "the outbox is left out of autovacuum, so it grows for ever", remedy)]
    return [Finding("ok", "vacuum", "autovacuum looks after the outbox")]


async def logging(scene: Scene) -> Iterable[Finding]:
    names = await inspect.logged(scene.connection, scene.schema)
    if not names:
        return [Finding("ok", "logging", "arguments of jobs are not written to the server's log")]
    found = f"arguments of jobs are written to the server's log, by {' and '.join(names)}"
    return [Finding("note", "logging", found, "log_parameter_max_length = 0 and log_parameter_max_length_on_error = 0")]


async def clocks(scene: Scene) -> Iterable[Finding]:
    skew = await inspect.skew(scene.connection, scene.schema)
    return [clock_finding("PostgreSQL", skew, "run_at is judged by it, while applications compute it by their own")]


def clock_finding(whose: str, skew: Skew, consequence: str) -> Finding:
    """Compare with this host's clock, in favour of the clocks when the answer took long."""
    ahead_s = abs(skew.ahead_s)
    if ahead_s - skew.uncertain_s <= _SKEW_S:
        return Finding("ok", "clocks", f"{whose}'s and this host's agree within {max(ahead_s, skew.uncertain_s):.3f} s")
    found = (
        f"{whose}'s is {duration(ahead_s)} {'ahead of' if skew.ahead_s > 0 else 'behind'} this host's: {consequence}"
    )
    return Finding("warn", "clocks", found, "run NTP on both (timedatectl, chronyc tracking)")


class _Look(NamedTuple):
    about: About
    take: Callable[[Scene], Awaitable[Iterable[Finding]]]


_LOOKS = (
    _Look("postgresql", server),
    _Look("pooler", pooler),
    _Look("tables", tables),
    _Look("primary", primary),
    _Look("sessions", sessions),
    _Look("pool", pool),
    _Look("connections", connections),
    _Look("clocks", clocks),
    _Look("snapshots", snapshots),
    _Look("prepared", prepared),
    _Look("slots", slots),
    _Look("locks", locks),
    _Look("wake-up", wake_up),
    _Look("vacuum", vacuum),
    _Look("logging", logging),
)


async def postgresql(scene: Scene) -> list[Finding]:
    """Take every look."""
    needs = f"GRANT pg_monitor TO {await scene.role()}"
    findings: list[Finding] = []
    for look in _LOOKS:
        findings += await looked(look.about, look.take(scene), needs=needs)
    return findings


def grants(schema: str) -> str:
    """What a role needs to see how jobs stand."""
    tables = ", ".join(f"{schema}.{table}" for table in ("outbox", "dead", "meta", "alembic_version"))
    return f"use the workers' role, or GRANT USAGE ON SCHEMA {schema} and SELECT ON {tables}"
