"""Every key name jobq uses in Redis, in one place.

Invariant: all keys of a queue share one hash tag, so a script touches one slot of a cluster. Called by scripts,
client and the commands that list. Calls nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from uuid import UUID

PROTOCOL = 1
"""A change of layout or meaning is a new number, rebuilt from PostgreSQL."""


def prefix(database_id: UUID) -> str:
    """What every key of one jobq schema begins with."""
    return f"jobq:{PROTOCOL}:{database_id.hex[:8]}:"


def queue_names(database_id: UUID) -> str:
    """(SET) queues anybody has used: a hint for sweepers and `status`; rows and the walk are the truth."""
    return f"{prefix(database_id)}queues"


@dataclass(frozen=True)
class Keys:
    """The keys of one queue."""

    database_id: UUID
    queue: str

    @cached_property
    def base(self) -> str:
        return f"{prefix(self.database_id)}{{{self.queue}}}:"

    @cached_property
    def relay(self) -> str:
        """(STRING) the token of the last push"""
        return f"{self.base}relay"

    @cached_property
    def known(self) -> str:
        """(HASH) id -> generation"""
        return f"{self.base}known"

    @cached_property
    def ready(self) -> tuple[str, str, str, str]:
        """(LIST) entries of priority 1 to 4"""
        return (f"{self.base}ready:1", f"{self.base}ready:2", f"{self.base}ready:3", f"{self.base}ready:4")

    @cached_property
    def beats(self) -> str:
        """(HASH) worker -> counter"""
        return f"{self.base}beats"

    @cached_property
    def workers(self) -> str:
        """(HASH) worker -> JSON for people"""
        return f"{self.base}workers"

    @cached_property
    def bell(self) -> str:
        """(LIST) doorbell; carries nothing"""
        return f"{self.base}bell"

    @cached_property
    def stats(self) -> str:
        """(HASH) counters"""
        return f"{self.base}stats"

    def working(self, worker: str) -> str:
        """(LIST) the entries one worker has fetched"""
        return f"{self.base}working:{worker}"

    def parked(self, task: str) -> str:
        """(LIST) entries that wait for a worker which knows the task"""
        return f"{self.base}parked:{task}"
