"""Redis URLs: one server, the master that Sentinels name, or a cluster.

Invariant: what a URL says and jobq cannot honour is refused with a sentence, before anything connects. No I/O.
Called by client. Calls nothing.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import redis
from redis.connection import parse_url

from ..errors import ConfigurationError

Kind = Literal["server", "sentinel", "cluster"]
Host = tuple[str, int]

_SCHEMES: dict[str, tuple[Kind, bool]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "unix": ("server", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_PORTS: dict[Kind, int] = {"server": 6379, "sentinel": 26379, "cluster": 6379}
_REFUSED = {
    "protocol": "it changes the shape of replies",
    "decode_responses": "replies are bytes",
    "socket_timeout": "jobq has its own deadlines",
}
_ENCODE = "percent-encode what is special in its password: @ : / ? # [ ] %"
_NOT_FOR_URLS = {"host", "port", "unix_socket_path", "retry", "connection_pool", "ssl"}
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """What a URL says."""

    kind: Kind
    url: str = field(repr=False)
    hosts: tuple[Host, ...] = ()
    """Sentinels, or nodes of a cluster."""
    service: str = ""
    """The name under which Sentinels know the master."""
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    """For the connections to Redis itself, as redis-py's constructor takes them."""
    sentinel_options: dict[str, Any] = field(default_factory=dict, repr=False)


def read(url: str) -> RedisUrl:
    """Take a URL apart. Raises ConfigurationError."""
    scheme, separator, rest = url.strip().partition("://")
    scheme = scheme.lower()
    if scheme not in _SCHEMES or not separator:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        found = f", not {scheme}://" if separator else ""
        raise ConfigurationError(f"the Redis URL must begin with one of {known}{found}")
    # Not by urlsplit: it takes several hosts for one, refuses some lists of IPv6 addresses, and quotes passwords.
    before, _, words = rest.partition("?")
    netloc, _, path = before.partition("/")
    query = parse_qs(words.partition("#")[0], keep_blank_values=True)
    for name in _REFUSED.keys() & query.keys():
        raise ConfigurationError(f"take `{name}` out of the Redis URL: {_REFUSED[name]}")
    kind, is_encrypted = _SCHEMES[scheme]
    if kind == "server":
        try:
            parse_url(url)  # type: ignore[no-untyped-call]
        except ValueError:  # which may quote half a password
            raise ConfigurationError(f"the Redis URL cannot be read: check its numbers, and {_ENCODE}") from None
        return RedisUrl(kind, url)
    if "#" in rest or "@" in path or "@" in words.partition("=")[0]:
        raise ConfigurationError(f"the Redis URL cannot be read: {_ENCODE}")
    login, _, listed = netloc.rpartition("@")
    hosts = tuple(_host(host, _PORTS[kind]) for host in listed.split(","))
    path = unquote(path).strip("/")
    service, database = _service_and_database(path) if kind == "sentinel" else ("", _no_database(path))
    sentinel = {name.removeprefix("sentinel_"): query.pop(name)[0] for name in _SENTINEL_OPTIONS if name in query}
    if sentinel and kind == "cluster":
        raise ConfigurationError("take `sentinel_...` out of the Redis URL: a cluster has no Sentinels")
    options = _options(f"redis://localhost?{urlencode(query, doseq=True)}") | _login(login)
    if kind == "cluster" and options.pop("db", 0):
        raise ConfigurationError("take `db` out of the Redis URL: a cluster has no databases but 0")
    if is_encrypted:
        options["ssl"] = True
    return RedisUrl(
        kind,
        url,
        hosts=hosts,
        service=service,
        options=({"db": database} | options) if kind == "sentinel" else options,
        # The certificates are those of one deployment.
        sentinel_options=sentinel | {name: value for name, value in options.items() if name.startswith("ssl")},
    )


def _service_and_database(path: str) -> tuple[str, int]:
    service, _, database = path.partition("/")
    if not service:
        raise ConfigurationError(
            "the Redis URL names no service: redis+sentinel://host:26379,host:26379/SERVICE, as in the Sentinels' "
            "`sentinel monitor SERVICE ...`"
        )
    if database and not database.isdecimal():
        raise ConfigurationError(f"the database in the Redis URL must be a number, not {database!r}")
    return service, int(database or 0)


def _no_database(path: str) -> int:
    if path not in ("", "0"):
        raise ConfigurationError(f"take /{path} out of the Redis URL: a cluster has no databases but 0, and no service")
    return 0


def _host(text: str, port: int) -> Host:
    try:
        parts = urlsplit(f"//{text.strip()}")
        if not parts.hostname:
            raise ConfigurationError("the Redis URL names no host, or has a comma too many: host:port,host:port")
        return parts.hostname, parts.port or port
    except ValueError:
        raise ConfigurationError(f"the Redis URL names a host wrongly: host:port,host:port; {_ENCODE}") from None


def _login(text: str) -> dict[str, Any]:
    user, _, password = text.partition(":")
    return {name: unquote(word) for name, word in (("username", user), ("password", password)) if word}


def _options(url: str) -> dict[str, Any]:
    """The query, as redis-py reads that of one server."""
    try:
        options: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ConfigurationError(f"the Redis URL: {error}") from None
    del options["host"]
    known = inspect.signature(redis.Redis.__init__).parameters.keys() - _NOT_FOR_URLS
    if strangers := options.keys() - known:
        raise ConfigurationError(f"take `{min(strangers)}` out of the Redis URL: there is no such option")
    return options
