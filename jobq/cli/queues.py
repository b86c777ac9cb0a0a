"""-q and --strict: which queues a worker serves, and in what proportion or order.

The command line, JOBQ_QUEUES and `[tool.jobq]` say the same in the same way; in pyproject.toml `queues` may also be a
list, or a table of weights. Called by run. Calls options, settings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from ..settings import HEAVIEST_QUEUE
from ..task import QUEUE_NAME
from .options import from_pyproject

T = TypeVar("T")
Queues = Mapping[str, int | None]
"""The queues to serve, in the order given, with the weight that was given."""


def queues_options(command: Callable[..., T]) -> Callable[..., T]:
    """Give a command `queues` (Queues, empty when none is named) and `strict`."""

    @click.option(
        "-q",
        "--queues",
        multiple=True,
        metavar="NAME[:WEIGHT][,...]",
        envvar="JOBQ_QUEUES",
        show_envvar=True,
        default=_queues_from_pyproject,
        show_default=False,
        callback=_parse,
        help="Serve these queues and no others (default: all that APP's tasks name). mail:5,default:3 starts 5 jobs of "
        "mail for every 3 of default while both have work, and either may use all slots while the other is empty; "
        "the weight is 1 where none is given. Priorities order the jobs within a queue. May be repeated.",
    )
    @click.option(
        "--strict/--no-strict",
        envvar="JOBQ_STRICT",
        show_envvar=True,
        default=_strict_from_pyproject,
        show_default=False,
        help="Serve the queues in the order of -q: each only while those before it are empty.",
    )
    @functools.wraps(command)
    def with_queues(*args: Any, queues: Queues, strict: bool, **options: Any) -> T:
        if strict:
            _check_order(queues)
        return command(*args, queues=queues, strict=strict, **options)

    return with_queues


def _parse(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Queues:
    queues: dict[str, int | None] = {}
    for word in (word.strip() for value in values for word in value.split(",") if word.strip()):
        name, separator, weight = word.partition(":")
        if not QUEUE_NAME.fullmatch(name):
            raise click.BadParameter(
                f"{name or word!r} is no queue: 1 to 64 of a-z, 0-9, underscore, dot, hyphen", ctx, param
            )
        given = _weight(weight) if separator else None
        if separator and given is None:
            sentence = f"{word!r}: a weight is a whole number from 1 to {HEAVIEST_QUEUE}, as in {name}:5"
            raise click.BadParameter(sentence, ctx, param)
        if queues.setdefault(name, given) != given:
            raise click.BadParameter(f"queue {name!r} is named twice, with different weights: name it once", ctx, param)
    return queues


def _weight(text: str) -> int | None:
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(HEAVIEST_QUEUE))
    return int(text) if is_number and 1 <= int(text) <= HEAVIEST_QUEUE else None


def _check_order(queues: Queues) -> None:
    if not queues:
        raise click.UsageError("--strict serves queues in the order of -q: name them, as in -q urgent,default")
    if weighted := [f"{name}:{weight}" for name, weight in queues.items() if weight is not None]:
        told = ", ".join(weighted)
        raise click.UsageError(f"--strict and weights exclude each other: drop the weights ({told}) or say --no-strict")


def _strict_from_pyproject() -> bool:
    found = from_pyproject("strict")()
    if found is None or isinstance(found, bool):
        return bool(found)
    raise click.UsageError(f"strict in [tool.jobq] of ./pyproject.toml is {found!r}: write true or false")


def _queues_from_pyproject() -> list[str]:
    found = from_pyproject("queues")()
    if isinstance(found, str):
        return [found]
    if isinstance(found, dict):
        return [f"{name}:{weight}" for name, weight in found.items()]
    if found is None or (isinstance(found, list) and all(isinstance(word, str) for word in found)):
        return found or []
    raise click.UsageError(
        f"queues in [tool.jobq] of ./pyproject.toml is {found!r}: "
        'write "mail:5,default", ["mail:5", "default"] or {mail = 5, default = 1}'
    )
