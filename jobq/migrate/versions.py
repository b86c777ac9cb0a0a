"""The revisions of jobq's tables that this release knows, and what it says to tables at any other.

Invariant: a revision is the file `versions/<revision>_<words>.py`; their order is that of their names. Called by
engine and chain. Calls errors; alembic is loaded when a revision is, not before.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigurationError, SchemaMismatch

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from sqlalchemy import Connection

log = logging.getLogger(__name__)

SCHEMA = "jobq"
"""The schema of the tables where nothing else was said."""

LOCK = 0x6A6F626D
"""The first half of the migrators' advisory lock; the second is a hash of the schema."""
BASE = "base"


class Revision(NamedTuple):
    """One step in the life of the tables."""

    id: str
    after: str | None
    title: str
    drops: tuple[str, ...]
    """Tables whose rows are lost when this revision is taken back."""


def checked_schema(name: str) -> str:
    """Return `name` if it can be the schema of jobq. Raises ConfigurationError."""
    if re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name) is None:
        raise ConfigurationError(
            f"{name!r} cannot be the schema of jobq: at most 63 of a-z, 0-9 and _, and no digit first"
        )
    return name


def scripts(package: Path = Path(__file__).parents[1]) -> Path:
    """Find the revisions: inside the package where it was installed, beside it in a checkout."""
    for folder in (package / "migrations", package.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise ConfigurationError(f"jobq's migrations are missing beside {package}: install jobq again")


def revisions() -> list[str]:
    """List every revision that this release knows, oldest first, without loading any."""
    return sorted(file.name[:9] for file in (scripts() / "versions").glob("jobq_????_*.py"))


def heads() -> list[str]:
    """List the newest revisions. There is one: the chain never forks."""
    return revisions()[-1:]


def history() -> list[Revision]:
    """List every revision of this release, oldest first."""
    from alembic.script import ScriptDirectory

    directory: ScriptDirectory = ScriptDirectory.from_config(config(SCHEMA))
    found = []
    for id_ in revisions():
        script = directory.get_revision(id_)
        after = script.down_revision
        assert after is None or isinstance(after, str)
        found.append(Revision(id_, after, script.doc, script.module.DROPS))
    return found


def mismatch(found: str | None, schema: str = SCHEMA) -> str | None:
    """Say what is wrong with tables at revision `found`, and the remedy; None if this release fits them."""
    needed = revisions()[-1]
    if found == needed:
        return None
    if found is None:
        return f"the tables of jobq are missing in schema {schema!r}: run `jobq migrate upgrade`"
    if found in revisions():
        return f"the tables in schema {schema!r} are at {found}, not {needed}: run `jobq migrate upgrade`"
    return (
        f"the tables in schema {schema!r} are at {found}, and this jobq knows {needed} at most: "
        "it is older than the tables, so upgrade jobq"
    )


def named(name: str) -> str:
    """Resolve `head`, `base` or a revision's own name."""
    named = {"head": revisions()[-1], BASE: BASE, **{id_: id_ for id_ in revisions()}}
    if name not in named:
        raise ConfigurationError(f"no revision {name!r}: there are {', '.join(named)}")
    return named[name]


def position(revision: str | None, schema: str) -> int:
    """Count the revisions up to and with this one. Raises SchemaMismatch for one of a later release."""
    order = [BASE, *revisions()]
    if (revision or BASE) not in order:
        raise SchemaMismatch(mismatch(revision, schema))
    return order.index(revision or BASE)


def config(schema: str, connection: Connection | None = None, path: tuple[str, str] | None = None) -> Config:
    """Say to alembic, and through it to env.py, where the revisions are and where they go."""
    from alembic.config import Config

    def log_step(*, step: Any, **_: Any) -> None:
        phrase = "stamped" if step.is_stamp else "applied" if step.is_upgrade else "taken back"
        log.info("revision %s", phrase, extra={"fields": {"revision": step.up_revision_id, "schema": schema}})

    found = Config()
    found.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    found.attributes.update(schema=schema, connection=connection, path=path, on_apply=log_step)
    return found
