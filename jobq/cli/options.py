"""The options that several commands share, and the application that they are about.

Precedence: command line, environment, `[tool.jobq]` of ./pyproject.toml, default. What the application says
in its code stands above all of them, since its web processes read nothing else; a difference is reported.
Invariant: nothing connects here. Called by the commands. Calls app, migrate, logs.
"""

from __future__ import annotations

import functools
import re
import sys
import tomllib
import traceback
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import click

from . import logs
from .failures import POSTGRESQL, REDIS, AppImportError
from .masking import mask

if TYPE_CHECKING:
    from ..app import JobQ

__all__ = [
    "REDIS_SCHEMES",
    "SIZE",
    "Url",
    "app_argument",
    "app_option",
    "database_url_option",
    "from_pyproject",
    "load_app",
    "logging_options",
    "mask",
    "names_database",
    "open_app",
    "redis_url_option",
    "schema_option",
    "split_spec",
]

T = TypeVar("T")


def from_pyproject(name: str) -> Callable[[], Any]:
    """Return a default for an option: `name` in `[tool.jobq]` of ./pyproject.toml, read when it is needed."""

    def read() -> Any:
        try:
            document = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise click.UsageError(f"./pyproject.toml cannot be read: {error}") from error
        settings = document.get("tool", {}).get("jobq", {})
        return settings.get(name, settings.get(name.replace("_", "-")))

    return read


class Url(click.ParamType):  # type: ignore[type-arg]  # before click 8.4 it takes none
    """A URL of one of `schemes`. Noted under `key`, masked, for the sentence of a connection that fails."""

    name = "url"

    def __init__(self, key: str, *schemes: str):
        self._key = key
        self._schemes = schemes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        scheme, separator, _ = str(value).partition("://")
        if not separator or scheme not in self._schemes:
            # The value is not repeated: without its scheme, nothing says where in it the password is.
            self.fail(f"a URL must begin with {' or '.join(f'{scheme}://' for scheme in self._schemes)}", param, ctx)
        if ctx is not None:
            ctx.meta[self._key] = mask(str(value))
        return str(value)


class _Schema(click.ParamType):  # type: ignore[type-arg]  # before click 8.4 it takes none
    name = "schema"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ..errors import ConfigurationError
        from ..migrate import checked_schema

        try:
            return checked_schema(str(value))
        except ConfigurationError as error:
            self.fail(str(error), param, ctx)


class _Size(click.ParamType):  # type: ignore[type-arg]  # before click 8.4 it takes none
    """Bytes, as 536870912, 512M, 1.5G or 1GiB; K, M and G count in 1024s."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)(?:i?B)?", str(value), re.IGNORECASE)
        size = int(float(found[1]) * 1024 ** " KMG".index(found[2].upper() or " ")) if found else 0
        if size < 1:
            self.fail(f"{value!r} is no size: write bytes, or a number with K, M or G, like 512M or 1.5G", param, ctx)
        return size


SIZE = _Size()

REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")

app_argument = click.argument("app", required=False, envvar="JOBQ_APP", default=from_pyproject("app"))
app_option = click.option(
    "--app",
    metavar="APP",
    envvar="JOBQ_APP",
    show_envvar=True,
    default=from_pyproject("app"),
    help="Take database and schema from this application, module:attribute.",
)
database_url_option = click.option(
    "--database-url",
    type=Url(POSTGRESQL, "postgresql", "postgresql+asyncpg", "postgres"),
    envvar="JOBQ_DATABASE_URL",
    show_envvar=True,
    default=from_pyproject("database_url"),
    help="Where the tables are: postgresql://...",
)
redis_url_option = click.option(
    "--redis-url",
    type=Url(REDIS, *REDIS_SCHEMES),
    envvar="JOBQ_REDIS_URL",
    show_envvar=True,
    default=from_pyproject("redis_url"),
    help="Redis or Valkey: redis://...",
)
schema_option = click.option(
    "--schema",
    type=_Schema(),
    envvar="JOBQ_SCHEMA",
    show_envvar=True,
    default=from_pyproject("schema"),
    help="The schema of the tables (default jobq).",
)


def logging_options(command: Callable[..., T]) -> Callable[..., T]:
    """Give a command --log-format and --log-level, and set up logging before it starts."""

    @click.option(
        "--log-format",
        type=click.Choice(["auto", "text", "json"]),
        envvar="JOBQ_LOG_FORMAT",
        show_envvar=True,
        default="text",
        show_default=True,
        help="auto: text on a terminal, else json.",
    )
    @click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        envvar="JOBQ_LOG_LEVEL",
        show_envvar=True,
        default="info",
        show_default=True,
    )
    @functools.wraps(command)
    def with_logging(*args: Any, log_format: str, log_level: str, **options: Any) -> T:
        logs.set_up(log_format, log_level)
        return command(*args, **options)

    return with_logging


def split_spec(spec: str | None) -> tuple[str, str]:
    """Split `module:attribute`. Raises AppImportError, or UsageError when no application was named."""
    if spec is None:
        raise click.UsageError(
            "which application? Give APP as module:attribute, or set JOBQ_APP, or app in [tool.jobq] of pyproject.toml"
        )
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise AppImportError(f"{spec!r} is no application: write it as module:attribute, like shop.jobs:jobs")
    return module_name, attribute


def load_app(spec: str | None) -> JobQ:
    """Import `module:attribute`, with the working directory on the path. Raises AppImportError."""
    from ..app import JobQ

    module_name, attribute = split_spec(spec)
    module = _import(module_name)
    names = [name for name, value in vars(module).items() if isinstance(value, JobQ)]
    hint = f"; its JobQ is {module_name}:{names[0]}" if names else f"; no JobQ is made in {module_name}"
    try:
        app = attrgetter(attribute)(module)
    except AttributeError as error:
        raise AppImportError(f"{module_name} has no {attribute!r}{hint}") from error
    if not isinstance(app, JobQ):
        raise AppImportError(f"{spec} is no JobQ but of type {type(app).__name__}{hint}")
    return app


def open_app(
    spec: str | None,
    *,
    database_url: str | None = None,
    redis_url: str | None = None,
    schema: str | None = None,
) -> JobQ:
    """Import an application and give it the URLs that its code leaves out.

    Says on stderr what is not used because the code says otherwise.
    """
    jobs = load_app(spec)
    settings = (
        ("database", "--database-url or JOBQ_DATABASE_URL", _database_of(jobs), database_url, POSTGRESQL),
        ("redis", "--redis-url or JOBQ_REDIS_URL", jobs.given_redis, redis_url, REDIS),
        ("schema", "--schema or JOBQ_SCHEMA", jobs.schema, schema, "schema"),
    )
    for name, options, in_code, given, key in settings:
        if in_code is None:
            continue
        click.get_current_context().meta[key] = mask(in_code)
        if given is not None and _place(in_code) != _place(given):
            unused = f"{mask(given)} of {options} is not used"
            click.echo(f"{spec} sets {name} in its code to {mask(in_code)}: {unused}", err=True)
    jobs.connect_to(database=database_url, redis=redis_url)
    return jobs


def names_database(jobs: JobQ, url: str | None) -> bool:
    """Tell whether this URL leads to the application's database."""
    found = _database_of(jobs)
    return found is not None and url is not None and _place(found) == _place(url)


def _database_of(jobs: JobQ) -> str | None:
    """Where the code of an application says its database is; None when it does not, or not in words."""
    if jobs.given_database is None or isinstance(jobs.given_database, str):
        return jobs.given_database
    url = jobs.database.engine.url
    return url.render_as_string(hide_password=False) if url.host or url.database or url.query else None


def _place(url: str) -> tuple[object, ...]:
    """What two URLs of one place have in common: not the driver, not who logs in, not how it is quoted."""
    parts = urlsplit(url)
    return (parts.netloc.rpartition("@")[2], parts.path, *sorted(parse_qsl(parts.query)))


def _import(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise AppImportError(f"no module {error.name!r} here or where Python looks for modules") from error
        raise AppImportError(f"{name} cannot be imported: {error}{_line_of(error)}") from error
    except Exception as error:
        raise AppImportError(f"{name} cannot be imported: {type(error).__name__}: {error}{_line_of(error)}") from error


def _line_of(error: Exception) -> str:
    """Where in the application an import failed, unless the error's own words say it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    if isinstance(error, SyntaxError) or frames[1:] == []:
        return ""
    file = frames[-1].filename.removeprefix(f"{Path.cwd()}/")
    return f" ({file}, line {frames[-1].lineno})"
