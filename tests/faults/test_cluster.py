"""A cluster: slots move under load, a node comes back empty, strangers write into every key, and nothing is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import redis
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, NoPermissionError, TryAgainError

from jobq.broker.client import UNAVAILABLE, ResponseError, connect, connect_sync
from jobq.broker.cluster import _named
from jobq.broker.keys import Keys, queue_names
from tests.builders import Bench, Gate, beating, started
from tests.commands import Commands
from tests.faults.proxy import proxy_before
from tests.faults.serving import serving
from tests.redis_state import open_broker
from tests.roles import rules_of_users
from tests.valkeys import Cluster, ClusterNode, cluster
from tests.waiting import until

QUEUES = ("alpha", "delta", "beta")
"""Each at home on the node of the same place."""


def slot_of(queue: str) -> int:
    return int(key_slot(queue.encode()))


@pytest.fixture(scope="module")
def started_nodes() -> Iterator[Cluster]:
    with cluster() as opened:
        yield opened


@pytest.fixture
async def nodes(started_nodes: Cluster) -> Cluster:
    """Whole and empty, with every queue at home, wherever the test before has moved it."""
    for node in started_nodes.nodes:
        if not node.is_running:
            await asyncio.to_thread(node.start)
    await until(lambda: asyncio.to_thread(started_nodes.is_whole), "the nodes know each other and all slots")
    started_nodes.flush()
    for queue, home in zip(QUEUES, started_nodes.nodes, strict=True):
        if owner(started_nodes, queue) is not home:
            with slot_on_the_move(started_nodes, queue, home):
                pass
    return started_nodes


def owner(nodes: Cluster, queue: str) -> ClusterNode:
    return nodes.owner(slot_of(queue))


# --- a slot on the move


@contextmanager
def slot_on_the_move(nodes: Cluster, queue: str, to: ClusterNode) -> Iterator[ClusterNode]:
    """Begin to move a queue's slot, and end it after the block, when `move_keys` has moved them all."""
    slot, source = slot_of(queue), owner(nodes, queue)
    to.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", to.id)
    try:
        yield source
    finally:
        move_keys(source, queue, to, 1000)
        for node in (to, source, *nodes.nodes):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", to.id)


def move_keys(source: ClusterNode, queue: str, to: ClusterNode, count: int) -> int:
    """Move some keys of a queue, one by one. Returns how many."""
    names = source.ask("CLUSTER", "GETKEYSINSLOT", slot_of(queue), count)
    for name in names:
        source.ask("MIGRATE", *to.address, name, 0, 5000, "REPLACE")
    return len(names)


def errors(nodes: Cluster, kind: str) -> int:
    """How often the nodes have answered so."""
    told = [node.ask("INFO", "errorstats").get(f"errorstat_{kind}", {"count": 0}) for node in nodes.nodes]
    return sum(int(one["count"]) for one in told)


async def test_a_slot_that_moves_under_load_loses_nothing_and_nothing_is_removed(
    nodes: Cluster, shared_database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    queue = QUEUES[0]
    to = next(node for node in nodes.nodes if node is not owner(nodes, queue))
    async with serving(shared_database_url, nodes.url, queues=QUEUES, keys=nodes.keys) as served:
        running = await served.enqueue(5, queue=queue, gate="moved")
        for name in QUEUES:
            await served.enqueue(50, queue=name)
        await served.have_started(running, 5)
        before = {kind: errors(nodes, kind) for kind in ("TRYAGAIN", "MOVED", "ASK")}
        with slot_on_the_move(nodes, queue, to) as source:
            for _ in range(3):
                assert move_keys(source, queue, to, 1)
                refused = errors(nodes, "TRYAGAIN")
                await served.enqueue(10, queue=queue)
                await until(lambda: errors(nodes, "TRYAGAIN") > refused + 5, "scripts met keys on both nodes")  # noqa: B023
        served.open("moved")
        for name in QUEUES:
            await served.enqueue(10, queue=name)
        await served.assert_nothing_lost()

        assert owner(nodes, queue) is to
        assert errors(nodes, "MOVED") > before["MOVED"]
        assert not any(name.startswith("jobq:1:") and f"{{{queue}}}" in name for name in source.ask("KEYS", "*"))
        stats = [await served.bench.stats(name) for name in QUEUES]
    assert all("mended" not in found and "losses" not in found for found in stats)
    assert set(served.starts.values()) == {1}
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_command_is_sent_on_to_where_its_slot_is_moving(nodes: Cluster) -> None:
    for node in nodes.nodes:
        node.ask("ACL", "SETUSER", "jobq_worker", "on", ">secret", *rules_of_users()["worker"], "+asking")
    worker = connect(nodes.url.replace("://", "://jobq_worker:secret@"))
    name, to = "{beta}a", next(node for node in nodes.nodes[1:] if node is not owner(nodes, "beta"))
    client, sync_client = connect(nodes.url), connect_sync(nodes.url)
    asked = errors(nodes, "ASK")
    with slot_on_the_move(nodes, "beta", to):
        assert await client.set(name, "1")
        assert await asyncio.to_thread(sync_client.get, name) == b"1"
        assert await client.eval("#!lua\nreturn redis.call('GET', KEYS[1])", 1, name) == b"1"
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            await client.llen(name)
        assert to.raw("KEYS", name) == [name]
        assert await worker.eval("#!lua\nreturn redis.call('LLEN', KEYS[1])", 1, "jobq:1:{beta}") == 0
    await worker.aclose()
    assert errors(nodes, "ASK") > asked + 3
    assert await client.get(name) == await asyncio.to_thread(sync_client.get, name) == b"1"
    moved = errors(nodes, "MOVED")
    assert await client.get(name) == await asyncio.to_thread(sync_client.get, name) == b"1"
    assert errors(nodes, "MOVED") == moved  # they know by now
    await client.aclose()
    sync_client.close()


async def test_a_node_that_a_command_was_sent_on_to_may_be_away(nodes: Cluster) -> None:
    """It is in no URL, and nobody has learned of it: the trouble is the node's, and is told as such."""
    source = owner(nodes, "beta")
    to = next(node for node in nodes.nodes if node is not source)
    client = connect(f"redis+cluster://127.0.0.1:{source.port}")
    with slot_on_the_move(nodes, "beta", to):
        to.pause()
        try:
            with pytest.raises(UNAVAILABLE):
                async with asyncio.timeout(1):
                    await client.get("{beta}away")
        finally:
            to.go_on()
    await client.aclose()


async def test_a_user_who_may_not_say_asking_is_told_so(nodes: Cluster) -> None:
    for node in nodes.nodes:
        node.ask("ACL", "SETUSER", "jobq_worker", "on", ">secret", *rules_of_users()["worker"], "-asking")
    worker = connect(nodes.url.replace("://", "://jobq_worker:secret@"))
    to = next(node for node in nodes.nodes if node is not owner(nodes, "beta"))
    with slot_on_the_move(nodes, "beta", to), pytest.raises(NoPermissionError, match="asking"):
        await worker.llen("jobq:1:{beta}")
    await worker.aclose()


@pytest.mark.parametrize("kind", [MovedError, AskError, TryAgainError, ClusterDownError])
def test_an_answer_of_a_node_has_its_kind_with_every_redis_py(kind: type[redis.ResponseError]) -> None:
    """Before its version 6, only its own cluster clients knew these words."""
    word = kind.__name__.removesuffix("Error").upper()
    named = _named(redis.ResponseError(f"{word} 5718 127.0.0.1:7702"))

    assert type(named) is kind
    if isinstance(named, AskError):
        assert (named.slot_id, named.host, named.port) == (5718, "127.0.0.1", 7702)


async def test_a_bell_on_another_node_is_never_taken_without_telling(nodes: Cluster) -> None:
    async with open_broker(nodes.url) as broker:
        for _ in range(100):
            for queue in QUEUES:
                await broker.client.delete(broker.keys(queue).bell)
            listening = asyncio.create_task(broker.listen(QUEUES, 5.0))
            for queue in QUEUES:
                await broker.client.lpush(broker.keys(queue).bell, 1)
            told = await listening

            assert told
            for queue in set(QUEUES) - told:
                assert await broker.client.llen(broker.keys(queue).bell) == 1


# --- a node dies


async def test_a_node_that_is_killed_and_comes_back_empty_loses_nothing(
    nodes: Cluster, shared_database_url: str
) -> None:
    async with serving(shared_database_url, nodes.url, queues=QUEUES, concurrency=10, keys=nodes.keys) as served:
        running = [job for name in QUEUES for job in await served.enqueue(5, queue=name, gate="back")]
        await served.have_started(running, 15)
        victim = owner(nodes, QUEUES[2])

        victim.kill()
        for name in QUEUES:
            await served.enqueue(20, queue=name)
        victim.start()
        served.open("back")
        await served.assert_nothing_lost()


async def test_a_reply_nobody_asked_for_is_not_taken_for_the_next_one(nodes: Cluster) -> None:
    node = nodes.nodes[0]
    async with proxy_before(node.address) as proxy:
        url = f"redis+cluster://127.0.0.1:{proxy.port}"
        name = next(name for name in map(str, range(100)) if owner(nodes, name) is node)
        client, sync_client = connect(url), connect_sync(url)
        assert await client.set(name, "1")
        assert await asyncio.to_thread(sync_client.get, name) == b"1"
        proxy.say(b"$5\r\nstale\r\n")
        other = connect(url)  # another connection's way there and back, by which it has arrived
        assert await other.get(name) == b"1"
        await other.aclose()

        assert await client.get(name) == await asyncio.to_thread(sync_client.get, name) == b"1"
        await client.aclose()
        sync_client.close()


async def test_a_worker_keeps_its_lease_in_the_queues_of_the_nodes_that_are_there(
    nodes: Cluster, shared_database_url: str
) -> None:
    lost, victim = QUEUES[0], owner(nodes, QUEUES[0])
    there = next(name for name in map(str, range(100)) if owner(nodes, name) is not victim)
    witness = owner(nodes, there)
    async with Bench.open(shared_database_url, nodes.url) as bench:
        worker = await bench.worker(queues=(lost, there))
        keys = bench.broker.keys(there)
        before = witness.ask("HGET", keys.beats, worker.name)
        victim.kill()
        for _ in range(2):
            with pytest.raises(UNAVAILABLE):
                await asyncio.to_thread(worker.heartbeat.step)

        assert witness.ask("HGET", keys.beats, worker.name) != before


async def test_nobody_is_swept_while_the_node_of_his_queue_takes_no_writes(
    nodes: Cluster, shared_database_url: str
) -> None:
    """Though the queues of whoever looks are on another node, which takes them."""
    here = QUEUES[0]
    there = next(queue for queue in QUEUES if owner(nodes, queue) is not owner(nodes, here))
    async with Bench.open(shared_database_url, nodes.url) as bench:
        gate = Gate()

        @bench.app.task(queue=there)
        async def endless() -> None:
            await gate.wait()

        living, other = [await bench.worker(queues=(name,), lease=1.0) for name in (here, there)]
        job_id = await bench.commit_and_relay(endless)
        await started(other)
        swept: list[str] = []

        async def has_swept() -> bool:
            with suppress(ResponseError):
                swept.extend(await living.sweeper.step())
            return bool(swept)

        async def has_looked_for(seconds: float) -> None:
            ends_at = time.monotonic() + seconds

            async def look() -> bool:
                await has_swept()
                return time.monotonic() > ends_at

            await until(look, "it has looked for so long")

        async with beating(living):
            await has_looked_for(0.1)
            owner(nodes, there).ask("CONFIG", "SET", "min-replicas-to-write", 1)
            try:
                with pytest.raises(ResponseError):
                    await asyncio.to_thread(other.heartbeat.step)
                await has_looked_for(3.0)
            finally:
                owner(nodes, there).ask("CONFIG", "SET", "min-replicas-to-write", 0)
            assert swept == []
            assert (await bench.row(job_id))["crashes"] == 0  # type: ignore[index]

            await until(has_swept, "who stands still of its own accord is swept", 30)
            assert swept == [other.name]


async def test_a_silent_node_is_asked_last(nodes: Cluster) -> None:
    async with proxy_before(nodes.nodes[0].address) as silent:
        silent.is_black_hole = True
        client = connect(f"redis+cluster://127.0.0.1:{silent.port},127.0.0.1:{nodes.nodes[1].port}")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await client.ping()

        assert await client.ping()
        assert silent.accepted == 1
        await client.aclose()


async def test_a_command_that_got_no_answer_is_not_sent_again(nodes: Cluster) -> None:
    """Nor by the client of the heartbeat: what is tried again is jobq's to decide."""
    async with proxy_before(nodes.nodes[0].address) as proxy:
        url = f"redis+cluster://127.0.0.1:{proxy.port}"
        name = next(name for name in map(str, range(100)) if owner(nodes, name) is nodes.nodes[0])
        client, sync_client = connect(url), connect_sync(url)
        for number in (1, 2):
            proxy.lose_reply(b"LPUSH")
            with pytest.raises(UNAVAILABLE):
                await (client.lpush(name, "a") if number == 1 else asyncio.to_thread(sync_client.lpush, name, "a"))
            assert nodes.nodes[0].ask("LLEN", name) == number
        await client.aclose()
        sync_client.close()


async def test_the_commands_ask_the_nodes(nodes: Cluster, shared_database_url: str) -> None:
    commands = Commands(shared_database_url, nodes.url)
    evicting = nodes.nodes[1]
    evicting.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        findings = await commands.json("doctor")
    finally:
        evicting.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")

    found = {finding["about"]: finding for finding in findings}
    assert "one of 3 masters" in found["redis"]["found"]
    assert found["eviction"]["level"] == "warn"
    assert found["eviction"]["found"].endswith(f" (127.0.0.1:{evicting.port}, one of 3 masters)")
    async with Bench.open(shared_database_url, nodes.url) as bench:
        worker = await bench.worker(queues=QUEUES)
        told = await commands.json("status")
        await asyncio.to_thread(worker.heartbeat.step)
    assert told["redis"] == {"is_reachable": True}
    assert [one["name"] for one in told["workers"]] == [worker.name]
    assert (await commands.json("jobs", "list"), await commands.json("dead", "list")) == ([], [])


# --- strangers


def stranger_writes(redis_url: str, keys: Keys, workers: list[str], how: str) -> None:
    """Write into every key of a queue, and into the one beside the queues."""
    types = {keys.relay: "string", keys.known: "hash", keys.beats: "hash", keys.workers: "hash", keys.stats: "hash"}
    lists = [keys.bell, *keys.ready, *map(keys.working, workers), keys.parked("book"), keys.parked("nobody's")]
    types |= dict.fromkeys(lists, "list") | {queue_names(keys.database_id): "set"}
    value = {"another type": b"junk", "garbage": b"\xff\xfe:\x00", "huge": b"9" * 1_000_000}[how]
    writes = {"string": "set", "hash": "hset", "list": "rpush", "set": "sadd"}
    with connect_sync(redis_url) as client:
        for name, kind in types.items():
            if how == "another type":
                kind = "set" if kind == "string" else "string"
                client.delete(name)
            values = [value] * (2 if kind == "hash" else 1)
            with suppress(redis.ResponseError):  # in the same moment it got its own type back, or still has another
                getattr(client, writes[kind])(name, *values)


async def test_what_strangers_write_into_every_key_loses_nothing(nodes: Cluster, shared_database_url: str) -> None:
    async with serving(shared_database_url, nodes.url, queues=QUEUES, keys=nodes.keys) as served:
        broker = served.bench.broker
        for how in ("another type", "garbage", "huge"):
            running = [job for name in QUEUES for job in await served.enqueue(2, queue=name, gate=how)]
            await served.have_started(running, 6)
            workers = [name for name in await broker.beats(QUEUES[0]) if name.startswith("w-")]
            for name in QUEUES:
                await served.enqueue(10, queue=name, gate=how)
                await asyncio.to_thread(stranger_writes, nodes.url, broker.keys(name), workers, how)
            served.open(how)
            for name in QUEUES:
                await served.enqueue(10, queue=name)
            await served.are_done()
        with connect_sync(nodes.url) as client:
            for name in QUEUES:
                # What no script ever looks at again: their own names, at which no job can be.
                keys = broker.keys(name)
                client.delete(keys.parked("nobody's"))
                client.hdel(keys.known, b"\xff\xfe:\x00", b"9" * 1_000_000)
        await served.assert_nothing_lost()
