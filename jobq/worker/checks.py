"""What keeps a worker from its work, told from what the worker knows already.

Invariant: reads only, from any thread; the worker may be starting, stopping or stuck meanwhile.
Called by worker. Calls nothing.
"""

from __future__ import annotations

import math
import time

from ..health import Check, Pulse, store_check
from ..settings import WorkerSettings
from .heartbeat import Heartbeat
from .orders import Orders
from .settler import Settler
from .turns import Turns

STARTING = Check("turns", False, "still starting: it checks both stores and enters the lifespan")
"""All there is to say before there is anything to ask."""


def checks(
    worker: str,
    settings: WorkerSettings,
    *,
    pulse: Pulse,
    orders: Orders,
    turns: Turns,
    settler: Settler,
    heartbeat: Heartbeat,
) -> list[Check]:
    """Every check by name, the failing ones and the others."""
    return [
        # One that takes no turn for a lease does no work, though it is not given up yet.
        pulse.check(longest_s=settings.lease),
        _open(settings, orders),
        _lease(heartbeat),
        _registered(worker, turns),
        store_check("redis", turns.redis_outage, settler.redis_outage, heartbeat.outage),
        store_check("postgresql", turns.database_outage, settler.database_outage),
    ]


def _open(settings: WorkerSettings, orders: Orders) -> Check:
    if orders.stopping.is_set():
        return Check("open", False, "it was told to stop, and fetches nothing more")
    if orders.quiet.is_set():
        return Check("open", False, "it was told to be quiet, and fetches nothing more")
    return Check("open", True, f"it fetches from {', '.join(settings.queues)}")


def _lease(heartbeat: Heartbeat) -> Check:
    """The heartbeat: without an answered one no run starts."""
    acked_at = heartbeat.acked_at
    if math.isinf(acked_at):
        return Check("lease", False, "no heartbeat has been answered yet")
    found = f"the last answered heartbeat was {time.monotonic() - acked_at:.1f} s ago"
    if heartbeat.may_start:
        return Check("lease", True, found)
    return Check("lease", False, f"{found}: no run starts until the next one")


def _registered(worker: str, turns: Turns) -> Check:
    if turns.fetching.is_fenced:
        return Check("registered", False, "fenced: Redis does not know this worker until its next heartbeat")
    return Check("registered", True, f"as {worker}")
