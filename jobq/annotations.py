"""What a function's annotations mean: names in them are looked up where the function was defined.

Invariant: resolves only what was asked for, so that one odd annotation does not spoil another's meaning. Called by
task and step. Calls nothing.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable
from typing import Any


def resolved(function: Callable[..., Any], annotations: dict[str, Any]) -> dict[str, Any]:
    """Some of `function`'s annotations as types. Raises NameError, TypeError or SyntaxError."""
    shape = type("parameters", (), {"__annotations__": annotations})
    names = dict(getattr(function, "__globals__", {}))
    return typing.get_type_hints(shape, globalns=names, localns=_closure(function), include_extras=True)


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    found = {}
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that is not assigned yet
            found[name] = cell.cell_contents
    return found
