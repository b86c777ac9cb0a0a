"""Waiting for a condition, with a deadline and a message, in place of sleeping."""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

T = TypeVar("T")
POLL_S = 0.005


async def until(condition: Callable[[], T | Awaitable[T]], message: str, deadline: float = 30) -> T:
    """Return the condition's first true result, sync or async; fail with the message after `deadline` s."""
    ends_at = time.monotonic() + deadline
    while True:
        result = condition()
        if inspect.isawaitable(result):
            result = await result
        if result:
            return result
        if time.monotonic() > ends_at:
            raise AssertionError(f"After {deadline} s: not yet so that {message}")
        await anyio.sleep(POLL_S)
