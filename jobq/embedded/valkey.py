"""The embedded Valkey, or Redis: its settings, its readiness. Called by `jobq.embedded`."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import ClassVar

from jobq.embedded.directory import make_directory
from jobq.embedded.server import Server, StopSignals


class Valkey(Server):
    """Valkey, or Redis, on a unix socket; durable means an append-only file, synced every second."""

    name = "valkey"
    stop_signals: ClassVar[StopSignals] = {"fast": signal.SIGTERM, "immediate": signal.SIGKILL}

    @property
    def socket(self) -> Path:
        return self._run.path / "valkey.sock"

    def _prepare(self, lock: int) -> None:
        make_directory(self.data, self._account)

    def _command(self, config: dict[str, str]) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.data),
            "daemonize": "no",
            "save": "",
            "appendonly": "yes" if self._durable else "no",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
        } | config
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return [str(self._program.path), *options]

    def _is_ready(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5.0)
            try:
                connection.connect(str(self.socket))
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")  # -LOADING while it reads its file
            except OSError:
                return False
