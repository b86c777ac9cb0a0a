"""Sentinel: a failover loses what the master had acknowledged, and jobq loses nothing by it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from jobq.broker.client import UNAVAILABLE, connect, connect_sync
from jobq.cli.failures import ExitCode
from jobq.embedded.server import Server
from tests.builders import Bench
from tests.commands import Commands, started
from tests.faults import app as faults
from tests.faults.proxy import proxy_before, redis_proxy
from tests.faults.serving import Serving, serving
from tests.redis_state import open_broker
from tests.roles import rules_of_users
from tests.valkeys import SERVICE, Node, Watched, watched
from tests.waiting import until

ROOT = Path(__file__).parents[2]
SENTINEL_RIGHTS = ("+sentinel|get-master-addr-by-name",)
"""As docs/roles.md names them."""


@pytest.fixture
async def valkeys() -> AsyncIterator[Watched]:
    opened = watched()
    started = await asyncio.to_thread(opened.__enter__)
    try:
        await until(lambda: asyncio.to_thread(started.is_whole), "master, replica and Sentinel know each other")
        yield started
    finally:
        await asyncio.to_thread(opened.__exit__, None, None, None)


async def failed_over(valkeys: Watched, old: Server) -> None:
    async def has() -> bool:
        return await asyncio.to_thread(lambda: valkeys.master is not old and valkeys.master.ask("ROLE")[0] == "master")

    await until(has, "the Sentinel has promoted the replica")


async def is_waiting(served: Serving, least: int) -> bool:
    return await served.waiting() >= least


def replica_knows(valkeys: Watched, count: int) -> bool:
    """Whether one node, the replica or what was it, knows exactly so many jobs."""
    with valkeys.nodes[1].client() as client:
        return sum(int(client.hlen(name)) for name in client.keys("*:known")) == count


# --- redis goes back in time


async def test_acknowledged_pushes_and_acks_that_a_failover_undoes_lose_nothing_and_repeat_nothing(
    valkeys: Watched, shared_database_url: str
) -> None:
    old = valkeys.master
    async with serving(shared_database_url, valkeys.url) as served:
        done_before = await served.enqueue(20)
        await served.are_done(done_before)
        undone = await served.enqueue(20, gate="acks to be undone")
        await served.have_started(undone, 10)
        await until(lambda: replica_knows(valkeys, 20), "the replica has heard of them")
        valkeys.let_the_replica_lag()
        served.open("acks to be undone")
        await served.are_done(undone)
        lost = await served.enqueue(20, gate="pushes to be lost")
        await served.have_started(lost, 10)
        await until(lambda: is_waiting(served, 10), "the master has acknowledged the other pushes")

        old.kill()
        await failed_over(valkeys, old)
        assert replica_knows(valkeys, 20)  # Redis went back: it has the jobs that are done, and not those that are not
        served.open("pushes to be lost")
        await served.enqueue(20)
        await served.assert_nothing_lost()


async def test_a_paused_master_that_comes_back_is_written_to_by_nobody(
    valkeys: Watched, shared_database_url: str
) -> None:
    old = valkeys.master
    async with serving(shared_database_url, valkeys.url) as served:
        await served.enqueue(20)
        running = await served.enqueue(10, gate="failover")
        await served.have_started(running, 10)

        old.pause()
        await failed_over(valkeys, old)
        served.open("failover")
        await served.are_done(await served.enqueue(20))
        old.go_on()
        assert old.ask("ROLE")[0] == "master"  # until the Sentinel tells it otherwise
        before = everything_of(old)
        await served.are_done(await served.enqueue(50))

        assert everything_of(old) == before
        await served.assert_nothing_lost()


def everything_of(node: Node) -> dict[str, object]:
    """Every hash and string of one server: what no call of jobq can leave as it is."""
    with node.client() as client:
        readers = {"hash": client.hgetall, "string": client.get, "list": lambda name: client.lrange(name, 0, -1)}
        return {name: readers[kind](name) for name in client.scan_iter() if (kind := client.type(name)) in readers}


async def test_processes_that_are_never_restarted_outlive_a_failover(
    valkeys: Watched, shared_database_url: str, tmp_path: Path
) -> None:
    urls = {"JOBQ_DATABASE_URL": shared_database_url, "JOBQ_REDIS_URL": valkeys.url, "PYTHONPATH": str(ROOT)}
    worker = ["worker", "tests.faults.app:jobs", "--beat", "0.2", "--lease", "30", "-c", "5"]
    old = valkeys.master
    async with Bench.open(shared_database_url, valkeys.url) as bench:
        await bench.db.execute(faults.TABLES)
        with ExitStack() as stack:
            processes = [
                stack.enter_context(started(*words, folder=tmp_path, **urls))
                for words in (["relay", "--beat", "0.2"], worker, worker)
            ]
            await processes[0].says("relay leads")
            for process in processes[1:]:
                await process.says("worker ready")
            jobs = [await bench.enqueue(faults.book_late, "gate") for _ in range(20)]
            await until(lambda: count(bench, "run", 10), "ten jobs run, ten wait")
            valkeys.let_the_replica_lag()
            jobs += [await bench.enqueue(faults.book_late, "gate") for _ in range(20)]
            await until(lambda: has_ready(bench, 30), "the master has acknowledged the pushes")

            old.kill()
            await bench.db.execute("INSERT INTO gate VALUES ('gate')")
            await until(lambda: count(bench, "effect", 40), "all jobs are done")
            for process in processes:
                await process.says("store back")
                process.signal(signal.SIGTERM)
            assert [await process.ends() for process in processes] == [0, 0, 0]
        assert await bench.db.fetchval("SELECT count(DISTINCT job_id) FROM effect") == len(jobs)
        assert await bench.db.fetchval("SELECT count(*) FROM jobq.outbox") == 0
        assert await count(bench, "run", 40)  # not one started twice
        assert {name.rpartition(":")[2] for name in await bench.keys_left()} == set()


async def count(bench: Bench, table: str, wanted: int) -> bool:
    return bool(await bench.db.fetchval(f"SELECT count(*) FROM {table}") == wanted)


async def has_ready(bench: Bench, wanted: int) -> bool:
    return len(await bench.ready()) == wanted


# --- who is asked, and who is believed


async def test_a_sentinel_that_is_away_or_silent_is_passed_over(valkeys: Watched) -> None:
    async with proxy_before(valkeys.sentinel.address) as silent, proxy_before(valkeys.sentinel.address) as away:
        silent.is_black_hole = True
        away.is_refusing = True
        ports = (silent.port, away.port, valkeys.sentinel.port)
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        url = f"redis+sentinel://{hosts}/{SERVICE}"
        client, sync_client = connect(url), connect_sync(url)

        assert await client.ping()
        assert await asyncio.to_thread(sync_client.ping)
        assert (silent.accepted, away.accepted) == (2, 2)
        await client.connection_pool.disconnect()
        sync_client.connection_pool.disconnect()
        assert await client.ping()
        assert await asyncio.to_thread(sync_client.ping)
        # The one that answered is asked first from now on.
        assert (silent.accepted, away.accepted) == (2, 2)
        await client.aclose()
        sync_client.close()


async def both(url: str) -> list[BaseException | None]:
    """What the client of the loop and the one of the heartbeat say to a PING at this URL."""
    client = connect(url)
    with connect_sync(url) as sync_client:
        said = [asyncio.create_task(client.ping()), asyncio.create_task(asyncio.to_thread(sync_client.ping))]
        await asyncio.wait(said)
    await client.aclose()
    return [task.exception() for task in said]


async def test_a_replica_that_a_sentinel_names_is_not_taken_for_the_master(valkeys: Watched) -> None:
    valkeys.master.ask("REPLICAOF", *valkeys.replica.address)

    for error in await both(valkeys.url):
        assert isinstance(error, redis.ConnectionError)
        assert isinstance(error, UNAVAILABLE)
        assert "is not the master yet, or any more" in str(error)


async def test_sentinels_that_name_no_master_are_an_outage_that_says_what_each_said(valkeys: Watched) -> None:
    url = valkeys.url.replace("127.0.0.1", "127.0.0.1:1,127.0.0.1").replace(f"/{SERVICE}", "/other")

    for error in await both(url):
        assert isinstance(error, UNAVAILABLE)
        assert "127.0.0.1:1: " in str(error)
        assert f"127.0.0.1:{valkeys.sentinel.port} knows no service 'other'" in str(error)


async def test_the_rights_of_the_page_of_roles_are_enough_behind_sentinels_with_a_login(valkeys: Watched) -> None:
    for node in valkeys.nodes:
        node.ask("ACL", "SETUSER", "jobq_worker", "on", ">secret", *rules_of_users()["worker"])
    valkeys.sentinel.ask("ACL", "SETUSER", "watcher", "on", ">w@tch", "-@all", "+@connection", *SENTINEL_RIGHTS)
    await until(lambda: valkeys.sentinel.ask("ACL", "SETUSER", "default", "off"), "nobody else may ask")
    url = valkeys.url.replace("://", "://jobq_worker:secret@") + "?sentinel_username=watcher&sentinel_password=w%40tch"

    async with open_broker(url) as broker:
        assert await broker.queues() == set()
    with connect_sync(url) as client:
        assert await asyncio.to_thread(client.eval, "#!lua\nreturn 1", 0) == 1


async def test_the_commands_follow_the_sentinels(valkeys: Watched, shared_database_url: str) -> None:
    commands = Commands(shared_database_url, valkeys.url.replace("127.0.0.1", "127.0.0.1:1,127.0.0.1"))

    found = {finding["about"]: finding for finding in await commands.json("doctor")}
    assert found["redis"]["found"].endswith(f" (127.0.0.1:{valkeys.master.port}, whom the Sentinels name)")
    assert (found["redis"]["level"], found["replica"]["level"]) == ("ok", "ok")
    assert (await commands.json("status"))["redis"] == {"is_reachable": True}
    assert (await commands.json("jobs", "list"), await commands.json("dead", "list")) == ([], [])

    await asyncio.to_thread(valkeys.sentinel.kill)
    refused = await commands.run("doctor")
    assert "no Sentinel names a master: 127.0.0.1:1: " in refused.output
    assert (await commands.json("status", code=ExitCode.UNREACHABLE))["redis"] == {"is_reachable": False}


@pytest.mark.parametrize("is_sync", [False, True])
async def test_a_server_that_became_a_replica_is_left_at_its_first_refusal(valkeys: Watched, *, is_sync: bool) -> None:
    """Also behind one name that leads to another server from then on, as those of managed services do."""
    old, new = valkeys.master, valkeys.replica
    async with redis_proxy(old.url) as (proxy, url):
        client, sync_client = connect(url), connect_sync(url)

        async def write(value: str) -> None:
            await (asyncio.to_thread(sync_client.set, "a", value) if is_sync else client.set("a", value))

        await write("before")
        new.ask("REPLICAOF", "NO", "ONE")
        old.ask("REPLICAOF", *new.address)
        proxy.target = new.address
        with pytest.raises(UNAVAILABLE):
            await write("refused")
        await write("after")

        assert new.ask("GET", "a") == "after"
        await client.aclose()
        sync_client.close()
