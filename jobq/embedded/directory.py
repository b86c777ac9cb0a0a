"""Where the servers live: the directory of one run, kept data directories, and the locks on both.

Invariant: a lock is inherited by every process of a server, so it is free exactly when the last of them is
gone. What is locked is in use; an unlocked `jobq-*` directory belongs to a run that was killed.
Called by `jobq.embedded`.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from jobq.embedded.account import ELSEWHERE, Account
from jobq.errors import ConfigurationError

PREFIX = "jobq-"
LOCK = "lock"
POLL_S = 0.005
# A socket's path may have 103 bytes on macOS, 107 on Linux; /jobq-12345678/.s.PGSQL.5432 are 28 of them.
LONGEST_PARENT = 103 - 28
PLAIN = re.compile(r"[A-Za-z0-9_./-]+")  # drivers split hosts at commas and colons


class RunDirectory:
    """The private directory of one run: sockets, and the data unless that is kept elsewhere.

    1. `create` sweeps what killed runs left behind and makes a new directory, locked before it has its name.
    2. The lock's descriptor, `lock`, is handed to every server.
    3. `remove` deletes the directory; the lock goes last.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.lock = lock

    @classmethod
    def create(cls, account: Account) -> RunDirectory:
        parent = _short_parent(account)
        _sweep(parent, account)
        hidden = Path(tempfile.mkdtemp(prefix="." + PREFIX, dir=parent))
        run = cls(hidden, take_lock(hidden / LOCK, wait_s=0))
        try:
            account.own(hidden)
            # A sweep looks for the name without the dot: it never sees this directory unlocked.
            run.path = hidden.rename(parent / hidden.name.removeprefix("."))
        except BaseException:
            run.remove()
            raise
        return run

    def remove(self) -> None:
        """Delete the directory and let go of its lock. May be repeated."""
        if self.lock < 0:
            return
        _delete(self.path)
        os.close(self.lock)
        self.lock = -1


def keep_directory(directory: Path, account: Account) -> Path:
    """Make a directory for data that outlives the run, or take the one that is there as it is."""
    directory = directory.absolute()
    if not directory.exists():
        directory.mkdir(mode=0o700, parents=True)
        account.own(directory)
    if not account.can_reach(directory):
        raise ConfigurationError(
            f"The user that PostgreSQL runs as (uid {account.uid}) cannot enter {directory}, or a directory"
            " above it: choose another, /var/tmp/jobq for example, or start jobq as an ordinary user."
            f" {ELSEWHERE}"
        )
    return directory


def make_directory(path: Path, account: Account) -> None:
    """Make a private directory for the account unless it is there."""
    if not path.exists():
        path.mkdir(mode=0o700)
        account.own(path)


def take_lock(path: Path, *, wait_s: float) -> int:
    """Return a descriptor that holds the lock; waits for the processes of a server that is just ending."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except PermissionError as error:
        raise ConfigurationError(
            f"{path.parent} belongs to another user, or may not be written: choose another directory."
        ) from error
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise ConfigurationError(
                    f"The servers of {path.parent} are running already: stop them, or choose another directory."
                ) from None
            time.sleep(POLL_S)
        else:
            return descriptor


def _short_parent(account: Account) -> Path:
    """The system's temporary directory, or /tmp where that one cannot hold sockets and be part of a URL."""
    parent = Path(tempfile.gettempdir()).resolve()
    is_fit = len(str(parent)) <= LONGEST_PARENT and PLAIN.fullmatch(str(parent)) and account.can_reach(parent)
    return parent if is_fit else Path("/tmp")  # noqa: S108


def _sweep(parent: Path, account: Account) -> None:
    for path in parent.glob(PREFIX + "*"):
        with suppress(OSError):  # somebody else's, or swept by another run at this moment
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid in (os.geteuid(), account.uid):
                _sweep_one(path)


def _sweep_one(path: Path) -> None:
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), (path / LOCK).lstat()):
            _delete(path)
    finally:
        os.close(descriptor)


def _delete(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    # Crash here: the lock is still there, so a later sweep knows the directory for a dead run's.
    shutil.rmtree(directory, ignore_errors=True)
