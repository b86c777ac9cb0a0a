"""The revision in an application's own alembic chain that brings jobq's tables to this release.

Invariant: written once for each release that has new tables, through the application's own template, after its
one head. Called by cli. Calls versions; alembic is loaded when it is used.
"""

from __future__ import annotations

import ast
import inspect
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigurationError
from .versions import BASE, SCHEMA, heads, position, revisions

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory


class ChainFile(NamedTuple):
    """A revision of the application's that calls `jobq.migrate.upgrade`."""

    path: Path
    to: str
    is_new: bool


def write(config_file: Path, *, schema: str = SCHEMA) -> ChainFile:
    """Write the revision that brings the tables to this release, unless the chain has it. Raises ConfigurationError.

    `config_file` is an alembic.ini. Nothing connects: env.py is not run.
    """
    from alembic.util import CommandError

    try:
        directory = _directory(config_file)
        last = max(_files(directory, schema), key=lambda file: position(file.to, schema), default=None)
        if last is not None and last.to in heads():
            return last
        return _written(directory, BASE if last is None else last.to, schema)
    except CommandError as error:
        raise ConfigurationError(f"{config_file}: {error}") from error


def _directory(config_file: Path) -> ScriptDirectory:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    options: dict[str, Any] = {"cmd_opts": Namespace(quiet=True)}
    if "toml_file" in inspect.signature(Config).parameters:  # alembic 1.16 and later
        options["toml_file"] = config_file.with_name("pyproject.toml")
    return ScriptDirectory.from_config(Config(config_file, **options))


def _written(directory: ScriptDirectory, since: str, schema: str) -> ChainFile:
    from alembic.util import CommandError, rev_id

    tips = directory.get_heads()
    if len(tips) > 1:
        raise ConfigurationError(
            f"the chain has {len(tips)} heads ({', '.join(tips)}): bring them together with `alembic merge heads` first"
        )
    (to,) = heads()
    named = "" if schema == SCHEMA else f', schema="{schema}"'
    by_hand = f'write a revision yourself that calls jobq.migrate.upgrade(op, to="{to}"{named})'
    try:
        script = directory.generate_revision(
            rev_id(),
            f"{'create' if since == BASE else 'upgrade'} the tables of jobq",
            imports="from jobq import migrate",
            upgrades=f'migrate.upgrade(op, since="{since}", to="{to}"{named})',
            downgrades=f'migrate.downgrade(op, since="{to}", to="{since}"{named})',
        )
    except CommandError as error:
        raise ConfigurationError(f"alembic could not make the file ({error}): {by_hand}") from error
    assert script is not None
    path = Path(script.path)
    if to not in _targets(path, schema):
        path.unlink()
        template = Path(directory.dir, "script.py.mako")
        raise ConfigurationError(f"{template} has no place for ${{imports}} and ${{upgrades}}: {by_hand}")
    return ChainFile(path, to, is_new=True)


def _files(directory: ScriptDirectory, schema: str) -> Iterator[ChainFile]:
    for script in directory.walk_revisions():
        for to in _targets(Path(script.path), schema):
            yield ChainFile(Path(script.path), to, is_new=False)


def _targets(path: Path, schema: str) -> list[str]:
    """What the calls of `migrate.upgrade(op, to=...)` in a file lead to. Read, not run, and however it is laid out."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr == "upgrade":
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            to = given.get("to", ast.unparse(call.args[1]) if len(call.args) > 1 else "")
            if given.get("schema", repr(SCHEMA)) == repr(schema):
                found += [revision for revision in revisions() if repr(revision) == to]
    return found
