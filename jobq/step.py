"""The parts of `ctx.step()`: a step's name, what its function returns, and calling it so that its end is not missed.

Invariant: what cannot be kept is refused before the function runs, wherever its annotation tells; and what a plain
function has begun in its thread is waited for. No I/O. Called by context. Calls codec and annotations.
"""

from __future__ import annotations

import asyncio
import collections.abc
import inspect
import time
import typing
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, TypeVar

import anyio.to_thread

from .annotations import resolved
from .codec import ResultCodec
from .errors import ConfigurationError

T = TypeVar("T")

_LONGEST_NAME = 128
_AWAITABLES = (collections.abc.Awaitable, collections.abc.Coroutine)


def refuse_bad_name(owner: str, name: str) -> None:
    """Raises ConfigurationError."""
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise ConfigurationError(f"{owner}: the name of a step is 1 to {_LONGEST_NAME} printable characters")


def codec_of(owner: str, function: Callable[..., Any]) -> ResultCodec:
    """The codec for what a function says that it returns. Raises ConfigurationError."""
    try:
        return ResultCodec(_return_type(function))
    except (NameError, TypeError, SyntaxError, ConfigurationError) as error:
        raise ConfigurationError(
            f"{owner}: {error}. Nothing has been called; wrap the call in a function of your own that returns "
            "plain JSON, a dataclass or a pydantic model, and says so"
        ) from error


async def called(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, asyncio.CancelledError | None]:
    """Call a step's function, a plain one in a thread; returns its result, and the cancellation that came meanwhile.

    A thread cannot be stopped: a run that is cancelled waits for its end, so that its result can be kept.
    """
    if _is_async(function):
        return await function(*args, **kwargs), None
    result, cancelled = await to_the_end(anyio.to_thread.run_sync(partial(function, *args, **kwargs)))
    if inspect.isawaitable(result):  # a lambda, say, that has made a coroutine
        if cancelled is not None:
            if inspect.iscoroutine(result):
                result.close()
            raise cancelled
        result = await result
    return result, cancelled


async def to_the_end(
    work: Coroutine[Any, Any, T], *, patience_s: Callable[[], float | None] = lambda: None
) -> tuple[T, asyncio.CancelledError | None]:
    """Let work end before a cancellation goes on, which the caller is to raise then.

    `patience_s` is asked at the first one: how long the work may take from there on, if not for ever.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    ends_at: float | None = None
    while not task.done():
        try:
            left = None if ends_at is None else max(ends_at - time.monotonic(), 0.0)
            done, _ = await asyncio.wait({task}, timeout=left)
            if not done and task.cancel():
                ends_at = None
        except asyncio.CancelledError as error:
            if cancelled is None and (patience := patience_s()) is not None:
                ends_at = time.monotonic() + patience
            cancelled = error
    if cancelled is not None and task.cancelled():
        raise cancelled
    return task.result(), cancelled


def _return_type(function: Callable[..., Any]) -> Any:
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, type):
        return function
    function = inspect.unwrap(function)
    if not hasattr(function, "__annotations__"):
        function = getattr(type(function), "__call__", function)  # noqa: B004
    annotations = inspect.get_annotations(function) if hasattr(function, "__annotations__") else {}
    if "return" not in annotations:
        return Any
    found = resolved(function, {"return": annotations["return"]})["return"]
    return typing.get_args(found)[-1] if typing.get_origin(found) in _AWAITABLES else found


def _is_async(function: Callable[..., Any]) -> bool:
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
