"""Looks at everything that there is to look at, in an order in which a reader can stop at the first cause.

Invariant: a store that is away is one finding, and the other one is looked at all the same.
Called by doctor. Calls host, postgresql, redis, work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ...broker.client import UNAVAILABLE
from ...errors import ConfigurationError, JobqError
from ..failures import POSTGRESQL, REDIS, explain, sqlstate
from ..stores import Stores
from . import About, Finding, Scene, is_refused, looked, refused
from .host import application, versions, zones
from .postgresql import grants, postgresql
from .redis import redis
from .work import work

if TYPE_CHECKING:
    import asyncpg

    from ...broker.client import AsyncClient

_REDIS_AWAY: tuple[type[Exception], ...] = (*UNAVAILABLE, JobqError)
"""What a Redis that is away or set up wrongly raises."""
_WORK_S = 60.0
_REDIS_RIGHTS = "ACL SETUSER of the URL's user: ~jobq:1:* +get +sscan +hgetall +llen +lrange"


async def examine(stores: Stores, concurrency: int) -> list[Finding]:
    """Look at everything."""
    findings = [versions(), zones()]
    if stores.app is not None:
        findings += application(stores.app)
    try:
        async with stores.postgresql("doctor") as connection:
            findings += await postgresql(Scene(stores, connection, concurrency))
            findings += await _redis(stores, connection)
    except Exception as error:  # noqa: BLE001  raised again unless it is of a store
        findings.append(_failed_postgresql(stores, error))
        findings += await _redis(stores, None)
    return findings


async def _redis(stores: Stores, connection: asyncpg.Connection | None) -> list[Finding]:
    """The server; and the work, where it is known which database its keys are of."""
    try:
        async with stores.redis() as client:
            findings = await redis(client)
            return findings if connection is None else findings + await _work(stores, connection, client)
    except _REDIS_AWAY as error:
        return [_failure("redis", REDIS, error)]


async def _work(stores: Stores, connection: asyncpg.Connection, client: AsyncClient) -> list[Finding]:
    try:
        looking = work(stores, connection, client)
        return await looked("workers", looking, needs=_REDIS_RIGHTS, longest_s=_WORK_S)
    except Exception as error:
        if type(error).__name__ == "ResponseError":
            return [_failure("redis", REDIS, error)]
        raise


def _failed_postgresql(stores: Stores, error: Exception) -> Finding:
    if is_refused(error):
        return refused("postgresql", error, grants(stores.schema))
    if isinstance(error, (ConfigurationError, OSError)) or sqlstate(error):
        return _failure("postgresql", POSTGRESQL, error)
    raise error


def _failure(about: About, store: str, error: Exception) -> Finding:
    meta = click.get_current_context().meta
    sentence = explain(error, {store: meta[store]} if store in meta else {}).message
    found, _, remedy = sentence.partition("; ")
    return Finding("fail", about, found, remedy)
