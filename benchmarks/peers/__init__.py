"""jobq beside its peers: the same job, the same latency, the same kill, on the same servers.

    peers          who is compared and how each is run; `*_app.py`, `*_app.mjs`: each peer's application
    environments   each in its own environment, made when it is first needed
    trials         how all are measured; `marks.py`, `marks.mjs`: what is told to and noted by their processes
    table          what was found, a row a peer

Called by suite. Calls jobq.embedded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..figures import Measure, Samples
from . import trials
from .peers import JOBS, PEERS, Peer

if TYPE_CHECKING:
    from ..stage import Stage

__all__ = ["MEASURES"]

_FEWEST_JOBS = 1_000


def _measures(peer: Peer) -> list[Measure]:
    """What is measured of one peer; each figure is kept with the version that it is about."""

    async def drain(stage: Stage) -> Samples:
        return await trials.drain(peer, stage.servers, max(peer.jobs * stage.jobs // JOBS, _FEWEST_JOBS))

    async def latency(stage: Stage) -> Samples:
        return await trials.latencies(peer, stage.servers, min(trials.LATENCY_SAMPLES, stage.jobs))

    async def enqueue(stage: Stage) -> Samples:
        return await trials.enqueue(peer, stage.servers)

    async def kill(stage: Stage) -> Samples:
        return await trials.kill(peer, stage.servers)

    name, about = f"peers/{peer.name}", peer.version
    units = {"done": "s from the kill until all were done"}
    found = [Measure(f"{name}-kill", "jobs", kill, about, is_slow=True, repeat=1, units=units)]
    if not peer.as_fast_as:
        found.append(Measure(name, "jobs/s", drain, about, is_slow=True))
        found.append(Measure(f"{name}-latency", "ms", latency, about, is_slow=True, repeat=1))
    if peer.has_transactions:
        found.append(Measure(f"{name}-enqueue", "transactions/s", enqueue, about, is_slow=True))
    return found


MEASURES: list[Measure] = [measure for peer in PEERS for measure in _measures(peer)]
