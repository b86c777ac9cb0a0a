"""The undertaker: moves jobs to the dead, with the application's hooks in the same transaction.

Invariant: what a hook writes is committed with the burial of its job, once. A hook that fails, or spoils the
transaction, does not keep its job alive; a database that is away does not cost the hook its part. Called by settler
and sweeper. Calls outbox.settle and the hooks of the application.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from ..app import JobQ
from ..model import DeadJob
from ..outbox import settle
from ..outbox.database import hide_values, is_unavailable
from ..outbox.patience import Patience
from ..outbox.settle import Burial
from ..outbox.statement import Transaction

log = logging.getLogger(__name__)

HOOKS_TIMEOUT_S = 10.0
"""For all hooks of one job; nothing else is settled meanwhile."""


class _HookFailed(Exception):
    """Raised from what a hook raised."""


class Undertaker:
    """Buries jobs of one application."""

    def __init__(self, app: JobQ):
        self._app = app

    async def bury(self, connection: Transaction, ends: Sequence[Burial]) -> set[UUID]:
        """Move jobs to the dead; returns those that went. Raises what says that PostgreSQL is away."""
        if not self._app.dead_hooks:
            return {dead.id for dead in await settle.bury(connection, self._app.schema, ends)}
        buried: set[UUID] = set()
        for end in ends:
            try:
                buried |= await self._bury_with_hooks(connection, end)
            except Exception as error:
                if is_unavailable(error):
                    raise
                hide_values(error)
                fields = {"job": str(end.id)}
                log.exception("on_dead failed, burying without it", extra={"fields": fields})
                buried |= {dead.id for dead in await settle.bury(connection, self._app.schema, [end])}
        return buried

    async def _bury_with_hooks(self, connection: Transaction, end: Burial) -> set[UUID]:
        with Patience() as patience:
            async with self._app.database.sessions.begin() as session:
                await patience.begin(session)
                found = await settle.bury(session, self._app.schema, [end])
                for dead in found:
                    # Crash here: what the hooks wrote goes with the burial; whoever buries it then calls them.
                    await self._call_hooks(session, dead)
                patience.go_on()
        # A hook that swallowed a failed statement, or rolled back, leaves a COMMIT that says nothing and does nothing.
        now = await settle.standings(connection, self._app.schema, [dead.id for dead in found])
        if end.id in now and now[end.id].generation == end.generation:
            raise _HookFailed("the transaction of the hooks was rolled back")
        return {dead.id for dead in found}

    async def _call_hooks(self, session: Any, dead: DeadJob) -> None:
        try:
            async with asyncio.timeout(HOOKS_TIMEOUT_S):
                for hook in self._app.dead_hooks:
                    await hook(session, dead)
        except BaseException as error:
            task = asyncio.current_task()
            is_ours = isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0
            if is_ours or getattr(error, "connection_invalidated", False):
                raise
            raise _HookFailed(type(error).__name__) from error
