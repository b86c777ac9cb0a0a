"""The janitor: deletes idempotency keys, steps and dead jobs that have outlived their use, a little at a time.

Invariant: no turn of the relay waits for it, and whatever it meets, it tries again later. Called by leadership. Calls
outbox.follow.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from ..outbox import follow
from ..outbox.database import Database
from ..settings import RelaySettings

log = logging.getLogger(__name__)

_ROWS_A_STEP = 500
_PAUSE_BETWEEN_STEPS_S = 0.2


class Janitor:
    """Tidies once a minute, and step by step while there is much to tidy, on a connection opened for it."""

    def __init__(self, database: Database, schema: str, settings: RelaySettings):
        self._database = database
        self._schema = schema
        self._settings = settings
        self._put_off(settings.tidy_every)

    async def run(self, is_leading: Callable[[], bool]) -> None:
        """Tidy while `is_leading`, until cancelled."""
        while True:
            await asyncio.sleep(max(0.0, self._next - time.monotonic()))
            if not is_leading():
                self._put_off(self._settings.tidy_every)
                continue
            try:
                await self.step()
            except Exception as error:  # noqa: BLE001  the loop runner: what it cannot do now it can do later
                # It may be alone with its trouble: rights, a lock, no connection left. Its relay leads on.
                problem = f"{type(error).__name__}: {error}"
                log.warning("could not tidy, trying again later", extra={"fields": {"error": problem}})
                self._put_off(self._settings.tidy_every)

    async def step(self) -> None:
        """Delete a few rows, if it is time."""
        if time.monotonic() < self._next:
            return
        kept_s = self._settings.dead_kept.total_seconds()
        connection = await self._database.connect(schema=self._schema, name="jobq:janitor")
        try:
            gone = await follow.tidy(connection, self._schema, dead_kept_s=kept_s, limit=_ROWS_A_STEP)
        finally:
            connection.terminate()
        if gone:
            log.info("tidied", extra={"fields": {"rows": gone}})
        is_more = gone >= _ROWS_A_STEP
        self._put_off(_PAUSE_BETWEEN_STEPS_S if is_more else self._settings.tidy_every)

    def _put_off(self, seconds: float) -> None:
        self._next = time.monotonic() + seconds
