"""As whom the servers run, and what that account can reach.

Invariant: PostgreSQL never runs as root (it refuses to), and no user is added and no existing mode changed to
get there. Called by programs, directory and server.
"""

from __future__ import annotations

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypedDict

from jobq.errors import ConfigurationError

ELSEWHERE = "Or set JOBQ_DATABASE_URL and JOBQ_REDIS_URL to servers of your own."


class DropArguments(TypedDict, total=False):
    """The arguments of `subprocess` that change to another account."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True, slots=True)
class Account:
    """Who the servers run as: this process's own user, or `nobody` where this is root."""

    uid: int
    gid: int
    is_dropped: bool

    @classmethod
    def choose(cls) -> Self:
        if os.geteuid() == 0:
            return cls._unprivileged()
        try:
            pwd.getpwuid(os.geteuid())
        except KeyError:
            raise ConfigurationError(
                f"The user id {os.geteuid()} has no entry in /etc/passwd, without which PostgreSQL cannot"
                " make a database: run as a user that the system knows (in a container: no `--user`, or one"
                f" of the image's own users). {ELSEWHERE}"
            ) from None
        return cls(os.geteuid(), os.getegid(), is_dropped=False)

    @classmethod
    def _unprivileged(cls) -> Self:
        try:
            entry = pwd.getpwnam("nobody")
        except KeyError:
            raise ConfigurationError(
                "PostgreSQL refuses to run as root, and this system has no user `nobody` to run it as:"
                f" start jobq as an ordinary user. {ELSEWHERE}"
            ) from None
        return cls(entry.pw_uid, entry.pw_gid, is_dropped=True)

    def drop_arguments(self) -> DropArguments:
        """Return what makes `subprocess` start a program as this account."""
        if not self.is_dropped:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def own(self, path: Path) -> None:
        """Give a file or directory that jobq has just made to this account."""
        if not self.is_dropped:
            return
        try:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)
        except OSError as error:
            raise ConfigurationError(
                "PostgreSQL refuses to run as root, and this root may not change to another user"
                f" ({error.strerror}): start jobq as an ordinary user. {ELSEWHERE}"
            ) from error

    def can_reach(self, path: Path) -> bool:
        """Tell whether every directory above the path may be searched, and the path itself read and searched.

        Read from the mode bits alone; an access list that says more is not seen, which costs a copy at worst.
        """
        path = path.resolve()
        return self._may(path, stat.S_IROTH | stat.S_IXOTH) and all(
            self._may(parent, stat.S_IXOTH) for parent in path.parents
        )

    def _may(self, path: Path, others_bits: int) -> bool:
        if not self.is_dropped:
            return os.access(path, (os.R_OK if others_bits & stat.S_IROTH else 0) | os.X_OK)
        status = path.stat()
        bits = others_bits << 6 if status.st_uid == self.uid else others_bits
        return status.st_mode & bits == bits
