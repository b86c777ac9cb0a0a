"""When a worker process has done enough: it makes room for a fresh one.

Invariant: no job is interrupted for it. The worker fetches nothing more, and stops when its last job has ended and is
settled, however long that takes; a stop ordered meanwhile has its usual grace.
Called by worker. Calls turns and owned.
"""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigurationError
from ..settings import WorkerSettings
from .orders import Orders
from .owned import Owned
from .turns import Turns

log = logging.getLogger(__name__)

_STATM = Path("/proc/self/statm")


class Recycling:
    """Watches `max_jobs` and `max_rss` of one worker.

    1. Reached: the worker is quiet, and `announce` tells whoever may start another in its place.
    2. Nothing owned any more: the worker is told to stop.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        worker: str,
        turns: Turns,
        owned: Owned,
        orders: Orders,
        announce: Callable[[], None],
    ):
        self._settings = settings
        self._worker = worker
        self._turns = turns
        self._owned = owned
        self._orders = orders
        self._announce = announce
        self._has_begun = False

    def step(self) -> None:
        """Look once. Takes microseconds."""
        if not self._has_begun and (reason := self._reason()):
            self._has_begun = True
            fields = {"worker": self._worker, **reason, "running": len(self._turns.runs)}
            log.info("worker recycles", extra={"fields": fields})
            self._orders.quiet.set()
            self._announce()
        if self._has_begun and not self._turns.runs and not len(self._owned):
            self._orders.stopping.set()
            self._orders.wake()

    def _reason(self) -> dict[str, object] | None:
        if self._turns.budget <= 0:
            return {"max_jobs": self._settings.max_jobs}
        limit = self._settings.max_rss
        if limit is not None and (held := resident_bytes()) >= limit:
            return {"rss": in_mib(held), "max_rss": in_mib(limit)}
        return None


def check_memory(settings: WorkerSettings) -> None:
    """Raise ConfigurationError where a worker would recycle before its first job, again and again."""
    if settings.max_rss is not None and (held := resident_bytes()) >= settings.max_rss:
        raise ConfigurationError(
            f"--max-rss {in_mib(settings.max_rss)} is less than the worker holds before its first job"
            f" ({in_mib(held)}): give it more"
        )


def resident_bytes() -> int:
    """Memory of this process that is in RAM. Where the system does not say (macOS): the most it ever was."""
    try:
        pages = int(_STATM.read_bytes().split()[1])
    except FileNotFoundError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * resource.getpagesize()


def in_mib(count: int) -> str:
    return f"{count / 2**20:.0f}M"
