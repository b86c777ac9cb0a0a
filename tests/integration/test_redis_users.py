"""The users of docs/roles.md: each can do its work, needs every one of its commands, and can do no more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest
from redis.exceptions import NoPermissionError, ResponseError

from jobq.broker import inspect
from jobq.broker.client import check_server, connect_sync
from jobq.broker.scripts import Broker, beat
from tests.commands import Commands
from tests.redis_state import QUEUE, A, B, C, D, entry, open_broker, raw, seed
from tests.roles import USERS, Names, rules_of_users, users_of

Work = Callable[[Broker, str], Awaitable[Any]]

SEEDED = {
    "relay": "r:1",
    "known": {A: "1", B: "1", C: "1", D: "1"},
    "ready:2": [entry(C, 7), entry(A), entry(B)],
    "working:w": [entry(A)],
    "working:gone": [entry(B), entry(C)],
    "parked:mail": [entry(D), entry(C, 9)],
    "beats": {"w": "1", "gone": "7"},
    "workers": {"w": "{}", "gone": "{}"},
    "bell": ["1"] * 64,
    "parked:odd": "no list",
}
"""A queue in which every script has all of its work to do."""


async def _beat(broker: Broker, url: str) -> None:
    with connect_sync(url) as client:
        back = raw(entry("f" * 32))
        beat(client, broker.keys(QUEUE), "new", counter=1, info="{}", owned=back, put_back=back)


async def _bell(broker: Broker, url: str) -> None:
    await broker.client.blpop([broker.keys(QUEUE).bell], timeout=0.01)


COMMON: list[Work] = [
    lambda broker, url: broker.announce([QUEUE]),
    lambda broker, url: broker.queues(),
    lambda broker, url: broker.count(QUEUE, "adopted"),
    lambda broker, url: broker.mend(QUEUE, [broker.keys(QUEUE).parked("odd")]),
]
DOES: dict[str, list[Work]] = {
    "relay": [
        *COMMON,
        lambda broker, url: broker.push(QUEUE, [entry("e" * 32)], expected="r:1", token="r:2"),
        lambda broker, url: broker.known(QUEUE, [UUID(A)]),
        lambda broker, url: broker.token(QUEUE),
        lambda broker, url: broker.client.info(),
    ],
    "worker": [
        *COMMON,
        lambda broker, url: broker.fetch(QUEUE, "w", 2),
        lambda broker, url: broker.release(QUEUE, "w", raw(entry(A))),
        lambda broker, url: broker.park(QUEUE, "w", "other", raw(entry(A))),
        lambda broker, url: broker.unpark(QUEUE, "w", ["mail"], room=1),
        lambda broker, url: broker.ack(QUEUE, "w", raw(entry(A))),
        lambda broker, url: broker.working(QUEUE, "gone"),
        lambda broker, url: broker.beats(QUEUE),
        lambda broker, url: broker.sweep(QUEUE, "gone", b"7", {entry(B).encode(): 2, entry(C).encode(): 0}),
        lambda broker, url: broker.client.info(),
        _beat,
        _bell,
    ],
    "status": [
        lambda broker, url: broker.queues(),
        lambda broker, url: broker.token(QUEUE),
        lambda broker, url: inspect.look(broker, QUEUE),
        lambda broker, url: inspect.parked(broker, [(QUEUE, "mail")]),
        lambda broker, url: inspect.counters(broker, [QUEUE]),
        lambda broker, url: inspect.server(broker.client),
        lambda broker, url: inspect.clock(broker.client),
    ],
}


@pytest.fixture
async def admin(redis_url: str) -> AsyncIterator[Broker]:
    async with open_broker(redis_url) as broker:
        yield broker


@pytest.fixture
def users(redis_url: str) -> Any:
    with users_of(redis_url) as names:
        yield names


async def is_refused(admin: Broker, url: str, does: Work) -> bool:
    """Whether a user may not do this, on a full queue, by EVAL or by EVALSHA."""
    await seed(admin, SEEDED)
    await admin.client.script_flush()
    async with open_broker(url) as broker:
        try:
            await does(broker, url)
            await does(broker, url)
        except ResponseError as error:
            if not is_refusal(error):
                raise
            return True
    return False


def is_refusal(error: ResponseError) -> bool:
    return isinstance(error, NoPermissionError) or "no permissions to" in str(error) or "ACL failure" in str(error)


def commands(user: str) -> list[str]:
    return [word.removeprefix("+") for word in rules_of_users()[user] if word.startswith("+")]


@pytest.mark.parametrize("user", USERS)
async def test_a_user_may_send_every_command_that_its_work_needs(admin: Broker, users: Names, user: str) -> None:
    for does in DOES[user]:
        assert not await is_refused(admin, users.urls[user], does)


@pytest.mark.parametrize("user", USERS)
async def test_without_any_one_of_its_commands_a_user_cannot_do_its_work(
    admin: Broker, users: Names, user: str
) -> None:
    needless = []
    for command in commands(user):
        await admin.client.execute_command("ACL", "SETUSER", users.names[user], f"-{command}")
        for does in DOES[user]:
            if await is_refused(admin, users.urls[user], does):
                break
        else:
            needless.append(command)
        await admin.client.execute_command("ACL", "SETUSER", users.names[user], f"+{command}")

    assert needless == []


async def test_without_info_relays_and_workers_say_so_and_work_and_doctor_names_the_right(
    admin: Broker, users: Names, redis_url: str, shared_database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    for user in USERS:
        await admin.client.execute_command("ACL", "SETUSER", users.names[user], "-info", "-time")
    for user in ("relay", "worker"):
        caplog.clear()
        async with open_broker(users.urls[user]) as broker:
            assert (await check_server(broker.client))["maxmemory_policy"] == "unknown"
        assert [record.getMessage() for record in caplog.records if "(+info)" in record.getMessage()] != []

    commands = Commands(shared_database_url, users.urls["status"])
    findings = await commands.json("doctor")
    refused = {one["about"]: one["remedy"] for one in findings if "cannot be looked at" in one["found"]}
    assert (await commands.run("status")).exit_code == 0
    assert {about: remedy.rpartition(" ")[2] for about, remedy in refused.items()} == {
        "redis": "+info",
        "clocks": "+time",
    }


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    "words",
    [
        "KEYS *",
        "SCAN 0",
        "FLUSHALL",
        "FLUSHDB",
        "CONFIG GET *",
        "ACL LIST",
        "MONITOR",
        "SCRIPT FLUSH",
        "FUNCTION FLUSH",
        "CLIENT LIST",
        "SHUTDOWN NOSAVE",
        "RENAME jobq:1:a jobq:1:b",
        "SUBSCRIBE other",
        "PUBLISH other x",
    ],
)
async def test_no_user_may_do_what_is_not_its_work(users: Names, user: str, words: str) -> None:
    async with open_broker(users.urls[user]) as broker:
        with pytest.raises(NoPermissionError):
            await broker.client.execute_command(*words.split())


async def test_no_user_reaches_keys_of_others_and_that_of_status_writes_nothing(admin: Broker, users: Names) -> None:
    reads = {"relay": "GET {}", "worker": "LRANGE {} 0 -1", "status": "GET {}"}
    for user, words in reads.items():
        async with open_broker(users.urls[user]) as broker:
            with pytest.raises(NoPermissionError):
                await broker.client.execute_command(*words.format("sessions:7").split())
            script = "return redis.call('GET', 'sessions:7')"
            with pytest.raises(ResponseError, match=r"permissions|ACL"):
                await broker.client.eval(script, 0)
    async with open_broker(users.urls["status"]) as broker:
        for words in ("SET jobq:1:a 1", "DEL jobq:1:a", "SADD jobq:1:a 1", "EVAL return 0"):
            with pytest.raises(NoPermissionError):
                await broker.client.execute_command(*words.split())
