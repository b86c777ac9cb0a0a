"""What a test leaves behind in its process, for the tests after it to fail of; and putting it back.

Only what a test can put back is looked at: modules of installed packages and loggers that were not there before stay.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

GRACE_S = 5.0  # for a thread that has been told to end
_KEPT = tuple({str(Path(__file__).parents[1]), *(sysconfig.get_path(of) for of in ("stdlib", "purelib", "platlib"))})


class Surroundings(NamedTuple):
    """What all tests of a process share."""

    folder: str
    environment: dict[str, str]
    path: list[str]
    modules: frozenset[str]
    signals: dict[int, Any]  # but pytest-timeout's
    loggers: dict[str, tuple[Any, ...]]
    threads: frozenset[threading.Thread]

    @classmethod
    def now(cls) -> Surroundings:
        return cls(
            os.getcwd(),
            {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
            sys.path[:],
            frozenset(sys.modules),
            {number: signal.getsignal(number) for number in signal.valid_signals() - {signal.SIGALRM}},
            {logger.name: _state(logger) for logger in _loggers()},
            frozenset(threading.enumerate()),
        )

    def left_behind(self) -> list[str]:
        """What is different now, in words."""
        self._let_threads_end()
        now = Surroundings.now()
        found = [f"the working directory is {now.folder}"] if now.folder != self.folder else []
        if now.path != self.path:
            found.append(f"sys.path is {now.path}")
        found += [f"{name} in os.environ" for name in sorted(_different(self.environment, now.environment))]
        found += [f"the module {name}" for name in sorted(now.modules - self.modules) if _is_a_test_s_own(name)]
        found += [f"a handler of {signal.Signals(number).name}" for number in _different(self.signals, now.signals)]
        for name in sorted(_different(self.loggers, now.loggers) & self.loggers.keys()):
            found.append(f"the logger {name}: {now.loggers.get(name)}, before {self.loggers[name]}")
        return found + [f"a running {thread}" for thread in now.threads - self.threads]

    def _let_threads_end(self) -> None:
        ends_at = time.monotonic() + GRACE_S
        for thread in set(threading.enumerate()) - self.threads:
            thread.join(max(0, ends_at - time.monotonic()))


@contextmanager
def logging_kept() -> Iterator[None]:
    """Let the block configure logging as a process does that is nobody else's, and put everything back."""
    before = [(logger, logger.level, logger.handlers[:], logger.propagate, logger.disabled) for logger in _loggers()]
    try:
        yield
    finally:
        for logger, level, handlers, propagate, disabled in before:
            if logger.level != level:  # setting it empties the caches of all of them
                logger.setLevel(level)
            logger.handlers[:], logger.propagate, logger.disabled = handlers, propagate, disabled


@contextmanager
def process_kept() -> Iterator[None]:
    """The same for a command, which handles signals too."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        with logging_kept():
            yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _loggers() -> Iterator[logging.Logger]:
    yield logging.root
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            yield logger


def _state(logger: logging.Logger) -> tuple[Any, ...]:
    """Its configuration, without what pytest has while a test runs and libraries add when they are imported."""
    handlers = [
        handler
        for handler in logger.handlers
        if not type(handler).__module__.startswith("_pytest.") and not isinstance(handler, logging.NullHandler)
    ]
    return (logger.level, handlers, logger.propagate, logger.disabled)


def _different(before: dict[Any, Any], after: dict[Any, Any]) -> set[Any]:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def _is_a_test_s_own(name: str) -> bool:
    """Tell whether the module is of no package that is installed, nor of this checkout."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    return file is not None and not file.startswith(_KEPT)
