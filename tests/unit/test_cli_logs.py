"""jobq.cli.logs: what a log line looks like."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from uuid import UUID

import pytest

from jobq.cli import logs

log = logging.getLogger("jobq.worker")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    root, alembic = logging.getLogger(), logging.getLogger("alembic")
    before = root.handlers[:], root.level, alembic.level
    root.handlers[:] = []
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    alembic.setLevel(before[2])


def line(log_format: str, write: Callable[[], None], stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    logs.set_up(log_format, "info", stream)
    write()
    return stream.getvalue()


def test_a_text_line_has_time_level_phrase_and_fields():
    ready = line("text", lambda: log.info("worker ready", extra={"fields": {"slots": 100, "tls": None}}))

    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} info  worker ready        slots=100 tls=null\n", ready)


@pytest.mark.parametrize(
    ("log_format", "shown"),
    [("text", f" [{os.getpid()}] info  "), ("json", f'"pid": {os.getpid()},')],
    ids=["text", "json"],
)
def test_a_line_says_its_process_where_there_are_several(log_format, shown, monkeypatch):
    assert shown not in line(log_format, lambda: log.info("worker ready"))

    monkeypatch.setenv(logs.PID_VARIABLE, "1")

    assert shown in line(log_format, lambda: log.info("worker ready"))


def test_a_text_line_without_fields_ends_with_its_phrase():
    assert line("text", lambda: log.warning("relay behind by %d", 3)).endswith(" warn  relay behind by 3\n")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("mail", "mail"),
        (["mail", "stock"], "mail,stock"),
        (True, "true"),
        (1.5, "1.5"),
        (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        ("två ord", '"två ord"'),
        ('say "no"', '"say \\"no\\""'),
        ("a=b", '"a=b"'),
        ("", '""'),
        ("two\nlines", '"two\\nlines"'),
        ("\x1b[2J", '"\\u001b[2J"'),
        ("\x9b2J", '"\\u009b2J"'),
        ("redis://:secret@h/0", "redis://:***@h/0"),
    ],
)
def test_a_value_is_bare_where_it_can_be_and_quoted_where_it_must(value, shown):
    assert line("text", lambda: log.info("x", extra={"fields": {"field": value}})).endswith(f" field={shown}\n")


def test_a_phrase_of_several_lines_stays_on_one():
    assert "first\\nsecond" in line("text", lambda: log.info("first\nsecond"))


def test_a_stack_is_shown_below_its_line_as_a_traceback_is_and_moves_no_cursor():
    stack = '  File "shop.py", line 9, in block\n    time.sleep("\x1b[2J")\n'

    written = line(
        "text", lambda: log.warning("event loop blocked", extra={"fields": {"stack": stack, "still_s": 1.0}})
    )

    first, *below = written.splitlines()
    assert first.endswith("warn  event loop blocked  still_s=1.0")
    assert below[0] == '  File "shop.py", line 9, in block'
    assert len(below) == 2
    assert "\x1b" not in below[1]


def test_a_json_line_carries_the_same_keys():
    fields = {"queues": ["mail"], "job": UUID(int=7), "level": "gold", "url": "x"}

    written = json.loads(line("json", lambda: log.error("job dead", extra={"fields": fields})))

    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", written.pop("time"))
    assert written == {
        "level": "error",
        "logger": "jobq.worker",
        "message": "job dead",
        "queues": ["mail"],
        "job": "00000000-0000-0000-0000-000000000007",
        "level_": "gold",
        "url": "x",
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_traceback_is_shown_without_the_passwords_in_it(log_format):
    def fail() -> None:
        try:
            raise ValueError("postgresql://me:secret@host/db")
        except ValueError:
            log.exception("job failed")

    written = line(log_format, fail)

    assert "Traceback" in written
    assert "postgresql://me:***@host/db" in written
    assert "secret" not in written
    assert log_format == "text" or json.loads(written)["traceback"].startswith("Traceback")


def _fail() -> None:
    try:
        raise ValueError("\x1b[2J\x9b31m\u202e of redis://u:hunter2@h")
    except ValueError:
        log.exception("job dead", extra={"fields": {"worker": "\x9b2J\u202e", "urls": ["redis://u:hunter2@h"], "n": 1}})


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_neither_an_exception_nor_a_field_moves_a_cursor_or_tells_a_password(log_format):
    written = line(log_format, _fail)

    assert all(part.isprintable() for part in written.split("\n"))
    assert "hunter2" not in written
    assert "redis://u:***@h" in written


@pytest.mark.parametrize(
    ("log_format", "stream", "is_json"),
    [
        ("auto", io.StringIO, True),
        ("auto", Terminal, False),
        ("json", Terminal, True),
        ("text", io.StringIO, False),
    ],
)
def test_auto_is_text_on_a_terminal_and_json_elsewhere(log_format, stream, is_json):
    assert line(log_format, lambda: log.info("x"), stream()).startswith("{") is is_json


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = line("text", lambda: log.info("x"), Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    plain = line("text", lambda: log.info("x"), Terminal())

    assert "\x1b[32minfo" in coloured
    assert "\x1b" not in plain + line("text", lambda: log.info("x"))


def test_the_level_decides_what_is_written_and_alembic_speaks_only_of_trouble():
    stream = io.StringIO()
    logs.set_up("text", "info", stream)

    log.debug("hidden")
    logging.getLogger("alembic.runtime.migration").info("hidden")
    logging.getLogger("shop").info("shown")

    assert "hidden" not in stream.getvalue()
    assert "shown" in stream.getvalue()
