"""What strangers write into the keys of a queue: garbage, wrong types, other ids, huge numbers.

It is skipped, counted or removed; the process goes on, and no job waits for ever behind it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import UUID

import pytest
from redis.exceptions import ResponseError

from jobq.broker.client import connect_sync
from jobq.broker.scripts import Broker, Fetched, beat
from tests.redis_state import DATABASE_ID, QUEUE, A, B, Value, entry, everything, open_broker, raw, seed

GARBAGE = ["", "junk", "\udcff\udcfe\x00", ":::", f"{A}:1", f"{A}:1:9", f"{A}:x:2", f"{A}:-1:2", "zz:1:2", "[]"]
NO_GENERATION = ["", "x", "-1", "1.5", "01", "0x1", "nan", "inf", "1e9", " 1", "2147483648", "9" * 400]


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[Broker]:
    async with open_broker(redis_url) as opened:
        yield opened


@pytest.mark.parametrize("value", NO_GENERATION)
async def test_what_is_no_generation_in_known_keeps_no_job_from_being_pushed_and_fetched(
    broker: Broker, value: str
) -> None:
    await seed(broker, {"known": {A: value}, "beats": {"w": "1"}})

    assert await broker.known(QUEUE, [UUID(A)]) == [0]
    pushed = await broker.push(QUEUE, [entry(A)], expected="*", token="r:1")
    fetched = await broker.fetch(QUEUE, "w", 1)

    assert pushed is not None
    assert pushed.pushed == 1
    assert fetched == Fetched(raw(entry(A)), 0)


@pytest.mark.parametrize("value", NO_GENERATION)
async def test_what_is_no_generation_in_known_disturbs_no_ack_beat_or_sweep(
    broker: Broker, redis_url: str, value: str
) -> None:
    await seed(broker, {"known": {A: value, B: value}, "beats": {"w": "1"}, "working:w": [entry(A), entry(B)]})

    await broker.ack(QUEUE, "w", raw(entry(A)))
    with connect_sync(redis_url) as client:
        found = beat(client, broker.keys(QUEUE), "w", counter=2, info="{}", owned=raw(entry(B)), put_back=[])
    swept = await broker.sweep(QUEUE, "w", b"2", {entry(B).encode(): 2})

    assert (found.lost, found.missing) == ([], raw(entry(B)))
    assert swept == (1, 0)
    state = await everything(broker)
    assert (state["known"], state["ready:2"]) == ({B: "2"}, [entry(B, 2)])


async def test_garbage_in_ready_is_dropped_and_counted(broker: Broker) -> None:
    await seed(broker, {"ready:2": [*GARBAGE, entry(A)], "known": {A: "1"}, "beats": {"w": "1"}})

    fetched = await broker.fetch(QUEUE, "w", 1)

    assert fetched == Fetched(raw(entry(A)), 0)
    assert (await everything(broker))["stats"] == {"garbage": str(len(GARBAGE)), "fetched": "1"}


async def test_an_id_nobody_pushed_is_dropped(broker: Broker) -> None:
    await seed(
        broker, {"ready:2": [entry(B), entry(A, 2**31), entry(A, 10**30)], "known": {A: "1"}, "beats": {"w": "1"}}
    )

    assert await broker.fetch(QUEUE, "w", 5) == Fetched([], 0)


@pytest.mark.parametrize("forged", [entry(A) + "7", entry(A).upper(), entry(A).replace(":1:", ":01:")])
async def test_an_entry_in_another_spelling_is_dropped_though_its_id_is_known(broker: Broker, forged: str) -> None:
    await seed(broker, {"ready:2": [forged], "known": {A: "1"}, "beats": {"w": "1"}})

    assert await broker.fetch(QUEUE, "w", 5) == Fetched([], 0)


async def test_ack_of_a_forged_entry_leaves_the_job_it_names_alone(broker: Broker) -> None:
    await seed(broker, {"working:w": [entry(A) + "7", f"{A}:1", entry(A)], "known": {A: "1"}})

    await broker.ack(QUEUE, "w", raw(entry(A) + "7", f"{A}:1"), "garbage")

    state = await everything(broker)
    assert (state["working:w"], state["known"]) == ([entry(A)], {A: "1"})


async def test_a_script_call_survives_garbage_everywhere(broker: Broker, redis_url: str) -> None:
    hashes = {name: {"junk": "junk", A: "junk"} for name in ("known", "beats", "workers", "stats")}
    lists = {name: list(GARBAGE) for name in ("ready:1", "ready:3", "working:w", "parked:mail", "bell")}
    await seed(broker, {"relay": "\udcff"} | hashes | lists)
    await broker.client.hset(broker.keys(QUEUE).stats, mapping=dict.fromkeys(("pushed", "acked", "fetched"), "junk"))

    await broker.push(QUEUE, [entry(A)], expected="*", token="r:1")
    with connect_sync(redis_url) as client:
        found = beat(client, broker.keys(QUEUE), "w", counter=1, info="{}", owned=[], put_back=[])
    fetched = await broker.fetch(QUEUE, "w", 5)
    await broker.release(QUEUE, "w", found.unknown)
    await broker.park(QUEUE, "w", "mail", found.unknown[:2])
    await broker.ack(QUEUE, "w", found.unknown, "garbage")
    await broker.unpark(QUEUE, "w", ["mail"], room=1)
    await broker.sweep(QUEUE, "w", b"1", {})

    assert set(found.unknown) == {word.encode("utf-8", "surrogateescape") for word in GARBAGE}
    assert fetched == Fetched(raw(entry(A)), 0)
    state = await everything(broker)
    assert state["ready:2"] == [entry(A)]
    assert "working:w" not in state


WRONG: list[Value] = ["a string", ["a list"], {"a": "hash"}, {"a set"}]
SEEDED: dict[str, Value] = {
    "relay": "r:1",
    "known": {A: "1"},
    "ready:1": [entry(A, 1, 1)],
    "ready:2": [entry(A)],
    "ready:3": [entry(A, 1, 3)],
    "ready:4": [entry(A, 1, 4)],
    "working:w": [entry(A)],
    "parked:mail": [entry(A)],
    "beats": {"w": "1"},
    "workers": {"w": "{}"},
    "bell": ["1"],
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", SEEDED)
async def test_a_key_of_a_wrong_type_is_removed_and_the_relay_made_to_rebuild_the_queue(
    broker: Broker, redis_url: str, name: str, wrong: Value
) -> None:
    if type(wrong) is type(SEEDED[name]):
        return
    await seed(broker, SEEDED | {name: wrong})

    failed = 0
    with connect_sync(redis_url) as client:
        for _ in range(2):
            for call in (
                lambda: broker.push(QUEUE, [entry(B)], expected="*", token="r:2"),
                lambda: broker.fetch(QUEUE, "w", 5),
                lambda: broker.fetch_at_bell(QUEUE, "w", 5, 0.01),
                lambda: broker.ack(QUEUE, "w", raw(entry(A))),
                lambda: broker.release(QUEUE, "w", raw(entry(A))),
                lambda: broker.park(QUEUE, "w", "mail", raw(entry(A))),
                lambda: broker.unpark(QUEUE, "w", ["mail"], room=1),
                lambda: broker.known(QUEUE, [UUID(A)]),
                lambda: broker.beats(QUEUE),
                lambda: broker.working(QUEUE, "w"),
                lambda: broker.token(QUEUE),
                lambda: _beat(client, broker),
                lambda: broker.sweep(QUEUE, "w", b"1", {}),
            ):
                try:
                    await call()
                except ResponseError:
                    failed += 1
                    found = await everything(broker)
                    assert found.get(name) != wrong
                    assert "known" not in found, "the walk would not look for what was lost"
                    assert "relay" not in found, "the relay would not see the loss"

    assert failed == 1


async def _beat(client: object, broker: Broker) -> object:
    return beat(client, broker.keys(QUEUE), "w", counter=2, info="{}", owned=[], put_back=[])  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", WRONG[:3], ids=lambda value: type(value).__name__)
async def test_the_hint_of_queue_names_is_removed_if_it_is_no_set(broker: Broker, wrong: Value) -> None:
    name = f"jobq:1:{DATABASE_ID.hex[:8]}:queues"
    for call in (broker.queues, lambda: broker.announce([QUEUE])):
        await seed(broker, {name: wrong}, base="")

        with pytest.raises(ResponseError):
            await call()

        await broker.announce([QUEUE])
        assert await broker.queues() == {QUEUE}


async def test_mend_finds_counters_of_a_wrong_type_that_no_script_complains_of(broker: Broker) -> None:
    await seed(broker, {"stats": "junk", "relay": "r:1"})
    await broker.push(QUEUE, [entry(A)], expected="r:1", token="r:2")

    await broker.mend(QUEUE)

    assert await everything(broker) == {"stats": {"mended": "1"}, "ready:2": [entry(A)], "bell": ["1"]}


async def test_mend_of_a_sound_queue_changes_nothing(broker: Broker) -> None:
    await seed(broker, SEEDED)

    await broker.mend(QUEUE)

    assert await everything(broker) == SEEDED


async def test_a_server_that_forgot_the_scripts_is_told_them_again(broker: Broker, redis_url: str) -> None:
    await broker.push(QUEUE, [entry(A)], expected="*", token="r:1")
    await broker.client.script_flush()

    pushed = await broker.push(QUEUE, [entry(B)], expected="r:1", token="r:2")
    await broker.client.script_flush()
    with connect_sync(redis_url) as client:
        found = beat(client, broker.keys(QUEUE), "w", counter=1, info="{}", owned=[], put_back=[])

    assert pushed is not None
    assert pushed.ready == (0, 2, 0, 0)
    assert not found.registered
