"""What a worker is told from outside, and what it breaks off."""

from __future__ import annotations

import asyncio

import pytest

from jobq.worker.orders import Orders, Woken


async def waited(orders: Orders, seconds: float = 30.0, *, cleaning: asyncio.Event | None = None) -> str:
    """Wait for something that never comes; `cleaning` holds up whoever broke it off."""
    try:
        async with orders.unless_woken(seconds):
            try:
                await asyncio.Event().wait()
            finally:
                if cleaning is not None:
                    await cleaning.wait()
    except Woken:
        return "woken"
    return "through"


async def test_a_wake_up_breaks_off_what_is_waited_for() -> None:
    orders = Orders()
    waiting = asyncio.create_task(waited(orders))
    await asyncio.sleep(0)

    orders.wake()

    assert await asyncio.wait_for(waiting, 10) == "woken"


async def test_a_wake_up_before_the_wait_counts_once() -> None:
    orders = Orders()
    orders.wake()

    assert await asyncio.wait_for(waited(orders), 10) == "woken"
    assert not orders.woken.is_set()


@pytest.mark.parametrize("seconds", [30.0, 0.0])
async def test_more_wake_ups_may_come_while_what_was_broken_off_cleans_up(seconds: float) -> None:
    orders, cleaning = Orders(), asyncio.Event()
    waiting = asyncio.create_task(waited(orders, seconds, cleaning=cleaning))
    for _ in range(5):
        await asyncio.sleep(0)
        orders.wake()
    cleaning.set()

    assert await asyncio.wait_for(waiting, 10) == "woken"
    orders.wake()  # nobody waits


async def test_room_ends_a_wait_for_room_and_breaks_off_nothing_else() -> None:
    orders = Orders()
    waiting, at_bell = asyncio.create_task(orders.wait(30.0)), asyncio.create_task(waited(orders))
    await asyncio.sleep(0)

    orders.note_room()

    await asyncio.wait_for(waiting, 10)
    assert not at_bell.done()
    orders.wake()
    assert await asyncio.wait_for(at_bell, 10) == "woken"


async def test_what_comes_in_time_comes_through() -> None:
    orders = Orders()

    async with orders.unless_woken(30.0):
        await asyncio.sleep(0)

    assert not orders.woken.is_set()
