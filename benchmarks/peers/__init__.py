"""jobq beside its peers: the same job, the same latency, the same kill, on the same servers.

    peers          who is compared and how each is run; `*_app.py`, `*_app.mjs`: each peer's application
    environments   each in its own environment, made when it is first needed
    trials         how all are measured; `marks.py`, `marks.mjs`: what is told to and noted by their processes
    verdict        what a kill -9 lost
    table          the result

`python -m benchmarks.peers` measures them alone. Called by the benchmarks. Calls jobq.embedded.
"""

from __future__ import annotations

import statistics
import sys
from typing import TYPE_CHECKING

from ..figures import Measure, Samples
from . import environments, trials
from .peers import PEERS, Peer

if TYPE_CHECKING:
    from ..stage import Stage

__all__ = ["MEASURES"]


def _measures(peer: Peer) -> list[Measure]:
    async def drain(stage: Stage) -> Samples:
        try:
            return await trials.drain(peer, stage.servers, min(peer.jobs, stage.jobs))
        except environments.PeerFailed as reason:
            return _without(peer, reason)

    async def latency(stage: Stage) -> Samples:
        try:
            found = await trials.latencies(peer, stage.servers)
        except environments.PeerFailed as reason:
            return _without(peer, reason)
        return {"p50": statistics.median(found), "p99": statistics.quantiles(found, n=100)[98]}

    async def kill(stage: Stage) -> Samples:
        try:
            verdict = await trials.kill(peer, stage.servers)
        except environments.PeerFailed as reason:
            return _without(peer, reason)
        return {"lost": verdict.lost, "twice": verdict.twice}

    found = [Measure(f"peers/{peer.name}-kill", f"of {trials.KILL_JOBS} jobs", kill, is_slow=True, repeat=1)]
    if not peer.as_fast_as:
        found += [
            Measure(f"peers/{peer.name}", "jobs/s", drain, is_slow=True),
            Measure(f"peers/{peer.name}-latency", "ms from enqueue to start", latency, is_slow=True, repeat=1),
        ]
    return found


def _without(peer: Peer, reason: environments.PeerFailed) -> Samples:
    """Nothing was found, and the run goes on."""
    sys.stderr.write(f"{peer.name}: {reason}\n")
    return {}


MEASURES: list[Measure] = [measure for peer in PEERS for measure in _measures(peer)]
