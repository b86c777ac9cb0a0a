"""What no log line, no output and no `last_error` may carry: tests plant it, and every test looks for it.

Invariant: what the package logs is looked at wherever it goes, tracebacks included; what tests log is not. Called by
conftest and commands.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.engine import make_url

import jobq

DATABASE_PASSWORD = "password-of-the-database"
ROLE_PASSWORD = "password-of-a-role"
ARGUMENT = "argument-that-nobody-may-see"
PLANTED = (DATABASE_PASSWORD, ROLE_PASSWORD, ARGUMENT)

_PACKAGE = str(Path(jobq.__file__).parent)


def found_in(text: str) -> list[str]:
    """Which of the planted secrets a text carries."""
    return [secret for secret in PLANTED if secret in text]


def with_password(database_url: str) -> str:
    """The URL with the planted password, unless it has one: servers of ours ask for none."""
    url = make_url(database_url)
    return database_url if url.password else url.set(password=DATABASE_PASSWORD).render_as_string(hide_password=False)


class Watch(logging.Handler):
    """Collects the lines of the package that carry a secret."""

    def __init__(self) -> None:
        super().__init__()
        self.leaks: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not record.pathname.startswith(_PACKAGE):
            return
        error = record.exc_info[1] if record.exc_info else None
        line = f"{record.getMessage()} {getattr(record, 'fields', '')} {''.join(traceback.format_exception(error))}"
        self.leaks += [f"{secret!r} in: {line}" for secret in found_in(line)]


@contextmanager
def watched() -> Iterator[Watch]:
    """Look at every line that is logged in the block."""
    watch = Watch()
    logger = logging.getLogger("jobq")
    logger.addHandler(watch)
    try:
        yield watch
    finally:
        logger.removeHandler(watch)
