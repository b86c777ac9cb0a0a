"""The scripts of the broker but for the beat: seed keys, call one method, compare every key of the server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from jobq.broker.client import ResponseError
from jobq.broker.scripts import Broker, Fetched, Pushed, Unparked
from tests.redis_state import QUEUE, A, B, C, D, entry, everything, open_broker, raw, seed


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[Broker]:
    async with open_broker(redis_url) as opened:
        yield opened


# --- push


async def test_push_to_an_empty_redis_makes_entries_ready_known_and_rung_for(broker: Broker) -> None:
    entries = [entry(A), entry(B, 3, 1), entry(C)]

    pushed = await broker.push(QUEUE, entries, expected="*", token="r:1")

    assert pushed == Pushed(3, (1, 2, 0, 0))
    assert await everything(broker) == {
        "relay": "r:1",
        "known": {A: "1", B: "3", C: "1"},
        "ready:1": [entry(B, 3, 1)],
        "ready:2": [entry(A), entry(C)],
        "bell": ["1"],
        "stats": {"pushed": "3"},
    }


async def test_push_sent_again_after_a_lost_reply_changes_nothing_but_the_bell(broker: Broker) -> None:
    await seed(broker, {"relay": "r:1"})
    await broker.push(QUEUE, [entry(A)], expected="r:1", token="r:2")
    before = await everything(broker)

    again = await broker.push(QUEUE, [entry(A)], expected="r:1", token="r:2")

    assert again == Pushed(0, (0, 1, 0, 0))
    assert await everything(broker) == before | {"bell": ["1", "1"]}


@pytest.mark.parametrize("found", [None, "r:0", "rival:7"])
async def test_push_is_refused_and_changes_nothing_where_another_token_or_none_is(
    broker: Broker, found: str | None
) -> None:
    await seed(broker, {"known": {A: "1"}} | ({"relay": found} if found else {}))
    before = await everything(broker)

    refused = await broker.push(QUEUE, [entry(B)], expected="r:1", token="r:2")

    assert refused is None
    assert await everything(broker) == before


async def test_push_of_a_known_or_older_generation_adds_nothing(broker: Broker) -> None:
    await seed(broker, {"relay": "r:1", "known": {A: "2", B: "2"}})

    pushed = await broker.push(QUEUE, [entry(A, 1), entry(B, 2)], expected="r:1", token="r:2")

    assert pushed == Pushed(0, (0, 0, 0, 0))
    assert await everything(broker) == {"relay": "r:2", "known": {A: "2", B: "2"}}


async def test_push_of_a_newer_generation_leaves_the_older_entry_to_be_dropped_by_fetch(broker: Broker) -> None:
    await seed(broker, {"relay": "r:1", "known": {A: "1"}, "ready:2": [entry(A)], "beats": {"w": "1"}})

    await broker.push(QUEUE, [entry(A, 2, 3)], expected="r:1", token="r:2")
    fetched = await broker.fetch(QUEUE, "w", 10)

    assert fetched == Fetched(raw(entry(A, 2, 3)), 0)
    assert await everything(broker) == {
        "relay": "r:2",
        "known": {A: "2"},
        "beats": {"w": "1"},
        "working:w": [entry(A, 2, 3)],
        "stats": {"pushed": "1", "stale": "1", "fetched": "1"},
    }


async def test_push_of_one_job_twice_in_one_call_adds_it_once(broker: Broker) -> None:
    pushed = await broker.push(QUEUE, [entry(A), entry(A)], expected="*", token="r:1")

    assert pushed == Pushed(1, (0, 1, 0, 0))


async def test_push_of_nothing_moves_the_token_tells_lengths_and_rings_if_something_waits(broker: Broker) -> None:
    await seed(broker, {"relay": "r:1", "ready:4": [entry(A, 1, 4)]})

    pushed = await broker.push(QUEUE, [], expected="r:1", token="r:2")

    assert pushed == Pushed(0, (0, 0, 0, 1))
    assert await everything(broker) == {"relay": "r:2", "ready:4": [entry(A, 1, 4)], "bell": ["1"]}


async def test_push_of_nothing_rings_for_nobody_when_nothing_waits(broker: Broker) -> None:
    await broker.push(QUEUE, [], expected="*", token="r:1")

    assert await everything(broker) == {"relay": "r:1"}


async def test_push_names_its_counter(broker: Broker) -> None:
    await broker.push(QUEUE, [entry(A)], expected="*", token="r:1", counter="repushed")

    assert (await everything(broker))["stats"] == {"repushed": "1"}


async def test_the_bell_never_holds_more_than_64(broker: Broker) -> None:
    await seed(broker, {"bell": ["1"] * 64, "beats": {"w": "1"}, "working:w": [entry(C)]})

    await broker.push(QUEUE, [entry(A), entry(B)], expected="*", token="r:1")
    await broker.fetch(QUEUE, "w", 1)
    await broker.release(QUEUE, "w", raw(entry(C)))

    assert (await everything(broker))["bell"] == ["1"] * 64


# --- fetch


async def test_fetch_takes_the_most_urgent_first_and_rings_for_the_rest(broker: Broker) -> None:
    known = {A: "1", B: "1", C: "1", D: "1"}
    waiting = {"ready:1": [entry(C, 1, 1)], "ready:2": [entry(A), entry(B)], "ready:4": [entry(D, 1, 4)]}
    await seed(broker, {"known": known, "beats": {"w": "1"}, "working:w": [entry("e" * 32)]} | waiting)

    fetched = await broker.fetch(QUEUE, "w", 2)

    assert fetched == Fetched(raw(entry(C, 1, 1), entry(A)), 2)
    assert await everything(broker) == {
        "known": known,
        "beats": {"w": "1"},
        "working:w": [entry("e" * 32), entry(C, 1, 1), entry(A)],
        "ready:2": [entry(B)],
        "ready:4": [entry(D, 1, 4)],
        "bell": ["1"],
        "stats": {"fetched": "2"},
    }


async def test_fetch_of_the_last_entry_silences_the_bell(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "beats": {"w": "1"}, "ready:2": [entry(A)], "bell": ["1", "1"]})

    fetched = await broker.fetch(QUEUE, "w", 5)

    assert fetched == Fetched(raw(entry(A)), 0)
    assert await everything(broker) == {
        "known": {A: "1"},
        "beats": {"w": "1"},
        "working:w": [entry(A)],
        "stats": {"fetched": "1"},
    }


async def test_fetch_by_a_worker_without_a_heartbeat_is_fenced(broker: Broker) -> None:
    seeded = {"known": {A: "1"}, "ready:2": [entry(A)], "beats": {"other": "1"}}
    await seed(broker, seeded)

    assert await broker.fetch(QUEUE, "w", 5) is None
    assert await everything(broker) == seeded | {"stats": {"fenced": "1"}}


async def test_a_fetch_behind_the_bell_takes_one_ring_and_fetches(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "beats": {"w": "1"}, "ready:2": [entry(A)], "bell": ["1"]})

    fetched = await broker.fetch_at_bell(QUEUE, "w", 5, 60.0)

    assert fetched == Fetched(raw(entry(A)), 0)
    assert await everything(broker) == {
        "known": {A: "1"},
        "beats": {"w": "1"},
        "working:w": [entry(A)],
        "stats": {"fetched": "1"},
    }


async def test_a_fetch_behind_a_bell_that_nobody_rang_fetches_when_its_time_is_over(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "beats": {"w": "1"}, "ready:2": [entry(A)]})

    assert await broker.fetch_at_bell(QUEUE, "w", 5, 0.01) == Fetched(raw(entry(A)), 0)


async def test_a_fetch_behind_the_bell_of_a_worker_without_a_heartbeat_is_fenced(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "ready:2": [entry(A)], "bell": ["1"]})

    assert await broker.fetch_at_bell(QUEUE, "w", 5, 60.0) is None


async def test_a_fetch_behind_the_bell_is_loaded_where_the_server_has_lost_it(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "beats": {"w": "1"}, "ready:2": [entry(A)], "bell": ["1"]})
    await broker.client.script_flush()

    assert await broker.fetch_at_bell(QUEUE, "w", 5, 60.0) == Fetched(raw(entry(A)), 0)


async def test_a_bell_of_a_wrong_type_that_is_waited_for_is_removed(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "beats": {"w": "1"}, "ready:2": [entry(A)], "bell": {"wrong": "type"}})

    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await broker.fetch_at_bell(QUEUE, "w", 5, 60.0)

    assert "bell" not in await everything(broker)


async def test_a_reply_that_is_still_to_come_behind_a_refused_wait_is_not_taken_for_the_next_one(
    broker: Broker,
) -> None:
    await seed(broker, {"bell": {"wrong": "type"}})
    slow = ("BLPOP", "nothing", 0.5)

    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await broker.client.sent_at_bell(broker.keys(QUEUE).bell, slow, within_s=60.0)

    assert await broker.ack(QUEUE, "w", raw(entry(A))) == 0


@pytest.mark.parametrize("known", [{}, {A: "2"}, {A: "01"}, {A: "x"}])
async def test_fetch_drops_entries_that_are_not_at_the_generation_redis_knows(
    broker: Broker, known: dict[str, str]
) -> None:
    await seed(broker, {"known": known | {B: "1"}, "beats": {"w": "1"}, "ready:2": [entry(A), entry(B)]})

    fetched = await broker.fetch(QUEUE, "w", 1)

    assert fetched == Fetched(raw(entry(B)), 0)
    assert await everything(broker) == {
        "known": known | {B: "1"},
        "beats": {"w": "1"},
        "working:w": [entry(B)],
        "stats": {"stale": "1", "fetched": "1"},
    }


async def test_fetch_drops_a_bounded_number_a_call_and_rings_again(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "beats": {"w": "1"}, "ready:2": ["junk"] * 200 + [entry(A)]})

    first = await broker.fetch(QUEUE, "w", 1)
    assert first == Fetched([], 97)
    assert (await everything(broker))["bell"] == ["1"]

    assert await broker.fetch(QUEUE, "w", 1) == Fetched(raw(entry(A)), 0)


async def test_fetch_keeps_further_fields_of_an_entry(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "beats": {"w": "1"}, "ready:2": [entry(A) + ":later"]})

    assert await broker.fetch(QUEUE, "w", 1) == Fetched(raw(entry(A) + ":later"), 0)


# --- ack


async def test_ack_forgets_settled_entries(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1", B: "1"}, "working:w": [entry(A), entry(B)]})

    assert await broker.ack(QUEUE, "w", raw(entry(A))) == 1
    assert await everything(broker) == {"known": {B: "1"}, "working:w": [entry(B)], "stats": {"acked": "1"}}


async def test_ack_of_an_old_generation_keeps_the_newer_known(broker: Broker) -> None:
    await seed(broker, {"known": {A: "2"}, "working:w": [entry(A)], "ready:2": [entry(A, 2)]})

    assert await broker.ack(QUEUE, "w", raw(entry(A)), "ghost") == 1
    assert await everything(broker) == {"known": {A: "2"}, "ready:2": [entry(A, 2)], "stats": {"ghost": "1"}}


async def test_ack_of_a_newer_generation_than_known_forgets_the_older(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "working:w": [entry(A, 2)]})

    await broker.ack(QUEUE, "w", raw(entry(A, 2)))

    assert await everything(broker) == {"stats": {"acked": "1"}}


async def test_ack_sent_again_removes_no_second_copy_of_another_run(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "working:w": [entry(A)]})
    await broker.ack(QUEUE, "w", raw(entry(A)))
    await seed(broker, {"known": {A: "2"}, "working:w": [entry(A, 2)]})

    assert await broker.ack(QUEUE, "w", raw(entry(A))) == 0
    state = await everything(broker)
    assert (state["known"], state["working:w"]) == ({A: "2"}, [entry(A, 2)])


async def test_ack_of_an_entry_that_stands_twice_removes_one(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "working:w": [entry(A), entry(A)]})

    await broker.ack(QUEUE, "w", raw(entry(A)))

    assert (await everything(broker))["working:w"] == [entry(A)]


async def test_ack_of_garbage_removes_it_from_the_list(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "working:w": ["junk", entry(A)]})

    assert await broker.ack(QUEUE, "w", [b"junk"], "garbage") == 1
    assert await everything(broker) == {"known": {A: "1"}, "working:w": [entry(A)], "stats": {"garbage": "1"}}


# --- release


async def test_release_puts_entries_in_front_of_their_lists_in_the_order_of_their_fetch(broker: Broker) -> None:
    working = [entry(A), entry(B, 1, 1), entry(C)]
    await seed(broker, {"working:w": [*working, entry("e" * 32)], "ready:2": [entry(D)], "bell": ["1"]})

    assert await broker.release(QUEUE, "w", raw(*working)) == 3
    assert await everything(broker) == {
        "working:w": [entry("e" * 32)],
        "ready:1": [entry(B, 1, 1)],
        "ready:2": [entry(A), entry(C), entry(D)],
        "bell": ["1", "1"],
        "stats": {"released": "3"},
    }


async def test_release_of_what_was_swept_adds_nothing(broker: Broker) -> None:
    await seed(broker, {"ready:2": [entry(A)], "known": {A: "1"}})

    assert await broker.release(QUEUE, "w", raw(entry(A))) == 0
    assert await everything(broker) == {"ready:2": [entry(A)], "known": {A: "1"}}


# --- park and unpark


async def test_park_sets_entries_aside_and_leaves_what_was_swept(broker: Broker) -> None:
    await seed(broker, {"working:w": [entry(A), entry(B)], "known": {A: "1", B: "1"}})

    assert await broker.park(QUEUE, "w", "mail", raw(entry(A), entry(C))) == 1
    assert await everything(broker) == {
        "working:w": [entry(B)],
        "parked:mail": [entry(A)],
        "known": {A: "1", B: "1"},
        "stats": {"parked": "1"},
    }


async def test_unpark_puts_known_tasks_back_in_order_a_bounded_number_a_call(broker: Broker) -> None:
    parked = {"parked:mail": [entry(A), entry(B, 1, 1), entry(C)], "parked:other": [entry(D)]}
    await seed(broker, parked)

    assert await broker.unpark(QUEUE, "w", ["mail"], limit=2) == Unparked([], 2)
    assert await everything(broker) == {
        "ready:1": [entry(B, 1, 1)],
        "ready:2": [entry(A)],
        "parked:mail": [entry(C)],
        "parked:other": [entry(D)],
        "bell": ["1"],
        "stats": {"unparked": "2"},
    }


async def test_unpark_drops_garbage(broker: Broker) -> None:
    await seed(broker, {"parked:mail": ["junk", entry(A)]})

    assert await broker.unpark(QUEUE, "w", ["mail", "none"]) == Unparked([], 2)
    assert (await everything(broker))["ready:2"] == [entry(A)]


async def test_unpark_looks_at_a_bounded_number_of_entries_garbage_or_not(broker: Broker) -> None:
    await seed(broker, {"parked:mail": ["junk"] * 5})

    assert await broker.unpark(QUEUE, "w", ["mail"], limit=3) == Unparked([], 3)
    assert await everything(broker) == {"parked:mail": ["junk"] * 2, "stats": {"garbage": "3"}}


async def test_unpark_gives_the_worker_what_it_has_room_for_and_the_rest_to_all(broker: Broker) -> None:
    known = {A: "1", B: "2", C: "1", D: "1"}
    seeded = {"known": known, "beats": {"w": "7"}, "working:w": [entry("e" * 32)]}
    await seed(broker, seeded | {"parked:mail": ["junk", entry(B), entry(A)], "parked:sms": [entry(C), entry(D, 1, 4)]})

    unparked = await broker.unpark(QUEUE, "w", ["mail", "sms"], room=2)

    assert unparked == Unparked(raw(entry(A), entry(C)), 3)
    assert await everything(broker) == {
        "known": known,
        "beats": {"w": "7"},
        "working:w": [entry("e" * 32), entry(A), entry(C)],
        "ready:2": [entry(B)],
        "ready:4": [entry(D, 1, 4)],
        "bell": ["1"],
        "stats": {"unparked": "4", "garbage": "1"},
    }


async def test_unpark_that_leaves_nothing_for_others_rings_nobody(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "beats": {"w": "7"}, "parked:mail": [entry(A)]})

    assert await broker.unpark(QUEUE, "w", ["mail"], room=1) == Unparked(raw(entry(A)), 0)
    assert "bell" not in await everything(broker)


async def test_unpark_gives_a_worker_without_a_heartbeat_nothing(broker: Broker) -> None:
    await seed(broker, {"known": {A: "1"}, "parked:mail": [entry(A)]})

    assert await broker.unpark(QUEUE, "w", ["mail"], room=1) == Unparked([], 1)
    assert (await everything(broker))["ready:2"] == [entry(A)]


# --- sweep


def dead(**more: object) -> dict[str, object]:
    return {"beats": {"w": "7", "v": "1"}, "workers": {"w": "{}", "v": "{}"}} | more


SWEPT = {"beats": {"v": "1"}, "workers": {"v": "{}"}}


async def test_sweep_of_a_worker_whose_counter_moved_changes_nothing(broker: Broker) -> None:
    seeded = dead(known={A: "1"}, **{"working:w": [entry(A)]})
    await seed(broker, seeded)

    assert await broker.sweep(QUEUE, "w", b"6", {entry(A).encode(): 2}) is None
    assert await everything(broker) == seeded


async def test_sweep_puts_the_new_generations_in_front_and_forgets_the_worker(broker: Broker) -> None:
    held = [entry(A), entry(B, 4, 1), entry(C)]
    seeded = dead(known={A: "1", B: "4", C: "1", D: "1"}, **{"working:w": held, "ready:2": [entry(D)]})
    await seed(broker, seeded)
    standings = {entry(A).encode(): 2, entry(B, 4, 1).encode(): 5, entry(C).encode(): 2}

    assert await broker.sweep(QUEUE, "w", b"7", standings) == (3, 0)
    assert await everything(broker) == SWEPT | {
        "known": {A: "2", B: "5", C: "2", D: "1"},
        "ready:1": [entry(B, 5, 1)],
        "ready:2": [entry(A, 2), entry(C, 2), entry(D)],
        "bell": ["1"],
        "stats": {"sweeps": "1", "swept": "3"},
    }


async def test_sweep_drops_jobs_that_are_gone_unless_redis_knows_a_newer_generation(broker: Broker) -> None:
    await seed(broker, dead(known={A: "1", B: "2"}, **{"working:w": [entry(A), entry(B)], "ready:2": [entry(B, 2)]}))
    standings = {entry(A).encode(): 0, entry(B).encode(): 0}

    assert await broker.sweep(QUEUE, "w", b"7", standings) == (0, 2)
    assert await everything(broker) == SWEPT | {
        "known": {B: "2"},
        "ready:2": [entry(B, 2)],
        "stats": {"sweeps": "1"},
    }


@pytest.mark.parametrize("standings", [{}, {entry(A).encode(): 1}])
async def test_sweep_puts_back_as_it_is_what_it_has_no_verdict_on_or_whose_row_was_locked(
    broker: Broker, standings: dict[bytes, int]
) -> None:
    await seed(broker, dead(known={A: "1"}, **{"working:w": [entry(A)]}))

    assert await broker.sweep(QUEUE, "w", b"7", standings) == (1, 0)
    assert await everything(broker) == SWEPT | {
        "known": {A: "1"},
        "ready:2": [entry(A)],
        "bell": ["1"],
        "stats": {"sweeps": "1", "swept": "1"},
    }


@pytest.mark.parametrize("generation", ["2", "3"])
async def test_sweep_adds_nothing_where_redis_knows_the_new_generation_or_a_newer(
    broker: Broker, generation: str
) -> None:
    ready = {"ready:2": [entry(A, int(generation))]}
    await seed(broker, dead(known={A: generation}, **{"working:w": [entry(A)]}, **ready))

    assert await broker.sweep(QUEUE, "w", b"7", {entry(A).encode(): 2}) == (0, 0)
    assert await everything(broker) == SWEPT | {"known": {A: generation}, "stats": {"sweeps": "1"}} | ready


async def test_sweep_puts_back_the_generation_of_a_row_that_went_back_in_time(broker: Broker) -> None:
    held = [entry(A, 2), entry(B, 2), entry(C, 2)]
    await seed(broker, dead(known={A: "2", B: "3", C: "1"}, **{"working:w": held, "ready:2": [entry(B, 3), entry(C)]}))
    standings = {entry(A, 2).encode(): 1, entry(B, 2).encode(): 1, entry(C, 2).encode(): 1}

    assert await broker.sweep(QUEUE, "w", b"7", standings) == (1, 0)
    assert await everything(broker) == SWEPT | {
        "known": {A: "1", B: "3", C: "1"},
        "ready:2": [entry(A), entry(B, 3), entry(C)],
        "bell": ["1"],
        "stats": {"sweeps": "1", "swept": "1"},
    }


async def test_sweep_drops_garbage_and_entries_redis_does_not_know_any_more(broker: Broker) -> None:
    await seed(broker, dead(**{"working:w": ["junk", entry(A)]}))

    assert await broker.sweep(QUEUE, "w", b"7", {}) == (0, 1)
    assert await everything(broker) == SWEPT | {"stats": {"sweeps": "1"}}


async def test_sweep_of_a_worker_that_holds_nothing_forgets_it_and_counts_no_repair(broker: Broker) -> None:
    await seed(broker, dead())

    assert await broker.sweep(QUEUE, "w", b"7", {}) == (0, 0)
    assert await everything(broker) == SWEPT


async def test_sweep_sent_again_after_a_lost_reply_changes_nothing(broker: Broker) -> None:
    await seed(broker, dead(known={A: "1"}, **{"working:w": [entry(A)]}))
    await broker.sweep(QUEUE, "w", b"7", {entry(A).encode(): 2})
    before = await everything(broker)

    assert await broker.sweep(QUEUE, "w", b"7", {entry(A).encode(): 2}) is None
    assert await everything(broker) == before


async def test_sweep_forgets_a_worker_that_has_a_name_and_no_counter(broker: Broker) -> None:
    await seed(broker, {"workers": {"w": "{}"}, "known": {A: "1"}, "working:w": [entry(A)]})
    assert await broker.beats(QUEUE) == {"w": b""}

    assert await broker.sweep(QUEUE, "w", b"", {}) == (1, 0)
    assert await broker.beats(QUEUE) == {}


async def test_a_swept_worker_that_comes_back_cannot_erase_the_new_generation(broker: Broker) -> None:
    await seed(broker, dead(known={A: "1"}, **{"working:w": [entry(A)]}))
    await broker.sweep(QUEUE, "w", b"7", {entry(A).encode(): 2})
    before = await everything(broker)

    assert await broker.ack(QUEUE, "w", raw(entry(A))) == 0
    assert await broker.release(QUEUE, "w", raw(entry(A))) == 0
    assert await broker.park(QUEUE, "w", "mail", raw(entry(A))) == 0

    assert await everything(broker) == before | {"stats": {"sweeps": "1", "swept": "1", "acked": "1", "parked": "0"}}
