"""Wake-up: lets the leader sleep without missing a commit, and lets writers go without NOTIFY while it is awake.

Writers share a lock, K, until their commit is visible (the trigger of revision jobq_0002); one that cannot get its
share sends a notification with its commit instead. The leader sleeps only while it holds K alone:

1. `fall_asleep` tries for K. Refused: somebody has written and not yet committed, so go on polling.
2. Poll once more, in a later statement: it sees all that was committed before K was had (MUST).
3. Wait for `woken`: whoever writes from then on notifies.

Invariant: `woken` is cleared before a poll, never after it. Called by relay. Calls outbox.follow.
"""

from __future__ import annotations

import asyncio
import logging

import asyncpg

from ..outbox import follow
from ..settings import RelaySettings

log = logging.getLogger(__name__)


class WakeUp:
    """Whether the leader sleeps, and what wakes it. Where it cannot hear notifications it never sleeps."""

    def __init__(self, connection: asyncpg.Connection, schema: str, *, can_hear: bool):
        self._connection = connection
        self._schema = schema
        self._can_hear = can_hear
        self.woken = asyncio.Event()
        self.is_asleep = False

    @classmethod
    async def open(cls, connection: asyncpg.Connection, schema: str, settings: RelaySettings) -> WakeUp:
        """Begin to listen, if that is wanted and can be done."""
        can_hear = settings.wake_up == "notify"
        if can_hear and connection.is_in_transaction():
            log.warning("a pooler in transaction mode passes no notifications on, polling")
            can_hear = False
        wake_up = cls(connection, schema, can_hear=can_hear)
        if can_hear:
            await follow.listen(connection, schema, wake_up.woken.set)
        return wake_up

    async def fall_asleep(self) -> bool:
        """Try to take K. True: poll once more, and then sleep until `woken`."""
        self.is_asleep = self._can_hear and await follow.try_sleep(self._connection, self._schema)
        # Crash here, or asleep: the locks end with the session, and the next leader's walk finds what has come.
        return self.is_asleep

    async def get_up(self) -> None:
        """Give K back: writers need not notify while there is work."""
        if self.is_asleep:
            await follow.end_sleep(self._connection, self._schema)
            self.is_asleep = False
