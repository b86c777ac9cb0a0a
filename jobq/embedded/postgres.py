"""The embedded PostgreSQL: making its data directory, its settings, its readiness.

Invariant: a data directory is complete or is made again. Called by `jobq.embedded`.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path
from typing import ClassVar

from jobq.embedded.directory import make_directory
from jobq.embedded.server import Server, StopSignals, server_environment
from jobq.errors import ConfigurationError

PORT = "5432"  # of no TCP socket: PostgreSQL puts it into the name of the unix one


class Postgres(Server):
    """PostgreSQL on a unix socket, superuser `postgres`, no password: only the directory's owner gets in."""

    name = "postgres"
    stop_signals: ClassVar[StopSignals] = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}

    def _prepare(self, lock: int) -> None:
        if self.data.exists():
            return
        unfinished = self.data.with_suffix(".new")
        if unfinished.exists():  # of an initdb that was killed
            shutil.rmtree(unfinished)
        make_directory(unfinished, self._account)
        command = [
            str(self._program.path.with_name("initdb")),
            f"--pgdata={unfinished}",
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-locale",
            "--no-instructions",
            *([] if self._durable else ["--no-sync"]),
        ]
        made = subprocess.run(  # noqa: S603
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env=server_environment(),
            pass_fds=(self._run.lock, lock),
            start_new_session=True,
            **self._account.drop_arguments(),
        )
        if made.returncode != 0:
            raise ConfigurationError(f"PostgreSQL could not make its data directory: {made.stderr.strip()}")
        # Crash here, or before: made again. After the rename it is complete.
        unfinished.rename(self.data)

    def _command(self, config: dict[str, str]) -> list[str]:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._run.path),
            "unix_socket_permissions": "0700",
            "port": PORT,
            "max_connections": "200",
            "max_prepared_transactions": "10",
            "fsync": "on" if self._durable else "off",
            "full_page_writes": "on" if self._durable else "off",
            # In both modes: a kill loses nothing that was committed.
            "synchronous_commit": "on",
            "timezone": "UTC",
            "log_timezone": "UTC",
        } | config
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [str(self._program.path), "-D", str(self.data), *options]

    def _is_ready(self) -> bool:
        return is_postmaster_ready(self.data / "postmaster.pid", self._pid)


def is_postmaster_ready(pid_file: Path, pid: int) -> bool:
    """Tell whether the postmaster of this pid accepts connections.

    The file of a killed one still says "ready": that counts only with our own child's pid in its first line.
    """
    try:
        lines = pid_file.read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"
