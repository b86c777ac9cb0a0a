"""What the relay knows to be missing from Redis. Pure: no store takes part."""

from __future__ import annotations

from types import SimpleNamespace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobq.relay import backlog as backlog_module
from jobq.relay.backlog import END, START, Backlog, Repair

MAIL = ("mail", 2)
SLOW = ("slow", 4)


def row(number: int) -> UUID:
    return UUID(int=number)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(backlog_module, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def taken(backlog: Backlog) -> Repair:
    repair = backlog.take()
    assert repair is not None
    return repair


def test_a_new_backlog_is_clean_and_gives_nothing_to_repair() -> None:
    backlog = Backlog(100)
    assert backlog.is_clean
    assert not backlog.has_full_lists
    assert backlog.take() is None


def test_a_repair_begins_with_the_row_that_was_marked() -> None:
    backlog = Backlog(100)
    backlog.mark(*MAIL, before=row(5))
    repair = taken(backlog)
    assert repair.covers(MAIL, row(5))
    assert not repair.covers(MAIL, row(4))
    assert not repair.covers(SLOW, row(5))
    assert repair.start == row(4)


@given(st.lists(st.integers(0, 2**128 - 1), min_size=1))
def test_a_repair_begins_with_the_smallest_row_ever_marked(numbers: list[int]) -> None:
    backlog = Backlog(100)
    for number in numbers:
        backlog.mark(*MAIL, before=row(number))
    repair = taken(backlog)
    assert all(repair.covers(MAIL, row(number)) for number in numbers if number > 0)
    assert repair.start == row(max(min(numbers) - 1, 0))


def test_what_a_walk_takes_is_clean_and_marks_made_meanwhile_are_the_next_ones() -> None:
    backlog = Backlog(100)
    backlog.mark(*MAIL, before=row(5))
    repair = taken(backlog)
    assert backlog.is_clean
    backlog.mark(*MAIL, before=row(9))
    backlog.caught_up(repair)
    assert taken(backlog).start == row(8)


def test_a_walk_that_breaks_off_gives_back_all_it_took() -> None:
    backlog = Backlog(100)
    backlog.mark(*MAIL, before=row(5))
    backlog.mark_all()
    backlog.mark_lost("slow", hold_s=0)
    repair = taken(backlog)
    backlog.give_back(repair)
    again = taken(backlog)
    assert (again.lists, again.everything, again.lost) == (repair.lists, True, {"slow"})


def test_mark_all_covers_every_row_of_every_list() -> None:
    backlog = Backlog(100)
    backlog.mark_all()
    assert not backlog.is_clean
    repair = taken(backlog)
    assert repair.start == START
    assert repair.covers(("never seen", 1), row(1))
    assert not repair.is_given_up


def test_a_loss_covers_all_lists_of_the_queue_after_the_hold_and_forgets_their_lengths(clock: Clock) -> None:
    backlog = Backlog(100)
    backlog.note_length(*MAIL, 70)
    backlog.mark_full(*MAIL)
    backlog.mark_lost("mail", hold_s=4)
    assert backlog.is_held("mail")
    assert not backlog.is_held("slow")
    assert backlog.length(*MAIL) == 0
    assert not backlog.is_full(*MAIL)
    assert backlog.take() is None

    clock.now += 4
    assert not backlog.is_held("mail")
    repair = taken(backlog)
    assert repair.lost == {"mail"}
    assert all(repair.covers(("mail", priority), row(1)) for priority in (1, 2, 3, 4))
    assert taken_losses(backlog) == set()


def taken_losses(backlog: Backlog) -> set[str]:
    backlog.mark_all()
    return taken(backlog).lost


def test_a_queue_that_refused_is_tried_again_a_little_later_and_others_are_not_held_up(clock: Clock) -> None:
    backlog = Backlog(100)
    backlog.mark(*MAIL, before=row(5))
    backlog.mark(*SLOW, before=row(5))
    backlog.refuse("mail")
    assert set(taken(backlog).lists) == {SLOW}
    clock.now += 0.6
    assert set(taken(backlog).lists) == {MAIL}


def test_a_refusal_does_not_shorten_the_hold_of_a_loss(clock: Clock) -> None:
    backlog = Backlog(100)
    backlog.mark_lost("mail", hold_s=4)
    backlog.refuse("mail")
    clock.now += 1
    assert backlog.is_held("mail")


def test_a_full_list_is_taken_when_half_of_it_is_gone() -> None:
    backlog = Backlog(100)
    backlog.note_length(*MAIL, 100)
    backlog.mark_full(*MAIL)
    backlog.mark(*MAIL, before=row(5))
    backlog.note_length(*MAIL, 51)
    assert backlog.take() is None
    backlog.note_length(*MAIL, 50)
    assert taken(backlog).covers(MAIL, row(5))
    assert backlog.is_full(*MAIL), "until the walk has come to the end, new rows must wait behind it"


def test_a_list_is_full_no_more_when_a_walk_came_to_the_end_for_it() -> None:
    backlog = Backlog(100)
    backlog.mark_full(*MAIL)
    backlog.mark_full(*SLOW)
    backlog.mark(*MAIL, before=row(5))
    repair = taken(backlog)
    backlog.caught_up(repair)
    assert not backlog.is_full(*MAIL)
    assert backlog.is_full(*SLOW)
    assert backlog.has_full_lists


def test_a_list_that_a_walk_gave_up_stays_full_and_the_walk_is_over_when_it_gave_up_all() -> None:
    backlog = Backlog(100)
    backlog.mark_full(*MAIL)
    backlog.mark(*MAIL, before=row(5))
    backlog.mark(*SLOW, before=row(3))
    repair = taken(backlog)
    repair.left.add(MAIL)
    assert not repair.is_given_up
    assert not repair.covers(MAIL, END)
    repair.left.add(SLOW)
    assert repair.is_given_up
    backlog.caught_up(repair)
    assert backlog.is_full(*MAIL)
