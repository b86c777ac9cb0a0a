"""Frozen values: entries are well formed or none at all, job ids are ordered by time."""

from __future__ import annotations

import time
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobq.model import PRIORITIES, DeadJob, Enqueued, Entry, Intent, new_job_id

ID = UUID("01900000-0000-7000-8000-0000000000ab")
TEXT = ID.hex.encode()


def test_an_entry_is_its_id_generation_and_priority():
    entry = Entry.of(ID, 3, 2)

    assert entry.raw == b"019000000000700080000000000000ab:3:2"
    assert entry.key == (ID, 3)


@given(st.uuids(), st.integers(1, 2**31 - 1), st.sampled_from(PRIORITIES))
def test_an_entry_is_read_as_it_was_written(id_, generation, priority):
    entry = Entry.of(id_, generation, priority)

    assert Entry.parse(entry.raw) == entry


def test_fields_of_later_releases_are_ignored_and_kept_in_the_raw_text():
    entry = Entry.parse(TEXT + b":1:2:customer-7:more")

    assert entry is not None
    assert (entry.id, entry.generation, entry.priority) == (ID, 1, 2)
    assert entry.raw == TEXT + b":1:2:customer-7:more"


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b":::",
        TEXT,
        TEXT + b":1",
        TEXT + b":0:2",
        TEXT + b":-1:2",
        TEXT + b":2147483648:2",
        TEXT + b":1:0",
        TEXT + b":1:5",
        TEXT + b":x:2",
        TEXT + b"::2",
        TEXT[:-1] + b":1:2",
        TEXT + b"0:1:2",
        b"g" * 32 + b":1:2",
        str(ID).encode() + b":1:2",  # dashes: another text than `of` writes for the same id
        b"\xff" * 32 + b":1:2",
        "١".encode() * 16 + b":1:2",
        b"{}",
        b"\0",
    ],
    ids=repr,
)
def test_garbage_is_no_entry(garbage):
    assert Entry.parse(garbage) is None


@given(st.binary() | st.from_regex(rb"[0-9a-fA-F]{30,34}:[-+ _0-9]{1,12}:[-+ _0-9]{1,3}(:.*)?", fullmatch=True))
@example(TEXT + b": 1:2")
@example(TEXT + b":1_0:2")
@example(TEXT + b":+1:2")
@example(TEXT + b":01:2")
@example(TEXT.upper() + b":1:2")
def test_whatever_redis_holds_parses_to_a_well_formed_entry_or_none(raw):
    entry = Entry.parse(raw)

    if entry is not None:
        canonical = Entry.of(entry.id, entry.generation, entry.priority).raw
        assert raw == canonical or raw.startswith(canonical + b":")


def test_job_ids_are_different_and_ordered_as_they_were_made():
    ids, made_at = [], [time.time_ns()]
    for _ in range(20_000):
        ids.append(new_job_id())
        made_at.append(time.time_ns())

    assert len(set(ids)) == len(ids)
    assert {id_.version for id_ in ids} == {7}
    for i in range(len(ids) - 1):
        clock_went_back = made_at[i : i + 3] != sorted(made_at[i : i + 3])
        assert ids[i] < ids[i + 1] or clock_went_back, f"ids {i} and {i + 1}"


def test_values_cannot_be_changed():
    intent = Intent(task="t", queue="q", args="{}")
    dead = DeadJob(ID, "t", "q", "{}", 1, 0, "rejected", None, None)

    for value, name in ((intent, "args"), (dead, "reason"), (Enqueued(ID, created=True), "id")):
        with pytest.raises(AttributeError):
            setattr(value, name, "other")
