"""`jobq status`: the figures it gives for a state that is known."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from importlib import resources

import pytest

from jobq import JobQ
from jobq.broker.inspect import COUNTERS, REPAIRS
from jobq.cli import report
from jobq.cli.failures import ExitCode
from jobq.outbox.follow import try_lead
from tests.builders import Bench, Gate, beating, started, turn
from tests.commands import Commands

NOTHING = dict.fromkeys(COUNTERS, 0)


@pytest.fixture
async def bench(database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(database_url, redis_url) as bench:
        yield bench


@pytest.fixture
def commands(database_url: str, redis_url: str) -> Commands:
    return Commands(database_url, redis_url)


async def test_an_empty_system_shows_zeros_for_everything(commands):
    shown = await commands.json("status")

    assert shown == {
        "schema": "jobq",
        "is_estimate": False,
        "redis": {"is_reachable": True},
        "relay": {"leads": False, "backend_pid": None},
        "total": {
            "waiting": 0,
            "scheduled": 0,
            "retrying": 0,
            "running": 0,
            "parked": 0,
            "dead": 0,
            "oldest_waiting_s": None,
            "ready": 0,
            "parked_tasks": {},
            "counters": NOTHING,
        },
        "queues": [],
        "parked": [],
        "workers": [],
    }


async def test_every_figure_of_a_known_state(bench, commands):
    gate = Gate()

    @bench.app.task(queue="mail")
    async def wait() -> None:
        await gate.wait()

    elsewhere = await bench.second_app()

    @elsewhere.task(queue="mail")
    async def unheard_of() -> None: ...

    worker = await bench.worker(queues=("mail", "bulk"), concurrency=2)
    await bench.commit_and_relay(unheard_of)
    await started(worker)
    await worker.settler.step()
    running = await bench.commit_and_relay(wait)
    await started(worker)
    await gate.arrived.wait()
    waiting = [await bench.enqueue(wait), await bench.enqueue(wait)]
    await bench.enqueue(wait, delay=300)
    retrying = await bench.enqueue(wait, delay=200)
    await bench.db.execute("UPDATE jobq.outbox SET attempts = 1 WHERE id = $1", retrying)
    await bench.db.execute("UPDATE jobq.outbox SET created_at = now() - interval '1 hour' WHERE id = $1", waiting[1])
    await bench.db.execute("UPDATE jobq.outbox SET created_at = now() - interval '9 hours' WHERE id = $1", running)
    await bench.db.execute(
        "INSERT INTO jobq.dead (id, generation, queue, task, args, priority, attempts, crashes, created_at, reason)"
        " VALUES (gen_random_uuid(), 1, 'gone', 'send', '{}', 2, 1, 0, now(), 'rejected')"
    )
    await bench.broker.count("mail", "ghost", 3)
    await bench.broker.count("bulk", "ghost", 2)
    leader = await bench.app.database.connect(schema="jobq", name="a relay")
    assert await try_lead(leader, "jobq")

    shown = await commands.json("status")

    bulk, gone, mail = shown["queues"]
    ages = [queue.pop("oldest_waiting_s") for queue in (mail, shown["total"])]
    counted = {**NOTHING, "pushed": 2, "fetched": 2, "parked": 1, "ghost": 3}
    in_mail = {"waiting": 2, "scheduled": 1, "retrying": 1, "running": 1, "parked": 1, "ready": 0}
    assert mail == {"queue": "mail", **in_mail, "dead": 0, "parked_tasks": {"unheard_of": 1}, "counters": counted}
    assert all(3600 <= age < 3700 for age in ages)
    assert shown["total"] == {
        **in_mail,
        "dead": 1,
        "parked_tasks": {"unheard_of": 1},
        "counters": {**counted, "ghost": 5},
    }
    assert shown["parked"] == [{"queue": "mail", "task": "unheard_of", "jobs": 1, "is_offered": False}]
    assert (bulk["queue"], bulk["counters"]["ghost"], bulk["running"]) == ("bulk", 2, 0)
    assert (gone["queue"], gone["dead"], gone["counters"]) == ("gone", 1, NOTHING)
    assert shown["relay"] == {"leads": True, "backend_pid": leader.get_server_pid()}
    (found,) = shown["workers"]
    assert (found["name"], found["running"], found["slots"], found["queues"]) == (worker.name, 1, 2, ["bulk", "mail"])
    assert found["pid"] > 0
    gate.open.set()
    leader.terminate()


def test_every_repair_that_the_scripts_count_is_shown():
    lua = resources.files("jobq.broker").joinpath("lua")
    sources = "".join(file.read_text() for file in lua.iterdir() if file.name.endswith(".lua"))

    counted_elsewhere = {"repushed", "adopted", "losses", "ghost", "rewound"}
    assert [name for name in REPAIRS if name not in counted_elsewhere and f"'{name}'" not in sources] == []


async def test_one_queue_can_be_asked_for(bench, commands):
    @bench.app.task(queue="mail")
    async def send() -> None: ...

    @bench.app.task(queue="bulk")
    async def pack() -> None: ...

    await bench.commit_and_relay(send)
    await bench.commit_and_relay(pack)

    shown = await commands.json("status", "--queue", "mail")
    empty = await commands.json("status", "--queue", "none")

    assert [queue["queue"] for queue in shown["queues"]] == ["mail"]
    assert (shown["total"]["waiting"], shown["total"]["ready"], shown["total"]["counters"]["pushed"]) == (1, 1, 1)
    assert [queue["waiting"] for queue in empty["queues"]] == [0]


async def test_the_table_names_queues_repairs_and_workers(bench, commands):
    @bench.app.task(queue="mail")
    async def send() -> None: ...

    worker = await bench.worker(queues=("mail",))
    await bench.enqueue(send)
    await bench.broker.count("mail", "swept", 4)

    result = await commands.run("status")

    assert result.exit_code == ExitCode.OK
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["queue", "waiting", "running", "scheduled", "retrying", "parked", "dead", "oldest"]
    assert lines[1][:-1] == ["mail", "1", "0", "0", "0", "0", "0"]
    assert ["relay:", "none", "leads"] in lines
    assert ["repairs:", "swept=4"] in lines
    assert lines[-1][0] == worker.name


# --- parked


async def park(bench: Bench, count: int) -> JobQ:
    """Have a worker that knows no task park so many jobs of `resize`; returns an application that knows it."""
    newer = await bench.second_app()

    @newer.task(queue="media")
    async def resize() -> None: ...

    older = await bench.worker(queues=("media",))
    for _ in range(count):
        await bench.enqueue(resize)
    await bench.relay()
    await turn(older)
    return newer


async def test_parked_jobs_are_told_by_task_while_no_worker_offers_it(bench, commands):
    await park(bench, 3)

    result = await commands.run("status")
    shown = await commands.json("status")

    assert "parked in media: 3 wait for resize; no live worker offers it" in result.stdout.splitlines()
    assert shown["parked"] == [{"queue": "media", "task": "resize", "jobs": 3, "is_offered": False}]


async def test_a_live_worker_that_offers_a_parked_task_is_told(bench, commands):
    worker = await bench.worker(app=await park(bench, 1), queues=("media",))

    async with beating(worker):
        result = await commands.run("status")
        shown = await commands.json("status")

    told = "parked in media: 1 wait for resize; a live worker offers it, and will call them back"
    assert told in result.stdout.splitlines()
    assert shown["parked"] == [{"queue": "media", "task": "resize", "jobs": 1, "is_offered": True}]


async def test_a_task_offered_under_an_alias_is_offered(bench, commands):
    await park(bench, 1)
    renaming = await bench.second_app()

    @renaming.task(queue="media", aliases=["resize"])
    async def scale() -> None: ...

    worker = await bench.worker(app=renaming, queues=("media",))

    async with beating(worker):
        shown = await commands.json("status")

    assert shown["parked"][0]["is_offered"]


async def test_a_dead_worker_offers_nothing(bench, commands, monkeypatch):
    monkeypatch.setattr(report, "_BEATS_WATCHED_S", 0.3)
    await bench.worker(app=await park(bench, 1), queues=("media",))

    shown = await commands.json("status")

    assert len(shown["workers"]) == 2
    assert not shown["parked"][0]["is_offered"]


async def test_a_worker_of_another_queue_calls_nothing_back_and_so_offers_nothing(bench, commands):
    worker = await bench.worker(app=await park(bench, 1), queues=("mail",))

    async with beating(worker):
        shown = await commands.json("status")

    assert not shown["parked"][0]["is_offered"]


# --- Redis away, and strangers in it


async def test_with_redis_away_the_part_of_postgresql_is_shown_and_the_code_is_4(bench, commands):
    @bench.app.task(queue="mail")
    async def send() -> None: ...

    await bench.enqueue(send)
    away = "redis://:secret@127.0.0.1:1/0"

    result = await commands.run("status", JOBQ_REDIS_URL=away)
    shown = await commands.json("status", "--redis-url", away, code=ExitCode.UNREACHABLE)

    assert result.exit_code == ExitCode.UNREACHABLE
    assert result.stdout.splitlines()[1].split()[:6] == ["mail", "1", "-", "0", "0", "-"]
    assert "redis: away" in result.stdout
    assert "cannot reach Redis at redis://:***@127.0.0.1:1/0" in result.stderr
    assert shown["redis"] == {"is_reachable": False}
    assert (shown["total"]["waiting"], shown["total"]["running"], shown["total"]["counters"]) == (1, None, None)


async def test_a_redis_that_accepts_and_says_nothing_is_away_too(commands):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"

        result = await commands.run("status", JOBQ_REDIS_URL=url)

    assert result.exit_code == ExitCode.UNREACHABLE
    assert f"cannot reach Redis at {url}: no answer in time; check that it runs" in result.stderr


async def test_keys_of_wrong_types_and_garbage_are_read_as_nothing_and_left_alone(bench, commands):
    await bench.broker.announce(["mail"])
    keys = bench.broker.keys("mail")
    await bench.redis.set(keys.beats, "x")
    await bench.redis.hset(keys.workers, mapping={b"w-\xff": b"no json", "w-2": "[1]", "w-3": '{"pid": "x"}'})
    await bench.redis.hset(keys.stats, "ghost", "many")
    await bench.redis.rpush(keys.working("w-2"), "garbage")
    before = await bench.redis.keys("*")

    shown = await commands.json("status")

    assert [worker["running"] for worker in shown["workers"]] == [0, 0, 0]
    assert shown["total"]["counters"] == NOTHING
    assert sorted(await bench.redis.keys("*")) == sorted(before)


async def test_a_name_cannot_move_the_cursor(bench, commands):
    await bench.broker.announce(["mail"])
    await bench.redis.hset(bench.broker.keys("mail").workers, "w\x1b[2J", "{}")

    result = await commands.run("status")

    assert "\x1b" not in result.stdout
    assert "w\\x1b[2J" in result.stdout
