"""W3C trace context travels with a job, with OpenTelemetry and without, and nobody else's comes along."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, Tracer, TraceState, use_span

from jobq import Context
from tests.builders import Bench, Gate, settled, started, turn
from tests.waiting import until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER = "00-1af7651916cd43dd8448eb211c80319c-c7ad6b7169203331-01"


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


class Tracing:
    """OpenTelemetry as an application sets it up, with an exporter that keeps what it gets."""

    def __init__(self) -> None:
        self._kept = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._kept))
        self.tracer: Tracer = self.provider.get_tracer("shop")

    def span(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self._kept.get_finished_spans() if span.name == name]
        return found


@pytest.fixture
def tracing() -> Iterator[Tracing]:
    tracing = Tracing()
    yield tracing
    tracing.provider.shutdown()


@pytest.fixture
def without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """An application that has not imported it; this process has, for the other tests."""
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")


async def headers_of(bench: Bench, job_id: UUID) -> Any:
    found = await bench.db.fetchval("SELECT headers FROM jobq.outbox WHERE id = $1", job_id)
    return None if found is None else json.loads(found)


def assert_child(child: ReadableSpan, parent: ReadableSpan) -> None:
    assert child.parent is not None
    assert child.parent.span_id == parent.context.span_id
    assert child.context.trace_id == parent.context.trace_id


# --- with OpenTelemetry ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("many", [True, False], ids=["enqueue_many", "enqueue"])
async def test_a_span_of_the_task_continues_the_trace_of_the_enqueue(
    bench: Bench, tracing: Tracing, is_async: bool, many: bool
) -> None:
    def work() -> None:
        with tracing.tracer.start_as_current_span("work"):
            pass

    async def work_async() -> None:
        work()

    task: Any = bench.app.task(work_async if is_async else work)
    worker = await bench.worker()
    with tracing.tracer.start_as_current_span("request"):
        async with bench.app.database.sessions.begin() as session:
            if many:
                await bench.app.enqueue_many(session, [task.job()])
            else:
                await task.enqueue(session)
    await bench.relay()

    await turn(worker)

    assert_child(tracing.span("work"), tracing.span("request"))
    await bench.assert_drained()


async def test_a_trace_goes_on_through_a_job_to_the_jobs_it_enqueues(bench: Bench, tracing: Tracing) -> None:
    @bench.app.task
    async def child() -> None:
        with tracing.tracer.start_as_current_span("child"):
            pass

    @bench.app.task
    async def parent(ctx: Context) -> None:
        with tracing.tracer.start_as_current_span("parent"):
            async with ctx.complete() as session:
                await child.enqueue(session)

    worker = await bench.worker()
    with tracing.tracer.start_as_current_span("request"):
        await bench.commit_and_relay(parent)
    await turn(worker)
    await bench.relay()
    await turn(worker)

    assert_child(tracing.span("parent"), tracing.span("request"))
    assert_child(tracing.span("child"), tracing.span("parent"))


async def test_a_task_sees_trace_context_and_its_state_as_headers(bench: Bench) -> None:
    seen: list[Any] = []

    @bench.app.task
    async def look(ctx: Context) -> None:
        seen.append(ctx.headers)

    worker = await bench.worker()
    state = TraceState([("vendor", "t61")])
    span = NonRecordingSpan(SpanContext(0xA, 0xB, is_remote=True, trace_flags=TraceFlags(1), trace_state=state))
    with use_span(span):
        await bench.commit_and_relay(look, headers={"request": "7"})
    await turn(worker)

    trace = f"00-{0xA:032x}-{0xB:016x}-01"
    assert seen == [{"request": "7", "traceparent": trace, "tracestate": "vendor=t61"}]


async def test_headers_that_the_application_gives_win(bench: Bench, tracing: Tracing) -> None:
    @bench.app.task
    async def look() -> None: ...

    with tracing.tracer.start_as_current_span("request"):
        job_id = await bench.enqueue(look, headers={"traceparent": PARENT})

    assert await headers_of(bench, job_id) == {"traceparent": PARENT}


async def test_without_a_span_nothing_is_added(bench: Bench) -> None:
    @bench.app.task
    async def look() -> None: ...

    assert await headers_of(bench, await bench.enqueue(look)) is None
    assert await headers_of(bench, await bench.enqueue(look, headers={"a": "b"})) == {"a": "b"}


async def test_jobs_side_by_side_and_one_after_the_other_keep_to_their_own_traces(
    bench: Bench, tracing: Tracing
) -> None:
    gate = Gate()

    @bench.app.task
    async def work(name: str) -> None:
        await gate.wait()
        with tracing.tracer.start_as_current_span(name):
            pass

    worker = await bench.worker(concurrency=2)
    for name in ("first", "second"):
        with tracing.tracer.start_as_current_span(f"request {name}"):
            await bench.enqueue(work, name)
    await bench.relay()
    await started(worker)
    gate.open.set()
    await until(lambda: not worker.turns.runs, "both ended")
    await settled(worker)
    await bench.commit_and_relay(work, "third")
    await turn(worker)

    for name in ("first", "second"):
        assert_child(tracing.span(name), tracing.span(f"request {name}"))
    assert tracing.span("third").parent is None


# --- without ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_opentelemetry")
@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
async def test_a_job_passes_on_what_it_had_to_the_jobs_it_enqueues(bench: Bench, is_async: bool) -> None:
    @bench.app.task
    async def child() -> None: ...

    made: list[Any] = []

    async def parent_async() -> None:
        made.append(child.opts(headers={"a": "b"}).job())

    def parent() -> None:
        made.append(child.opts(headers={"a": "b"}).job())

    task: Any = bench.app.task(parent_async if is_async else parent)
    worker = await bench.worker()
    given = {"traceparent": PARENT, "tracestate": "vendor=t61", "request": "7"}
    await bench.commit_and_relay(task, headers=given)
    await turn(worker)
    await bench.commit_and_relay(task)
    await turn(worker)

    assert [json.loads(intent.headers) for intent in made] == [
        {"traceparent": PARENT, "tracestate": "vendor=t61", "a": "b"},
        {"a": "b"},
    ]


@pytest.mark.usefixtures("without_opentelemetry")
async def test_a_child_with_a_trace_of_its_own_keeps_that(bench: Bench) -> None:
    made: list[Any] = []

    @bench.app.task
    async def parent() -> None:
        made.append(parent.opts(headers={"traceparent": OTHER}).job())
        made.append(parent.opts(headers={"traceparent": ""}).job())

    worker = await bench.worker()
    await bench.commit_and_relay(parent, headers={"traceparent": PARENT})
    await turn(worker)

    assert [json.loads(intent.headers) for intent in made] == [{"traceparent": OTHER}, {"traceparent": ""}]


@pytest.mark.parametrize("is_used", [True, False], ids=["with", "without"])
@pytest.mark.parametrize(
    "headers",
    [
        '{"traceparent": 7}',
        '{"traceparent": null}',
        '{"traceparent": ""}',
        '{"tracestate": "a=b"}',
        json.dumps({"traceparent": "0" * 513}),
        '{"traceparent": ' + "[" * 5_000 + "]" * 5_000 + "}",
    ],
    ids=["int", "null", "empty", "state", "long", "deep"],
)
async def test_headers_of_another_program_that_make_no_sense_stop_no_job_and_go_no_further(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, headers: str, is_used: bool
) -> None:
    if not is_used:
        monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    made: list[Any] = []

    @bench.app.task
    async def work() -> None:
        made.append(work.job())

    worker = await bench.worker()
    job_id = await bench.enqueue(work)
    await bench.db.execute("UPDATE jobq.outbox SET headers = $2 WHERE id = $1", job_id, headers)
    await bench.relay()

    await turn(worker)

    assert [intent.headers for intent in made] == [None]
    await bench.assert_drained()


UNUSED = f"""
import sys
from jobq import JobQ
from jobq.tracing import resume

jobs = JobQ()

@jobs.task
async def work() -> None: ...

resume('{{"traceparent": "{PARENT}"}}')
print(work.job().headers)
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


async def test_an_application_that_does_not_use_opentelemetry_does_not_load_it() -> None:
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", UNUSED], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines() == [json.dumps({"traceparent": PARENT}), "[]"]
