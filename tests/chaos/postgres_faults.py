"""The faults of PostgreSQL and of the connections to it; entered into the table of `faults`."""

from __future__ import annotations

import asyncio
import random
import time

import anyio

from tests.chaos.faults import NONE, Strike, fault
from tests.chaos.observer import NAME
from tests.chaos.stage import Stage
from tests.chaos.store_faults import ALL_RUNNING

FORGETFUL = {"synchronous_commit": "off", "wal_writer_delay": "10s", "wal_writer_flush_after": "1GB"}
"""A PostgreSQL that answers COMMIT long before it keeps it."""


@fault("PostgreSQL stopped at once and started again", bound=ALL_RUNNING)
async def crash_postgres(stage: Stage, choose: random.Random) -> Strike:
    away_s = choose.choice([0.0, 1.0, 2 * stage.shape.lease_s])
    await asyncio.to_thread(stage.servers.postgres.stop, "immediate")
    await anyio.sleep(away_s)
    await asyncio.to_thread(stage.servers.postgres.start)
    return Strike(bound=stage.shape.capacity, note=f"away for {away_s:g} s")


@fault("every backend of PostgreSQL terminated", bound=ALL_RUNNING)
async def terminate_backends(stage: Stage, choose: random.Random) -> Strike:
    ended = await stage.observer.rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND application_name <> $1",
        NAME,
    )
    return Strike(bound=stage.shape.capacity, note=f"{len(ended)} backends")


@fault("`synchronous_commit = off` for some seconds, then a crash", bound="every run of the time that was lost")
async def forgetful_postgres(stage: Stage, choose: random.Random) -> Strike:
    """Orders, jobs and effects of these seconds are lost together, or none of one transaction."""
    postgres, seconds = stage.servers.postgres, choose.uniform(1.0, 3.0)
    await asyncio.to_thread(postgres.stop)
    since = time.time()
    await asyncio.to_thread(postgres.start, FORGETFUL)
    await anyio.sleep(seconds)
    await asyncio.to_thread(postgres.stop, "immediate")
    await asyncio.to_thread(postgres.start)
    return Strike(bound=2 * stage.shape.capacity, rewound=[(since, time.time())])


@fault("a transaction held open for the whole run", bound=NONE)
async def hold_transaction(stage: Stage, choose: random.Random) -> Strike:
    """The run sees to it that there is one at all times; here it only is looked at."""
    held_s = await stage.observer.hold()
    return Strike(bound=0, note=f"for {held_s:.0f} s by now")
