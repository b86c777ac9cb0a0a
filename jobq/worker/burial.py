"""The undertaker: moves jobs to the dead, with the application's hooks in the same transaction.

Called by settler and sweeper. Calls outbox.settle and the hooks of the application.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from uuid import UUID

import asyncpg

from ..app import JobQ
from ..outbox import settle
from ..outbox.settle import Burial

log = logging.getLogger(__name__)


class Undertaker:
    """Buries jobs of one application."""

    def __init__(self, app: JobQ):
        self._app = app

    async def bury(self, connection: asyncpg.Connection, ends: Sequence[Burial]) -> set[UUID]:
        """Move jobs to the dead; returns those that went. A hook that raises does not keep its job alive."""
        if not self._app.dead_hooks:
            return {dead.id for dead in await settle.bury(connection, self._app.schema, ends)}
        buried: set[UUID] = set()
        for end in ends:
            try:
                buried |= await self._bury_with_hooks(end)
            except Exception:
                log.exception("on_dead failed, burying without it", extra={"fields": {"job": str(end.id)}})
                buried |= {dead.id for dead in await settle.bury(connection, self._app.schema, [end])}
        return buried

    async def _bury_with_hooks(self, end: Burial) -> set[UUID]:
        async with self._app.database.sessions.begin() as session:
            found = await settle.bury(session, self._app.schema, [end])
            for dead in found:
                for hook in self._app.dead_hooks:
                    await hook(session, dead)
        return {dead.id for dead in found}
