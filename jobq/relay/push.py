"""Reliable push: entries reach Redis, or the relay knows that they may not have.

1. Each queue has a token in Redis, compared and replaced by every push: another token there means that Redis
   lost data, or that another relay pushes. A relay that does not know the token pushes nothing before it has met
   the queue, by an empty push that takes any token.
2. A push without an answer is sent again with the same two tokens, and so changes nothing if it had arrived.
3. A queue that refused a push is left alone until the relay is known to lead still.
4. What was not pushed is marked in the backlog; the walk brings it later.

Called by relay and walk. Calls broker and backlog.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from itertools import count
from uuid import UUID

from ..broker.client import TROUBLE, UNAVAILABLE, OutOfMemoryError
from ..broker.scripts import ADOPT_TOKEN, Broker, Pushed
from ..model import PRIORITIES
from ..outage import Outage
from ..settings import RelaySettings
from .backlog import Backlog

log = logging.getLogger(__name__)

_SENDS = 3
ALWAYS_WATCHED = "default"
"""A queue whose token is kept moving even before it has jobs: standbys watch it."""


class ReliablePush:
    """The relay's way into Redis."""

    def __init__(self, broker: Broker, backlog: Backlog, settings: RelaySettings):
        self._broker = broker
        self._backlog = backlog
        self._settings = settings
        self._epoch = secrets.token_hex(4)
        self._sequence = count(1)
        self._tokens = {ALWAYS_WATCHED: ADOPT_TOKEN}
        self._unanswered: dict[str, str] = {}
        self._refused: set[str] = set()
        self.outage = Outage("redis", "relay")

    @property
    def queues(self) -> list[str]:
        return list(self._tokens)

    @property
    def is_away(self) -> bool:
        """Whether Redis did not answer last time, and it is not yet time to try again."""
        return self.outage.is_waiting

    async def push(
        self,
        queue: str,
        priority: int,
        entries: Sequence[str],
        *,
        counter: str = "pushed",
        limit: int | None = None,
    ) -> int:
        """Push entries of one list in order, until the list holds `limit`. Returns how many of them were sent.

        What was not sent is marked in the backlog.
        """
        await self.meet(queue)
        limit = self._settings.ready_limit if limit is None else limit
        sent = 0
        while sent < len(entries):
            room = limit - self._backlog.length(queue, priority)
            chunk = entries[sent : sent + min(room, self._settings.push_limit)] if room > 0 else []
            if not chunk:
                self._backlog.mark_full(queue, priority)
                break
            if not await self._send(queue, chunk, counter):
                break
            sent += len(chunk)
        if sent < len(entries):
            self.leave(queue, priority, entries[sent:])
        return sent

    def leave(self, queue: str, priority: int, entries: Sequence[str]) -> None:
        """Leave entries to the walk, whatever their order."""
        self._backlog.mark(queue, priority, before=min(map(_id_of, entries)))

    async def meet(self, queue: str) -> None:
        """Touch a queue whose token is not known: from then on a loss is noticed, and the lengths are known."""
        if self._tokens.setdefault(queue, ADOPT_TOKEN) == ADOPT_TOKEN:
            await self.touch(queue)

    async def touch(self, queue: str) -> None:
        """Push nothing: finds a loss, learns the lengths, and rings for whoever slept through a bell."""
        await self._send(queue, [], "pushed")

    def confirm_leadership(self) -> None:
        """The leader's connection has answered, so its lock holds: who refused a push was no new leader."""
        self._refused.clear()

    async def announce(self) -> None:
        """Tell sweepers and `status` which queues there are, and mend what somebody else wrote into them."""
        try:
            await self._broker.announce(self._tokens)
            for queue in self._tokens:
                await self._broker.mend(queue)
        except OutOfMemoryError:
            pass  # a hint, and full Redis takes none
        except TROUBLE as error:
            self.outage.begin(error)

    def note_trouble(self, error: Exception) -> None:
        """Another call to Redis failed; leave Redis alone for a moment."""
        self.outage.begin(error)

    async def _send(self, queue: str, entries: Sequence[str], counter: str) -> bool:
        expected = self._tokens.setdefault(queue, ADOPT_TOKEN)
        if self.is_away or queue in self._refused or (entries and expected == ADOPT_TOKEN):
            return False
        token = self._unanswered.setdefault(queue, f"{self._epoch}:{next(self._sequence)}")
        try:
            answer = await self._send_repeatedly(queue, entries, expected, token, counter)
            if answer is None:
                await self._note_refusal(queue)
                return False
        except OutOfMemoryError:
            self._backlog.refuse(queue)
            return False
        except TROUBLE as error:
            self.outage.begin(error)
            return False
        self.outage.end()
        self._tokens[queue] = token
        del self._unanswered[queue]
        for priority, length in zip(PRIORITIES, answer.ready, strict=True):
            self._backlog.note_length(queue, priority, length)
        return True

    async def _send_repeatedly(
        self, queue: str, entries: Sequence[str], expected: str, token: str, counter: str
    ) -> Pushed | None:
        for attempt in range(1, _SENDS + 1):
            try:
                # Crash here: pushed again after the restart; push.lua drops the copy.
                return await self._broker.push(queue, entries, expected=expected, token=token, counter=counter)
            except UNAVAILABLE:
                if attempt == _SENDS:
                    raise
        raise AssertionError("unreachable")

    async def _note_refusal(self, queue: str) -> None:
        """Redis lost its data, or another relay pushes: take what is there later, and have the walk repair it."""
        log.warning("redis lost data, rebuilding", extra={"fields": {"queue": queue}})
        # Crash here: the next leader's walk looks everywhere, whether or not it hears of the loss.
        self._refused.add(queue)
        self._tokens[queue] = ADOPT_TOKEN
        self._unanswered.pop(queue, None)
        # Workers first say what they run, or it would all run twice.
        self._backlog.mark_lost(queue, hold_s=2 * self._settings.beat)
        await self._broker.count(queue, "losses")
        await self.announce()


def _id_of(entry: str) -> UUID:
    return UUID(hex=entry.partition(":")[0])
