"""A PgBouncer of the test's own in front of its database, where the system has one."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy.engine import make_url

from jobq.embedded.account import Account
from tests.waiting import until

PROGRAM = shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")


@asynccontextmanager
async def pgbouncer(database_url: str, *, mode: str = "transaction", sessions: int = 2) -> AsyncIterator[str]:
    """Start it with so many sessions on the server; yields its URL."""
    assert PROGRAM is not None
    server = make_url(database_url)._replace(password=None)  # the planted one, for which it would want a user
    account = Account.choose()  # it refuses to run as root, as PostgreSQL does
    with tempfile.TemporaryDirectory(prefix="jobq-", dir="/tmp") as name:
        folder = Path(name)
        account.own(folder)
        settings = folder / "pgbouncer.ini"
        settings.write_text(f"""
[databases]
{server.database} = host={server.query.get("host", server.host)} port={server.port or 5432} user={server.username}
{f"    password={server.password}" if server.password else ""}
[pgbouncer]
listen_addr =
unix_socket_dir = {folder}
auth_type = any
pool_mode = {mode}
default_pool_size = {sessions}
max_client_conn = 500
""")
        process = subprocess.Popen(  # noqa: ASYNC220  it is started, not waited for
            [PROGRAM, "--quiet", str(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            **account.drop_arguments(),
        )
        try:
            await until(lambda: listens(folder / ".s.PGSQL.6432"), "PgBouncer listens")
            yield f"postgresql://{server.username}@/{server.database}?host={folder}&port=6432"
        finally:
            process.kill()
            process.wait()


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
