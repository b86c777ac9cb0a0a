"""How a worker's slots are shared among its queues: in proportion, without idle slots, and with nobody starved."""

from __future__ import annotations

import math
from itertools import count, cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobq.worker.shares import REST_S, Shares


class Queues:
    """Backlogs in memory, and a worker's turns over them. Time stands still until a test moves it."""

    def __init__(self, shares: Shares, **backlogs: float):
        self.shares = shares
        self.backlogs: dict[str, float] = backlogs
        self.now = 1000.0
        self.asked: list[tuple[str, int]] = []
        """Every question of the last turn."""
        self.starts: list[str] = []

    def turn(self, room: int) -> dict[str, int]:
        """One turn with so many free slots; how many each queue got of them."""
        self.asked, got = [], {}
        self.shares.begin(self.now)
        while portions := self.shares.split(room):
            assert 0 < sum(wanted for _, wanted in portions) <= room
            for queue, wanted in portions:
                came = int(min(wanted, self.backlogs[queue]))
                self.backlogs[queue] -= came
                self.shares.note(queue, wanted, came, int(min(self.backlogs[queue], 1)), self.now)
                self.asked.append((queue, wanted))
                self.starts += [queue] * came
                got[queue] = got.get(queue, 0) + came
                room -= came
        return got


def test_the_slots_of_one_turn_are_shared_by_weight() -> None:
    queues = Queues(Shares(["a", "b", "c"], {"a": 5, "b": 3}), a=99, b=99, c=99)

    assert queues.turn(18) == {"a": 10, "b": 6, "c": 2}
    assert queues.asked == [("a", 10), ("b", 6), ("c", 2)], "one question to each"


def test_slots_that_free_one_at_a_time_are_shared_by_weight_and_well_mixed() -> None:
    queues = Queues(Shares(["a", "b", "c"], {"a": 5, "b": 3}), a=99, b=99, c=99)

    for _ in range(18):
        queues.turn(1)

    assert "".join(queues.starts) == "abcabaaba" * 2


def test_without_weights_all_queues_are_equal() -> None:
    queues = Queues(Shares(["a", "b", "c"]), a=99, b=99, c=99)

    assert queues.turn(30) == {"a": 10, "b": 10, "c": 10}


def test_what_a_queue_cannot_fill_goes_to_the_others_in_the_same_turn() -> None:
    queues = Queues(Shares(["a", "b", "c"], {"a": 8}), a=2, b=99, c=99)

    assert queues.turn(10) == {"a": 2, "b": 4, "c": 4}


def test_a_queue_that_gave_its_last_entry_is_not_asked_again_in_the_turn() -> None:
    queues = Queues(Shares(["a", "b"]), a=5, b=2)

    assert queues.turn(10) == {"a": 5, "b": 2}
    assert queues.asked == [("a", 5), ("b", 5)]


def test_one_queue_is_asked_once_a_turn() -> None:
    queues = Queues(Shares(["a"]), a=150)

    for got in ({"a": 100}, {"a": 50}, {"a": 0}, {"a": 0}):
        assert queues.turn(100) == got
        assert queues.asked == [("a", 100)]


def test_an_empty_queue_rests_while_another_fills_all_slots() -> None:
    queues = Queues(Shares(["a", "b", "c"]), a=math.inf, b=0, c=0)

    queues.turn(30)
    queues.turn(30)
    assert queues.asked == [("a", 30)]

    queues.backlogs["b"] = 99
    queues.now += 2 * REST_S
    assert queues.turn(30) == {"a": 15, "b": 15, "c": 0}


def test_a_resting_queue_is_asked_all_the_same_before_a_slot_stays_free() -> None:
    queues = Queues(Shares(["a", "b"]), a=3, b=0)
    queues.turn(10)
    queues.backlogs["b"] = 1

    assert queues.turn(10) == {"a": 0, "b": 1}


def test_a_queue_that_was_empty_has_nothing_to_make_up_for() -> None:
    queues = Queues(Shares(["a", "b"]), a=math.inf, b=0)
    for _ in range(50):
        queues.turn(100)
        queues.now += 2 * REST_S

    queues.backlogs["b"] = math.inf

    assert queues.turn(100) == {"a": 50, "b": 50}


def test_a_queue_that_was_empty_waits_for_no_light_one_to_be_due() -> None:
    queues = Queues(Shares(["a", "b", "c"], {"a": 100}), a=math.inf, b=math.inf, c=0)
    for _ in range(5):
        queues.turn(1)
        queues.now += 2 * REST_S

    queues.backlogs["c"] = 1
    queues.starts.clear()
    queues.turn(2)

    assert "c" in queues.starts


def test_a_queue_that_was_alone_has_nothing_to_pay_back() -> None:
    queues = Queues(Shares(["a", "b"]), a=5000, b=0)
    for _ in range(60):
        queues.turn(100)
        queues.now += 2 * REST_S
    queues.backlogs.update(a=math.inf, b=math.inf)

    assert queues.turn(100) == {"a": 50, "b": 50}


def test_a_queue_that_holds_only_what_nobody_can_run_is_asked_once_a_turn() -> None:
    shares = Shares(["a", "b"], strict=True)
    shares.begin(0.0)
    shares.note("a", 10, 0, 5000, 0.0)  # the script dropped as many stale entries as one call may

    assert shares.split(10) == [("b", 10)]


def test_strict_asks_a_queue_only_when_those_before_it_are_empty() -> None:
    queues = Queues(Shares(["a", "b", "c"], strict=True), a=3, b=99, c=99)

    assert queues.turn(2) == {"a": 2}
    assert queues.turn(2) == {"a": 1, "b": 1}
    assert queues.turn(2) == {"a": 0, "b": 2}
    queues.backlogs["a"] = 1
    assert queues.turn(2) == {"a": 1, "b": 1}, "it does not rest: it comes first again at once"
    queues.backlogs["b"] = 0
    assert queues.turn(2) == {"a": 0, "b": 0, "c": 2}


# --- properties ------------------------------------------------------------------------------------------------------

weights_of_queues = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 100), min_size=1)
rooms = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(weights_of_queues, rooms)
def test_whenever_one_looks_starts_are_in_proportion(weights: dict[str, int], rooms: list[int]) -> None:
    queues = Queues(Shares(list(weights), weights), **dict.fromkeys(weights, math.inf))

    for room in rooms:
        queues.turn(room)

    starts = queues.starts
    for begin in (0, len(starts) // 3):
        for end in range(begin + 1, len(starts) + 1):
            window = starts[begin:end]
            rounds = {queue: window.count(queue) / weight for queue, weight in weights.items()}
            for one in weights:
                for other in weights:
                    # Within a turn the order is that of the questions, so a window may cut through one.
                    slack = 1 / weights[one] + 1 / weights[other] + 2 * max(rooms) / sum(weights.values())
                    assert abs(rounds[one] - rounds[other]) <= slack + 1e-9


@given(weights_of_queues, st.integers(1, 300))
def test_one_slot_at_a_time_no_queue_is_ever_ahead_by_more_than_a_start(weights: dict[str, int], turns: int) -> None:
    queues = Queues(Shares(list(weights), weights), **dict.fromkeys(weights, math.inf))

    for _ in range(turns):
        queues.turn(1)

    rounds = {queue: queues.starts.count(queue) / weight for queue, weight in weights.items()}
    for one in weights:
        for other in weights:
            assert abs(rounds[one] - rounds[other]) <= max(1 / weights[one], 1 / weights[other]) + 1e-9


@given(
    weights_of_queues,
    st.lists(st.tuples(st.integers(1, 30), st.dictionaries(st.sampled_from("abcde"), st.integers(0, 40)))),
    st.booleans(),
    st.sampled_from([0.0, REST_S / 3, 2 * REST_S]),
)
def test_no_slot_stays_free_while_any_queue_has_work(
    weights: dict[str, int], turns: list[tuple[int, dict[str, int]]], is_strict: bool, pace: float
) -> None:
    shares = Shares(list(weights), None if is_strict else weights, strict=is_strict)
    queues = Queues(shares, **dict.fromkeys(weights, 0))

    for room, arrivals in turns:
        for queue in weights:
            queues.backlogs[queue] += arrivals.get(queue, 0)
        waiting = sum(queues.backlogs.values())
        assert sum(queues.turn(room).values()) == min(room, waiting)
        assert len(queues.asked) <= len(weights) * (len(weights) + 1) / 2, "each round of questions closes a queue"
        queues.now += pace


@given(weights_of_queues, st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 8))
def test_a_queue_with_work_is_served_within_a_bounded_number_of_starts(
    weights: dict[str, int], arrivals: list[int], room: int
) -> None:
    """Whatever the others do: run dry, come back, or have work all the time."""
    steady = min(weights)
    shares = Shares(list(weights), weights)
    queues = Queues(shares, **{**dict.fromkeys(weights, 0), steady: math.inf})
    more = cycle(arrivals)

    for _ in count():
        for other in weights.keys() - {steady}:
            queues.backlogs[other] += next(more)
        queues.turn(room)
        queues.now += REST_S / 2
        if len(queues.starts) > 600:
            break

    bound = sum(math.ceil(weight / weights[steady]) + 1 for weight in weights.values()) + 2 * room
    gaps = "".join("|" if queue == steady else "." for queue in queues.starts).split("|")
    assert max(map(len, gaps)) <= bound


@pytest.mark.parametrize("room", [0, -3])
def test_no_room_is_for_nobody(room: int) -> None:
    assert Shares(["a"]).split(room) == []
