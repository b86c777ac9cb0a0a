"""What a process says it owns: the one table that the heartbeat vouches for."""

from __future__ import annotations

import asyncio
from uuid import UUID

from jobq.model import Entry
from jobq.worker.owned import Holding, Owned

ENTRY = Entry.of(UUID(int=1), 1, 2)


async def ended_task() -> asyncio.Task[None]:
    task = asyncio.ensure_future(asyncio.sleep(0))
    await task
    return task


def take(owned: Owned, entry: Entry = ENTRY) -> Holding:
    holding = owned.take("default", entry)
    assert holding is not None
    return holding


def test_an_entry_is_taken_once() -> None:
    owned = Owned(["default"])

    take(owned)

    assert owned.take("default", ENTRY) is None
    assert len(owned) == 1


def test_two_generations_of_one_job_are_two_holdings() -> None:
    owned = Owned(["default"])
    newer = Entry.of(ENTRY.id, 2, 2)

    take(owned)
    take(owned, newer)

    assert owned.listed("default") == [ENTRY.raw, newer.raw]


def test_what_is_fetched_and_not_started_is_listed() -> None:
    owned = Owned(["default"])

    take(owned)

    assert owned.listed("default") == [ENTRY.raw]


async def test_a_run_whose_task_is_gone_is_not_listed_and_may_be_taken_anew() -> None:
    owned = Owned(["default"])
    zombie = take(owned)
    zombie.task = await ended_task()

    assert owned.listed("default") == []
    anew = take(owned)

    assert anew is not zombie
    assert owned.find("default", ENTRY.raw) is anew


async def test_a_run_that_ended_and_is_not_settled_yet_is_listed() -> None:
    owned = Owned(["default"])
    holding = take(owned)
    holding.task = await ended_task()
    holding.is_settling = True

    assert owned.listed("default") == [ENTRY.raw]
    assert owned.take("default", ENTRY) is None


async def test_a_stale_holding_does_not_drop_the_one_that_came_after_it() -> None:
    owned = Owned(["default"])
    zombie = take(owned)
    zombie.task = await ended_task()
    anew = take(owned)

    owned.drop(zombie)

    assert owned.find("default", ENTRY.raw) is anew


def test_queues_are_kept_apart() -> None:
    owned = Owned(["default", "mail"])

    take(owned)

    assert owned.listed("mail") == []
    assert owned.find("mail", ENTRY.raw) is None


def test_garbage_is_never_found() -> None:
    assert Owned(["default"]).find("default", b"\xff:1:2") is None
