"""Frozen values that pass between the parts of jobq. No I/O, no rules beyond their own form.

Invariant: an `Entry` that exists is well formed; what Redis holds beside that parses to None.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple
from uuid import UUID

from asyncpg.pgproto import pgproto

if sys.version_info >= (3, 14):
    from uuid import uuid7 as new_job_id
else:
    from uuid_utils.compat import uuid7 as new_job_id

__all__ = ["PRIORITIES", "DeadJob", "Enqueued", "Entry", "Intent", "Job", "described", "new_job_id"]

PRIORITIES = (1, 2, 3, 4)
"""1 is fetched first; 2 is the default."""

_LARGEST_GENERATION = 2**31 - 1
_ID_LENGTH = 32
_KNOWN_LENGTH = 16
"""Longest end of an entry that is remembered; all that jobq writes are shorter."""
_BEHIND_ID = re.compile(rb":([1-9][0-9]{0,9}):([1-4])(?::.*)?", re.DOTALL)


class Entry(NamedTuple):
    """What Redis holds of a job: `id:generation:priority`.

    `raw` is the text as it stands in the list, which the scripts compare byte for byte; fields after the
    third are left to later releases and ignored here.
    """

    raw: bytes
    id: UUID
    generation: int
    priority: int

    @classmethod
    def of(cls, id: UUID, generation: int, priority: int) -> Entry:  # noqa: A002
        return cls(b"%s:%d:%d" % (id.hex.encode(), generation, priority), id, generation, priority)

    @classmethod
    def parse(cls, raw: bytes) -> Entry | None:
        """Read an entry, or None for bytes that are none: anyone may have written to Redis."""
        end = raw[_ID_LENGTH:]
        behind_id = _behind_id(end) if len(end) <= _KNOWN_LENGTH else _read_behind_id(end)
        text = raw[:_ID_LENGTH].decode("ascii", "replace")
        if behind_id is None or text != text.lower():
            return None
        try:
            # asyncpg's own kind of UUID, as rows have it: ten times as fast to make, to hash and to compare.
            return cls(raw, pgproto.UUID(text), *behind_id)
        except ValueError:
            return None

    @property
    def key(self) -> tuple[UUID, int]:
        """What a process owns a run by."""
        return (self.id, self.generation)


def _read_behind_id(text: bytes) -> tuple[int, int] | None:
    """Generation and priority."""
    found = _BEHIND_ID.fullmatch(text)
    if found is None or int(found[1]) > _LARGEST_GENERATION:
        return None
    return int(found[1]), int(found[2])


_behind_id = lru_cache(maxsize=1024)(_read_behind_id)
"""Most entries of a batch have the same end."""


class Job(NamedTuple):
    """A row of the outbox, as a worker reads it before the run. Field order is that of `read.sql`."""

    id: UUID
    generation: int
    queue: str
    task: str
    args: str  # JSON
    priority: int
    attempts: int
    crashes: int
    max_attempts: int | None
    timeout_s: float | None
    headers: str | None  # JSON


@dataclass(frozen=True, slots=True)
class DeadJob:
    """A job that needs a person, as `on_dead` hooks receive it."""

    id: UUID
    task: str
    queue: str
    args: str
    """The arguments as JSON text: they may be what was wrong."""
    attempts: int
    crashes: int
    reason: str
    """`exhausted`, `rejected`, `poison` or `invalid`."""
    error_type: str | None
    error: str | None


class Intent(NamedTuple):
    """One job to be enqueued: a call of a task, with its options settled and its arguments checked."""

    task: str
    queue: str
    args: str  # JSON
    priority: int = 2
    delay_s: float | None = None
    run_at: datetime | None = None
    max_attempts: int | None = None
    timeout_s: float | None = None
    idempotency_key: str | None = None
    idempotency_ttl_s: float = 86_400.0
    headers: str | None = None  # JSON
    former_names: tuple[str, ...] = ()
    """The task's aliases, under which its idempotency keys count too."""

    def __repr__(self) -> str:
        return described(
            self.task,
            self.args,
            queue=self.queue,
            priority=self.priority,
            delay=self.delay_s,
            run_at=self.run_at,
            max_attempts=self.max_attempts,
            timeout=self.timeout_s,
            idempotency_key=self.idempotency_key,
            headers=None if self.headers is None else json.loads(self.headers),
        )


def described(task: str, args: str, **options: object) -> str:
    """Write a job as the code that makes one: `mail.opts(priority=1).job(order_id=7)`. For people who test."""
    usual = {"queue": "default", "priority": 2}
    chosen = {name: value for name, value in options.items() if value is not None and usual.get(name) != value}
    opts = f".opts({_named(chosen)})" if chosen else ""
    return f"{task}{opts}.job({_named(json.loads(args))})"


def _named(values: dict[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


class Enqueued(NamedTuple):
    """The answer to an enqueue."""

    id: UUID
    created: bool
    """False when a job with the same idempotency key was there before; `id` is that job's."""
