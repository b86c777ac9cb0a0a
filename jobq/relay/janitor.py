"""The janitor: deletes idempotency keys, steps and dead jobs that have outlived their use, a little at a time.

Called by leadership, while it leads. Calls outbox.follow.
"""

from __future__ import annotations

import logging
import time

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
        self._next = time.monotonic() + settings.tidy_every

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
        self._next = time.monotonic() + (_PAUSE_BETWEEN_STEPS_S if is_more else self._settings.tidy_every)
