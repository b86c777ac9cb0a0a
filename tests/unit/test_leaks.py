"""tests.leaks: what a test leaves behind is named, and put back where a block says so."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.leaks import Surroundings, process_kept


@contextmanager
def folder(path: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    yield
    os.chdir(before)


@contextmanager
def variable(_: Path) -> Iterator[None]:
    os.environ["LEFT"] = "1"
    yield
    del os.environ["LEFT"]


@contextmanager
def path(path: Path) -> Iterator[None]:
    sys.path.append(str(path))
    yield
    sys.path.remove(str(path))


@contextmanager
def module(path: Path) -> Iterator[None]:
    (path / "left").mkdir()  # without an __init__.py
    (path / "left" / "behind.py").touch()
    sys.path.append(str(path))
    __import__("left.behind")
    sys.path.remove(str(path))
    yield
    del sys.modules["left"], sys.modules["left.behind"]


@contextmanager
def handler(_: Path) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGUSR2, before)


@contextmanager
def logger(_: Path) -> Iterator[None]:
    handler = logging.StreamHandler()
    logging.root.addHandler(handler)
    yield
    logging.root.removeHandler(handler)


@contextmanager
def thread(_: Path) -> Iterator[None]:
    ended = threading.Event()
    running = threading.Thread(target=ended.wait, name="left")
    running.start()
    yield
    ended.set()
    running.join()


@pytest.mark.parametrize(
    ("leave", "named"),
    [
        (folder, "the working directory is /"),
        (variable, "LEFT in os.environ"),
        (path, "sys.path is ["),
        (module, "the module left"),
        (handler, "a handler of SIGUSR2"),
        (logger, "the logger root: "),
        (thread, "a running <Thread(left, "),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_left_behind_is_named_until_it_is_gone(leave: Callable, named: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tests.leaks.GRACE_S", 0.05)
    before = Surroundings.now()

    with leave(tmp_path):
        assert before.left_behind()[0].startswith(named)

    assert before.left_behind() == []


def test_a_block_puts_logging_and_signals_back() -> None:
    before = Surroundings.now()

    with process_kept():
        logging.basicConfig(level=logging.CRITICAL, force=True)
        logging.getLogger("asyncio").disabled = True
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        assert len(before.left_behind()) == 3

    assert before.left_behind() == []
