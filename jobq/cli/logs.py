"""How log lines look on stderr.

A line is a constant phrase and its fields: `log.info("worker ready", extra={"fields": {"worker": id}})` shows
as `12:00:01.204 info  worker ready        worker=7f3a`, or as one JSON object with the same keys.
Invariant: a record is one line, but for a traceback or a stack in text, and no field can move a terminal's cursor.
Called by the commands that run for long. Calls nothing.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from .masking import mask

_LEVELS = {logging.WARNING: "warn", logging.CRITICAL: "error"}
_COLORS = {"debug": "2", "info": "32", "warn": "33", "error": "31"}
_PLAIN = re.compile(r"[^\s\"=]+")

PID_VARIABLE = "JOBQ_LOG_PID"
"""Set where several processes write to one log: every line then says which of them it is of."""


def set_up(log_format: str, level: str, stream: TextIO | None = None) -> None:
    """Send every logger to `stream` (stderr) as `text`, `json`, or `auto`: text on a terminal, else json.

    Before the application is imported: where it sets up logging itself, it has the last word.
    """
    target: TextIO = stream or sys.stderr
    handler = logging.StreamHandler(target)
    pid = os.getpid() if os.environ.get(PID_VARIABLE) else None
    if log_format == "json" or (log_format == "auto" and not target.isatty()):
        handler.setFormatter(JsonFormatter(pid=pid))
    else:
        handler.setFormatter(TextFormatter(color=target.isatty() and not os.environ.get("NO_COLOR"), pid=pid))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # It narrates every step of its own; jobq.migrate says the same in one line.
    logging.getLogger("alembic").setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    """For people: local time, level, phrase, fields; the process where there are several."""

    def __init__(self, *, color: bool = False, pid: int | None = None):
        super().__init__()
        self._color = color
        self._pid = "" if pid is None else f"[{pid}] "

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        level = f"{_level(record):5}"
        if self._color:
            level = f"\x1b[{_COLORS[level.strip()]}m{level}\x1b[0m"
        shown = dict(_fields(record))
        stack = str(shown.pop("stack", ""))
        fields = " ".join(f"{name}={_value(value)}" for name, value in shown.items())
        line = f"{time} {self._pid}{level} {_message(record):19} {fields}".rstrip()
        return "\n".join([line, *_lines_of(stack), *_lines_of(_traceback(self, record))])


class JsonFormatter(logging.Formatter):
    """For machines: one object a line, time in UTC."""

    def __init__(self, *, pid: int | None = None):
        super().__init__()
        self._pid = {} if pid is None else {"pid": pid}

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": _level(record),
            "logger": record.name,
            **self._pid,
            "message": _message(record),
        }
        for name, value in _fields(record).items():
            line[f"{name}_" if name in line else name] = _masked(value)
        trace = _traceback(self, record)
        if trace:
            line["traceback"] = trace
        text = json.dumps(line, default=str, ensure_ascii=False)
        return text if text.isprintable() else json.dumps(line, default=str)


def _level(record: logging.LogRecord) -> str:
    return _LEVELS.get(record.levelno, record.levelname.lower())


def _message(record: logging.LogRecord) -> str:
    message = mask(record.getMessage())
    return message if message.isprintable() else message.encode("unicode_escape").decode()


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        return ",".join(_value(item) for item in value)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = mask(str(value))
    if text.isprintable():
        return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
    return json.dumps(text)


def _masked(value: Any) -> Any:
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(map(_masked, value))
    return mask(value) if isinstance(value, str) else value


def _lines_of(stack: str) -> list[str]:
    return [line if line.isprintable() else json.dumps(line) for line in mask(stack).splitlines()]


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return mask(formatter.formatException(record.exc_info)) if record.exc_info else ""
