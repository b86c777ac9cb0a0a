"""The faults of Redis and of the connections to it; entered into the table of `faults`."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal

import anyio

from tests.chaos.faults import NONE, Strike, fault
from tests.chaos.stage import Stage
from tests.waiting import until

ALL_RUNNING = "every run of that moment, of all workers"


@fault("FLUSHALL", bound=ALL_RUNNING)
async def flushall(stage: Stage, choose: random.Random) -> Strike:
    in_hand = await stage.observer.in_hand()
    await stage.observer.redis.flushall()
    return Strike(bound=stage.shape.capacity, note=f"{len(in_hand)} jobs in hand")


@fault("SIGKILL of Redis without persistence", bound=ALL_RUNNING)
async def kill_redis(stage: Stage, choose: random.Random) -> Strike:
    await _restarted(stage)
    return Strike(bound=stage.shape.capacity)


@fault("SIGKILL of Redis with its append-only file", bound=ALL_RUNNING)
async def kill_redis_aof(stage: Stage, choose: random.Random) -> Strike:
    redis = stage.observer.redis
    _forget(stage)
    await redis.config_set("appendonly", "yes")

    async def is_written() -> bool:
        return not (await redis.info("persistence"))["aof_rewrite_in_progress"]

    await until(is_written, "the append-only file is there", 60)
    await anyio.sleep(choose.uniform(0.2, 1.5))
    await _restarted(stage, keep=True, appendonly="yes")
    await redis.config_set("appendonly", "no")
    return Strike(bound=stage.shape.capacity)


@fault("Redis goes back in time, to a copy of some seconds ago", bound=ALL_RUNNING)
async def rewind_redis(stage: Stage, choose: random.Random) -> Strike:
    await stage.observer.redis.save()
    seconds = choose.uniform(0.5, 2.0)
    await anyio.sleep(seconds)
    await _restarted(stage, keep=True)
    return Strike(bound=stage.shape.capacity, note=f"{seconds:.1f} s")


@fault("Redis away for longer than the lease, then empty", bound=ALL_RUNNING)
async def redis_outage(stage: Stage, choose: random.Random) -> Strike:
    await _restarted(stage, away_s=stage.shape.lease_s * choose.uniform(1.2, 2.0))
    return Strike(bound=stage.shape.capacity)


@fault("Redis hangs for longer than the lease", bound=NONE)
async def freeze_redis(stage: Stage, choose: random.Random) -> Strike:
    os.kill(stage.servers.valkey_pid, signal.SIGSTOP)
    await anyio.sleep(stage.shape.lease_s * choose.uniform(1.2, 2.0))
    os.kill(stage.servers.valkey_pid, signal.SIGCONT)
    return Strike(bound=0)


@fault("maxmemory reached for some seconds", bound=NONE)
async def fill_redis(stage: Stage, choose: random.Random) -> Strike:
    redis, seconds = stage.observer.redis, choose.uniform(1.0, 4.0)
    await redis.config_set("maxmemory", max(1, (await redis.info("memory"))["used_memory"] // 2))
    await anyio.sleep(seconds)
    refused = (await redis.info("errorstats")).get("errorstat_OOM", {}).get("count", 0)
    await redis.config_set("maxmemory", 0)
    return Strike(bound=0, note=f"{seconds:.1f} s, {refused} calls refused so far")


@fault("SCRIPT FLUSH", bound=NONE)
async def script_flush(stage: Stage, choose: random.Random) -> Strike:
    await stage.observer.redis.script_flush()
    return Strike(bound=0)


@fault("CLIENT KILL of every connection to Redis", bound=NONE)
async def client_kill(stage: Stage, choose: random.Random) -> Strike:
    for _ in range(choose.randint(1, 4)):
        await stage.observer.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await anyio.sleep(choose.uniform(0.0, 0.3))
    return Strike(bound=0)


async def _restarted(stage: Stage, *, away_s: float = 0.0, keep: bool = False, **config: str) -> None:
    """Kill Redis and start it again, on what it wrote to disk or on nothing."""
    valkey = stage.servers.valkey
    await asyncio.to_thread(valkey.kill)
    if not keep:
        _forget(stage)
    await anyio.sleep(away_s)
    await asyncio.to_thread(valkey.start, config)


def _forget(stage: Stage) -> None:
    data = stage.servers.valkey.data
    (data / "dump.rdb").unlink(missing_ok=True)
    shutil.rmtree(data / "appendonlydir", ignore_errors=True)
