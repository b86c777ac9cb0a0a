"""The faults of the two stores and of the connections to them; entered into the table of `faults`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import anyio

from tests.chaos.faults import NONE, Strike, fault
from tests.chaos.observer import NAME
from tests.chaos.stage import Stage

ALL_RUNNING = "every run of that moment"


@fault("FLUSHALL", bound=ALL_RUNNING)
async def flushall(stage: Stage, choose: random.Random) -> Strike:
    in_hand = await stage.observer.in_hand()
    await stage.observer.redis.flushall()
    return Strike(bound=_running(stage), note=f"{len(in_hand)} jobs in hand")


@fault("SIGKILL of Redis without persistence", bound=ALL_RUNNING)
async def kill_redis(stage: Stage, choose: random.Random) -> Strike:
    await _away(stage, 0.0)
    return Strike(bound=_running(stage))


@fault("Redis away for longer than the lease, then empty", bound=ALL_RUNNING)
async def redis_outage(stage: Stage, choose: random.Random) -> Strike:
    await _away(stage, stage.shape.lease_s * choose.uniform(1.2, 2.0))
    return Strike(bound=_running(stage))


@fault("SCRIPT FLUSH", bound=NONE)
async def script_flush(stage: Stage, choose: random.Random) -> Strike:
    await stage.observer.redis.script_flush()
    return Strike(bound=0)


@fault("CLIENT KILL of every connection to Redis", bound=NONE)
async def client_kill(stage: Stage, choose: random.Random) -> Strike:
    for _ in range(choose.randint(1, 4)):
        await stage.observer.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await anyio.sleep(0.1)
    return Strike(bound=0)


@fault("PostgreSQL stopped at once and started again", bound=ALL_RUNNING)
async def crash_postgres(stage: Stage, choose: random.Random) -> Strike:
    await _blocking(lambda: stage.servers.postgres.stop("immediate"))
    await anyio.sleep(choose.choice([0.0, 1.0]))
    await _blocking(stage.servers.postgres.start)
    return Strike(bound=_running(stage))


@fault("every backend of PostgreSQL terminated", bound=ALL_RUNNING)
async def terminate_backends(stage: Stage, choose: random.Random) -> Strike:
    ended = await stage.observer.rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND application_name <> $1",
        NAME,
    )
    return Strike(bound=_running(stage), note=f"{len(ended)} backends")


async def _away(stage: Stage, seconds: float) -> None:
    """Kill Redis, and start it again empty."""
    await _blocking(stage.servers.valkey.kill)
    await anyio.sleep(seconds)
    await _blocking(stage.servers.valkey.start)


def _running(stage: Stage) -> int:
    return stage.shape.capacity


async def _blocking(call: Callable[[], object]) -> None:
    await asyncio.to_thread(call)
