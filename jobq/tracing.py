"""W3C trace context: from where a job is enqueued, through its headers, to where it runs.

1. `outgoing` adds `traceparent` and `tracestate` to the headers of a job, unless the application gave its own.
2. `resume` makes those of a job current for its run, so that spans of the task and the jobs it enqueues continue the
   trace.
3. `kept_apart` ends that with the run, where no asyncio task of its own does.

Invariant: OpenTelemetry is used if the application has imported it, and never imported otherwise. Without it, jobs
pass on what the job that enqueued them had. No I/O. Called by task, executor and testing. Calls OpenTelemetry's API.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

FIELDS = ("traceparent", "tracestate")
_LONGEST = 512
"""Characters of a field that is passed on: so long a tracestate the W3C asks for."""

_inherited: ContextVar[dict[str, str] | None] = ContextVar("jobq_trace", default=None)


def outgoing(headers: str | None) -> str | None:
    """The headers of a job about to be enqueued (JSON, or None for none), with the trace context of its caller."""
    trace = _current()
    if not trace:
        return headers
    given = json.loads(headers) if headers is not None else {}
    return headers if FIELDS[0] in given else json.dumps({**trace, **given}, ensure_ascii=False)


def resume(headers: str) -> None:
    """Make a job's trace context current, in the context of the asyncio task that runs it, which ends with it."""
    try:
        found = json.loads(headers)
    except RecursionError:  # written by another program
        return
    trace = {name: found[name] for name in FIELDS if isinstance(found.get(name), str) and len(found[name]) <= _LONGEST}
    if not trace.get(FIELDS[0]):
        return
    _inherited.set(trace)
    if _is_opentelemetry_used():
        from opentelemetry.context import attach, get_current

        attach(_propagator().extract(trace, get_current()))


@contextmanager
def kept_apart() -> Iterator[None]:
    """Run a job in an asyncio task that goes on after it: what is current then is what was current before."""
    with ExitStack() as stack:
        stack.callback(_inherited.reset, _inherited.set(None))
        if _is_opentelemetry_used():
            from opentelemetry.context import attach, detach, get_current

            stack.callback(detach, attach(get_current()))
        yield


def _current() -> dict[str, str] | None:
    if not _is_opentelemetry_used():
        return _inherited.get()
    trace: dict[str, str] = {}
    _propagator().inject(trace)
    return trace


def _is_opentelemetry_used() -> bool:
    return "opentelemetry.trace" in sys.modules


@cache
def _propagator() -> TraceContextTextMapPropagator:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()
