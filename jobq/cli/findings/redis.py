"""What `doctor` finds in Redis or Valkey itself. Called by examine. Calls broker.inspect."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from ...broker import inspect
from ...broker.inspect import ServerState
from ...outbox.inspect import skew_of
from . import LEVELS, Finding, looked
from .postgresql import clock_finding

if TYPE_CHECKING:
    from ...broker.client import AsyncClient

_OLDEST = {"redis": (7, 0), "valkey": (7, 2)}
_NEARLY_FULL = 0.9


def version(state: ServerState) -> Finding:
    found = f"{state.server.capitalize()} {state.version}"
    if tuple(int(part) for part in state.version.split(".") if part.isdigit()) < _OLDEST[state.server]:
        return Finding("fail", "redis", found, "jobq needs Redis 7.0 or Valkey 7.2, or later")
    return Finding("ok", "redis", found)


def replica(state: ServerState) -> Finding:
    if state.is_replica:
        return Finding("fail", "replica", "the URL leads to a replica, which takes no writes", "name the primary")
    return Finding("ok", "replica", "it is none, and takes writes")


def eviction(state: ServerState) -> Finding:
    policy = state.policy
    if policy == "noeviction":
        return Finding("ok", "eviction", "maxmemory-policy is noeviction")
    if state.maxmemory:
        return Finding(
            "fail",
            "eviction",
            f"maxmemory-policy is {policy}: whole queues vanish when memory is full, and are rebuilt again and again",
            "CONFIG SET maxmemory-policy noeviction, and in the server's configuration",
        )
    return Finding(
        "warn",
        "eviction",
        f"maxmemory-policy is {policy}, without a limit to begin at",
        "set noeviction before somebody sets maxmemory",
    )


def memory(state: ServerState) -> Finding:
    used = f"{state.used_memory / 1024**2:.0f} MiB"
    if not state.maxmemory:
        return Finding("ok", "memory", f"{used} used, without a limit")
    found = f"{used} of {state.maxmemory / 1024**2:.0f} MiB used"
    if state.used_memory > _NEARLY_FULL * state.maxmemory:
        return Finding(
            "warn",
            "memory",
            f"{found}: when it is full, new entries wait in PostgreSQL and workers go on draining",
            "raise maxmemory, or start more workers; see what else lies in it",
        )
    return Finding("ok", "memory", found)


def persistence(state: ServerState) -> Finding:
    if state.has_failed_to_write:
        return Finding(
            "fail",
            "persistence",
            "its last write to disk failed, and by default it then refuses writes",
            "see its log and its disk; CONFIG SET save '' does without snapshots",
        )
    if state.has_aof:
        return Finding("ok", "persistence", "append-only file")
    return Finding(
        "note",
        "persistence",
        "no append-only file: nothing is lost by a restart, but jobs wait until the relay has rebuilt the queues",
        "appendonly yes, where a big backlog is usual and the wait matters",
    )


async def clocks(client: AsyncClient) -> Iterable[Finding]:
    skew = skew_of(*await inspect.clock(client))
    return [clock_finding("Redis", skew, "nothing rests on it; its log is hard to read beside others")]


_LOOKS: tuple[Callable[[ServerState], Finding], ...] = (version, replica, eviction, memory, persistence)


async def redis(client: AsyncClient) -> list[Finding]:
    """Take every look."""
    findings = await looked("redis", _states(client), needs="ACL SETUSER of the URL's user: +info")
    return findings + await looked("clocks", clocks(client), needs="ACL SETUSER of the URL's user: +time")


async def _states(client: AsyncClient) -> Iterable[Finding]:
    states = await inspect.servers(client)
    return [_worst(look, states) for look in _LOOKS]


def _worst(look: Callable[[ServerState], Finding], states: dict[str, ServerState]) -> Finding:
    """What is found of one server, or of several the one that needs a person most."""
    findings = {name: look(state) for name, state in states.items()}
    name = max(findings, key=lambda name: LEVELS.index(findings[name].level))
    finding = findings[name]
    is_told = name and (finding.about == "redis" or finding.level != "ok")
    return replace(finding, found=f"{finding.found} ({name})") if is_told else finding
