"""What can be said without either store: versions, time zones, the application. Called by examine. Calls app."""

from __future__ import annotations

import os
import platform
import zoneinfo
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

from ... import __version__
from ...errors import ConfigurationError
from . import Finding

if TYPE_CHECKING:
    from ...app import JobQ

_LIBRARIES = ("sqlalchemy", "asyncpg", "redis", "hiredis", "anyio", "pydantic", "alembic", "click", "uvloop")
_ANY_ZONE = "Europe/Stockholm"


def versions() -> Finding:
    libraries = [f"{name} {version}" for name in _LIBRARIES if (version := _version_of(name)) is not None]
    return Finding("ok", "versions", f"jobq {__version__}, python {platform.python_version()}, {', '.join(libraries)}")


def zones() -> Finding:
    """Slim images come without the time zones that `zoneinfo` reads."""
    named = os.environ.get("TZ", "").removeprefix(":")
    for zone in (_ANY_ZONE, named):
        # TZ may also be a rule, like CET-1CEST, or a path.
        if zone == _ANY_ZONE or zone.replace("_", "").replace("/", "").isalpha():
            try:
                zoneinfo.ZoneInfo(zone or "UTC")
            except zoneinfo.ZoneInfoNotFoundError:
                found = f"zoneinfo knows no {zone}, so tasks that use time zones fail here"
                return Finding("warn", "zones", found, "pip install tzdata, or the system's package tzdata")
    return Finding("ok", "zones", f"zoneinfo finds them{f', and TZ={named}' if named else ''}")


def application(app: JobQ) -> Iterator[Finding]:
    try:
        app.check()
    except ConfigurationError as error:
        yield Finding("fail", "tasks", str(error), "no worker starts with it")
        return
    if not app.tasks:
        yield Finding("fail", "tasks", "the application has none", "import the modules that define them beside it")
        return
    queues = sorted({task.queue for task in app.tasks.values()})
    yield Finding("ok", "tasks", f"{len(app.tasks)} in {', '.join(queues)}")


def _version_of(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
