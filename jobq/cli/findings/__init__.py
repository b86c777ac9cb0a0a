"""What `doctor` finds, one finding a line: what each is about, and how one look becomes a finding whatever happens.

Invariant: it changes nothing, and what cannot be looked at fails one line and not the others.
Called by doctor. The modules here call outbox.inspect, broker.inspect and report.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..failures import sqlstate
from ..stores import Stores

if TYPE_CHECKING:
    import asyncpg

Level = Literal["ok", "note", "warn", "fail"]
"""As it should be; worth knowing; to be mended; jobq cannot serve, or not for long."""
LEVELS: tuple[Level, ...] = get_args(Level)

About = Literal[
    "versions",
    "zones",
    "tasks",
    "postgresql",
    "pooler",
    "tables",
    "primary",
    "sessions",
    "pool",
    "connections",
    "snapshots",
    "prepared",
    "slots",
    "locks",
    "wake-up",
    "vacuum",
    "logging",
    "clocks",
    "redis",
    "replica",
    "eviction",
    "memory",
    "persistence",
    "relay",
    "workers",
    "worker",
    "queue",
    "task",
    "parked",
    "oldest",
    "dead",
]
"""Each has a heading in docs/doctor.md."""

_LOOK_S = 10.0
_NO_PRIVILEGE = "42501"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: how it is, and what to do about it."""

    level: Level
    about: About
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    """Where to look in PostgreSQL, and with what in mind."""

    stores: Stores
    connection: asyncpg.Connection
    concurrency: int

    @property
    def schema(self) -> str:
        return self.stores.schema

    async def role(self) -> str:
        """The role that looks, as SQL writes it."""
        return str(await self.connection.fetchval("SELECT quote_ident(current_user)"))


async def looked(
    about: About, look: Awaitable[Iterable[Finding]], *, needs: str, longest_s: float = _LOOK_S
) -> list[Finding]:
    """Take one look. One that is refused, or takes too long, is a finding; `needs` is what would allow it."""
    deadline = asyncio.timeout(longest_s)
    try:
        async with deadline:
            return list(await look)
    except Exception as error:
        if is_refused(error):
            return [refused(about, error, needs)]
        if deadline.expired():
            remedy = "see `locks`; if it has nothing to say, ask again when the server is less busy"
            return [Finding("warn", about, f"no answer within {longest_s:.0f} s", remedy)]
        raise


def is_refused(error: BaseException) -> bool:
    """Whether a privilege is missing, in either store."""
    return sqlstate(error) == _NO_PRIVILEGE or type(error).__name__ == "NoPermissionError"


def refused(about: About, error: BaseException, needs: str) -> Finding:
    """Say what could not be looked at, and what would allow it."""
    return Finding("warn", about, f"cannot be looked at: {str(error).splitlines()[0]}", f"if it is to be: {needs}")
