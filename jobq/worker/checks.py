"""What keeps a worker from its work, told from what the worker knows already.

Invariant: reads only, from any thread; the worker may be starting, stopping or stuck meanwhile.
Called by worker. Calls nothing.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from ..health import Check, store_check

if TYPE_CHECKING:
    from .worker import Worker


def checks(worker: Worker) -> list[Check]:
    """Every check by name, the failing ones and the others."""
    if not worker.is_open:
        return [Check("turns", False, "still starting: it checks both stores and enters the lifespan")]
    return [
        # One that takes no turn for a lease does no work, though it is not given up yet.
        worker.pulse.check(longest_s=worker.settings.lease),
        _open(worker),
        _lease(worker),
        _registered(worker),
        store_check("redis", worker.turns.redis_outage, worker.settler.redis_outage, worker.heartbeat.outage),
        store_check("postgresql", worker.turns.database_outage, worker.settler.database_outage),
    ]


def _open(worker: Worker) -> Check:
    orders = worker.orders
    if orders.stopping.is_set():
        return Check("open", False, "it was told to stop, and fetches nothing more")
    if orders.quiet.is_set():
        return Check("open", False, "it was told to be quiet, and fetches nothing more")
    return Check("open", True, f"it fetches from {', '.join(worker.settings.queues)}")


def _lease(worker: Worker) -> Check:
    """The heartbeat: without an answered one no run starts."""
    acked_at = worker.heartbeat.acked_at
    if math.isinf(acked_at):
        return Check("lease", False, "no heartbeat has been answered yet")
    found = f"the last answered heartbeat was {time.monotonic() - acked_at:.1f} s ago"
    if worker.heartbeat.may_start:
        return Check("lease", True, found)
    return Check("lease", False, f"{found}: no run starts until the next one")


def _registered(worker: Worker) -> Check:
    if worker.turns.is_fenced:
        return Check("registered", False, "fenced: Redis does not know this worker until its next heartbeat")
    return Check("registered", True, f"as {worker.name}")
