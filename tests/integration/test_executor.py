"""How a run ends: every thing a task can do, and the one end of the job that comes of it."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

import pytest
from pydantic import BeforeValidator

from jobq import Context, Reject, Retry, RetryPolicy, Snooze
from jobq.model import Entry
from jobq.retry import LONGEST_DELAY_S
from jobq.settings import ERROR_LIMIT
from jobq.worker import turns as turns_module
from tests.builders import Bench, Gate, settled, started, turn
from tests.waiting import until

MINUTE = timedelta(seconds=60)


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


async def run_raising(
    bench: Bench, error: BaseException | type[BaseException], *, sync: bool = False, **options: Any
) -> tuple[UUID, Any]:
    """Run one job whose task raises `error`; returns its id and its row."""
    if sync:

        @bench.app.task(name="failing", **options)
        def fail() -> None:
            raise error

    else:

        @bench.app.task(name="failing", **options)
        async def fail() -> None:
            raise error

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(fail)
    await turn(worker)
    assert len(worker.owned) == 0
    return job_id, await bench.row(job_id)


def about(row: Any, delay: timedelta) -> bool:
    """Whether a row is due in `delay`, a little less for the time that the test took."""
    return delay - timedelta(seconds=20) < row["due_in"] <= delay


# --- retries ---------------------------------------------------------------------------------------------------------


async def test_a_failure_uses_an_attempt_and_comes_back_after_the_policys_delay(bench: Bench) -> None:
    asked: list[tuple[int, str]] = []

    def delay(attempt: int, error: BaseException) -> float:
        asked.append((attempt, str(error)))
        return 60.0

    _, row = await run_raising(bench, LookupError("no such order"), retry=RetryPolicy(delay=delay))

    assert asked == [(1, "no such order")]
    assert (row["generation"], row["attempts"], row["crashes"]) == (2, 1, 0)
    assert about(row, MINUTE)
    assert (row["error_type"], row["last_error"]) == ("LookupError", "LookupError: no such order")


async def test_the_next_attempt_knows_its_number(bench: Bench) -> None:
    attempts: list[int] = []

    @bench.app.task(retry=RetryPolicy(max_attempts=3, delay=lambda attempt, error: 0))
    async def count(ctx: Context) -> None:
        attempts.append(ctx.attempt)
        raise LookupError

    worker = await bench.worker()
    job_id = await bench.enqueue(count)
    for _ in range(3):
        await bench.relay()
        await turn(worker)

    dead = await bench.dead(job_id)
    assert attempts == [1, 2, 3]
    assert dead is not None
    assert (dead["reason"], dead["attempts"], dead["error_type"]) == ("exhausted", 3, "LookupError")
    await bench.assert_drained()


async def test_a_job_may_have_fewer_attempts_than_its_task(bench: Bench) -> None:
    @bench.app.task
    async def fail() -> None:
        raise LookupError

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(fail, max_attempts=1)

    await turn(worker)

    assert (await bench.dead(job_id))["reason"] == "exhausted"  # type: ignore[index]


async def test_an_error_named_in_never_ends_the_job_at_once(bench: Bench) -> None:
    job_id, row = await run_raising(bench, LookupError("gone"), retry=RetryPolicy(never=(LookupError,)))

    dead = await bench.dead(job_id)
    assert row is None
    assert dead is not None
    assert (dead["reason"], dead["attempts"], dead["last_error"]) == ("rejected", 1, "LookupError: gone")


async def test_retry_comes_back_after_its_own_delay_and_uses_an_attempt(bench: Bench) -> None:
    _, row = await run_raising(bench, Retry("busy", delay=60), retry=RetryPolicy(delay=lambda attempt, error: 3600))

    assert row["attempts"] == 1
    assert about(row, MINUTE)


async def test_retry_without_a_delay_follows_the_policy(bench: Bench) -> None:
    _, row = await run_raising(bench, Retry, retry=RetryPolicy(delay=lambda attempt, error: 60))

    assert row["attempts"] == 1
    assert about(row, MINUTE)


async def test_retry_at_the_last_attempt_is_exhausted(bench: Bench) -> None:
    job_id, _ = await run_raising(bench, Retry(delay=1), retry=RetryPolicy(max_attempts=1))

    assert (await bench.dead(job_id))["reason"] == "exhausted"  # type: ignore[index]


async def test_reject_is_dead_at_once(bench: Bench) -> None:
    job_id, row = await run_raising(bench, Reject("no such address"))

    dead = await bench.dead(job_id)
    assert row is None
    assert dead is not None
    assert (dead["reason"], dead["last_error"]) == ("rejected", "jobq.outcomes.Reject: no such address")


async def test_snooze_uses_no_attempt(bench: Bench) -> None:
    _, row = await run_raising(bench, Snooze(60), retry=RetryPolicy(max_attempts=1))

    assert (row["generation"], row["attempts"], row["last_error"]) == (2, 0, None)
    assert about(row, MINUTE)


@pytest.mark.parametrize("depth", [1, 3])
async def test_an_outcome_that_comes_alone_out_of_task_groups_counts_as_itself(bench: Bench, depth: int) -> None:
    async def raise_within(groups: int, error: Exception) -> None:
        if not groups:
            raise error
        async with asyncio.TaskGroup() as group:
            group.create_task(raise_within(groups - 1, error))
            group.create_task(asyncio.Event().wait())

    @bench.app.task
    async def end(how: str) -> None:
        ends = {"snooze": Snooze(60), "retry": Retry(delay=60), "reject": Reject("no such address")}
        await raise_within(depth, ends[how])

    worker = await bench.worker()
    snoozed, retried, rejected = [await bench.enqueue(end, how) for how in ("snooze", "retry", "reject")]
    await bench.relay()
    await turn(worker)

    rows = [await bench.row(job_id) for job_id in (snoozed, retried)]
    assert [row["attempts"] for row in rows] == [0, 1]  # type: ignore[index]
    assert all(about(row, MINUTE) for row in rows)
    assert rows[1]["error_type"] == "Retry"  # type: ignore[index]
    dead = await bench.dead(rejected)
    assert dead is not None
    assert (dead["reason"], dead["last_error"]) == ("rejected", "jobq.outcomes.Reject: no such address")


@pytest.mark.parametrize(
    "error",
    [
        ExceptionGroup("two", [Snooze(60), ValueError("a fault beside it")]),
        ExceptionGroup("two", [ExceptionGroup("one", [Snooze(60)]), Reject("no")]),
        ExceptionGroup("one", [ValueError("no outcome")]),
    ],
    ids=["beside a fault", "two outcomes", "a fault alone"],
)
async def test_any_other_group_is_a_failure(bench: Bench, error: Exception) -> None:
    _, row = await run_raising(bench, error, retry=RetryPolicy(delay=lambda attempt, error: 60))

    assert (row["attempts"], row["error_type"]) == (1, "ExceptionGroup")


async def test_a_completion_that_came_too_late_is_no_failure_inside_a_task_group(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def finish(ctx: Context) -> None:
        async with ctx.complete():
            pass

    @bench.app.task
    async def book(ctx: Context) -> None:
        await bench.db.execute("DELETE FROM jobq.outbox")
        async with asyncio.TaskGroup() as group:
            group.create_task(finish(ctx))

    worker = await bench.worker()
    await bench.commit_and_relay(book)
    await turn(worker)

    assert [r.getMessage() for r in caplog.records if r.name == "jobq.worker.attempt"] == ["job already done"]


@pytest.mark.parametrize("error", [Retry(delay=1e300), Snooze(1e300)], ids=["retry", "snooze"])
async def test_a_delay_beyond_the_calendar_is_cut_and_holds_up_nobody(bench: Bench, error: Exception) -> None:
    _, row = await run_raising(bench, error)

    assert timedelta(0) < row["due_in"] <= timedelta(seconds=LONGEST_DELAY_S)


@pytest.mark.parametrize("broken", [float("nan"), "soon", None, LookupError("in it"), SystemExit(1)], ids=repr)
async def test_a_policy_that_breaks_does_not_lose_the_job(bench: Bench, broken: object) -> None:
    def delay(attempt: int, error: BaseException) -> float:
        if isinstance(broken, BaseException):
            raise broken
        return broken  # type: ignore[return-value]

    _, row = await run_raising(bench, LookupError("of the task"), retry=RetryPolicy(delay=delay))

    assert row["attempts"] == 1
    assert timedelta(0) < row["due_in"] < MINUTE
    assert "of the task" in row["last_error"]
    assert "delay() raised" in row["last_error"]


async def test_a_subclass_of_an_outcome_that_forgets_its_parent_still_ends_the_run(bench: Bench) -> None:
    class Later(Retry):
        def __init__(self) -> None:
            pass

    _, row = await run_raising(bench, Later(), retry=RetryPolicy(delay=lambda attempt, error: 60))

    assert row["attempts"] == 1
    assert about(row, MINUTE)


async def test_an_outcome_that_nobody_understands_still_ends_the_run(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    class Later(Retry):
        def __init__(self) -> None:
            self.delay_s = "soon"  # type: ignore[assignment]

    _, row = await run_raising(bench, Later())

    assert row["attempts"] == 1
    assert timedelta(0) < row["due_in"] < MINUTE
    assert "run broke off" in caplog.messages


# --- whatever a task raises ------------------------------------------------------------------------------------------


class Odd(BaseException):
    pass


@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
@pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit, StopIteration, Odd]
)
async def test_no_exception_of_a_task_kills_the_worker_or_loses_the_job(
    bench: Bench, caplog: pytest.LogCaptureFixture, error: type[BaseException], sync: bool
) -> None:
    _, row = await run_raising(bench, error, sync=sync)

    assert (row["generation"], row["attempts"]) == (2, 1)
    assert [record.getMessage() for record in caplog.records] == ["job retried"]


async def test_the_worker_goes_on_after_such_an_exception(bench: Bench) -> None:
    runs: list[int] = []

    @bench.app.task
    async def leave() -> None:
        raise SystemExit(3)

    @bench.app.task
    async def note() -> None:
        runs.append(1)

    worker = await bench.worker()
    await bench.enqueue(leave)
    await bench.commit_and_relay(note)
    await turn(worker)
    await bench.commit_and_relay(note)
    await turn(worker)

    assert runs == [1, 1]


async def test_an_error_that_cannot_be_told_still_ends_the_run(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("not even this")

    _, row = await run_raising(bench, Mute())

    assert row["attempts"] == 1
    assert row["error_type"].endswith("Mute")
    assert [record.getMessage() for record in caplog.records] == ["job retried"]


async def test_an_error_is_kept_bounded(bench: Bench) -> None:
    _, row = await run_raising(bench, LookupError("x" * 1_000_000))

    assert len(row["last_error"]) == ERROR_LIMIT


@pytest.fixture
def untold(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Keeps from the test's report what no report can carry: lone surrogates."""
    with caplog.at_level(logging.CRITICAL, logger="jobq.worker.attempt"):
        yield


@pytest.mark.usefixtures("untold")
async def test_nul_and_surrogates_in_an_error_are_kept_readable(bench: Bench) -> None:
    _, row = await run_raising(bench, LookupError("a\0b \ud800 ü"))

    assert row["last_error"] == "LookupError: a\\0b \\ud800 ü"


@pytest.mark.usefixtures("untold")
async def test_nul_and_surrogates_in_the_name_of_an_error_hold_up_nobody(bench: Bench) -> None:
    class Strange(Exception):
        pass

    Strange.__qualname__ = "Strange\0\ud800" * 100

    _, row = await run_raising(bench, Strange())

    assert row["error_type"].startswith("Strange\\0\\ud800")
    assert len(row["error_type"]) <= 200


async def test_an_attempt_is_told_in_one_line_without_its_arguments(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    @bench.app.task
    async def pay(card: str) -> None: ...

    worker = await bench.worker()
    await bench.commit_and_relay(pay, "4111-secret")

    await turn(worker)

    (record,) = [record for record in caplog.records if record.name == "jobq.worker.attempt"]
    fields: dict[str, Any] = record.fields  # type: ignore[attr-defined]
    assert record.getMessage() == "job done"
    assert (fields["task"], fields["queue"], fields["attempt"]) == ("pay", "default", "1/25")
    assert "4111" not in caplog.text + str([vars(record) for record in caplog.records])


# --- time ------------------------------------------------------------------------------------------------------------


async def test_a_task_that_takes_too_long_has_failed(bench: Bench) -> None:
    @bench.app.task(timeout=0.02)
    async def wait() -> None:
        await asyncio.Event().wait()

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(wait)

    await turn(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert (row["attempts"], row["error_type"]) == (1, "TimeoutError")


async def test_a_job_may_have_a_time_of_its_own(bench: Bench) -> None:
    @bench.app.task(timeout=3600)
    async def wait() -> None:
        await asyncio.Event().wait()

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(wait, timeout=0.02)

    await turn(worker)

    assert (await bench.row(job_id))["error_type"] == "TimeoutError"  # type: ignore[index]


async def test_a_task_may_clean_up_when_its_time_is_over(bench: Bench) -> None:
    cleaned: list[int] = []

    @bench.app.task(timeout=0.02)
    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(1)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(wait)

    await turn(worker)

    assert cleaned == [1]
    assert (await bench.row(job_id))["attempts"] == 1  # type: ignore[index]


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    ['{"number": "seven"}', "{}", '{"number": 1, "unknown": 2}', '{"number": null}', '{"nummer": 1}'],
)
async def test_stored_arguments_that_no_longer_fit_are_dead_as_invalid(bench: Bench, args: str) -> None:
    runs: list[int] = []

    @bench.app.task
    async def note(number: int) -> None:
        runs.append(number)

    worker = await bench.worker()
    job_id = await bench.enqueue(note, 1)
    await bench.db.execute("UPDATE jobq.outbox SET args = $2 WHERE id = $1", job_id, args)
    await bench.relay()

    await turn(worker)

    dead = await bench.dead(job_id)
    assert dead is not None
    assert (dead["reason"], dead["attempts"], dead["args"]) == ("invalid", 0, args)
    assert dead["last_error"].startswith("jobq.errors.InvalidArguments: note(): ")
    assert runs == []
    await bench.assert_drained()


broken_validators: list[str] = []


def break_when_told(value: Any) -> Any:
    if broken_validators:
        raise KeyError("a fault of the application")
    return value


async def test_a_validator_that_breaks_at_the_run_is_no_endless_loop(bench: Bench) -> None:
    @bench.app.task
    async def note(number: Annotated[int, BeforeValidator(break_when_told)]) -> None: ...

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(note, 1)
    broken_validators.append("break_when_told")

    await turn(worker)
    broken_validators.clear()

    dead = await bench.dead(job_id)
    assert dead is not None
    assert (dead["reason"], dead["error_type"]) == ("invalid", "KeyError")
    await bench.assert_drained()


async def test_what_the_task_receives_is_what_its_annotations_say(bench: Bench) -> None:
    seen: list[Any] = []

    @bench.app.task
    async def note(ctx: Context, job_id: UUID, *, wait: timedelta = MINUTE) -> None:
        seen.append((job_id, wait))

    worker = await bench.worker()
    some_id = UUID(int=7)
    await bench.commit_and_relay(note, some_id)

    await turn(worker)

    assert seen == [(some_id, MINUTE)]


# --- synchronous tasks -----------------------------------------------------------------------------------------------


async def test_a_synchronous_task_runs_in_a_thread(bench: Bench) -> None:
    names: list[str] = []

    @bench.app.task
    def note(ctx: Context, number: int) -> None:
        names.append(f"{threading.current_thread().name} {ctx.attempt} {number}")

    worker = await bench.worker()
    await bench.commit_and_relay(note, 7)

    await turn(worker)

    assert [name.rpartition("_")[0] for name in names] == ["jobq task"]
    assert names[0].endswith(" 1 7")
    await bench.assert_drained()


async def test_no_more_threads_run_than_allowed(bench: Bench) -> None:
    running, most = 0, 0
    lock = threading.Lock()
    release = threading.Event()

    @bench.app.task
    def hold() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        release.wait(10)
        with lock:
            running -= 1

    worker = await bench.worker(threads=2)
    for _ in range(4):
        await bench.enqueue(hold)
    await bench.relay()
    await started(worker)
    await until(lambda: running == 2, "two threads run")
    release.set()
    await until(lambda: not worker.turns.runs, "all runs ended")
    await settled(worker)

    assert most == 2
    await bench.assert_drained()


@pytest.mark.parametrize("fails", [False, True], ids=["ends well", "raises"])
async def test_a_thread_that_overruns_its_time_keeps_its_slot_and_ends_as_it_ends(
    bench: Bench, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    release = threading.Event()

    @bench.app.task(timeout=0.2)
    def hold() -> None:
        release.wait(10)
        if fails:
            raise ValueError

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(hold)
    await started(worker)
    (run,) = worker.turns.runs
    await until(lambda: run.cancelling() > 0, "its time was over")
    await until(lambda: "its thread cannot be interrupted" in caplog.text, "the log said so")
    assert not run.done()
    assert len(worker.owned.listed("default")) == 1

    release.set()
    await until(lambda: not worker.turns.runs, "the run ended")
    await settled(worker)

    row = await bench.row(job_id)
    end = None if row is None else (row["attempts"], row["error_type"])
    assert end == ((1, "ValueError") if fails else None)


async def test_waiting_for_a_thread_keeps_the_slot_and_the_lease_and_uses_up_no_time(bench: Bench) -> None:
    release = threading.Event()
    runs: list[int] = []

    @bench.app.task
    def hold() -> None:
        release.wait(10)

    @bench.app.task(timeout=3600)
    def note() -> None:
        runs.append(1)

    worker = await bench.worker(threads=1)
    await bench.commit_and_relay(hold)
    await started(worker)
    late = await bench.commit_and_relay(note, timeout=1)
    await started(worker)
    began = time.monotonic()
    await until(lambda: time.monotonic() > began + 1.2, "it has waited for longer than its time")

    assert len(worker.turns.runs) == 2
    assert len(worker.owned.listed("default")) == 2
    release.set()
    await until(lambda: not worker.turns.runs, "both ended")
    await settled(worker)
    assert runs == [1]
    assert await bench.row(late) is None


async def test_asynchronous_jobs_run_while_synchronous_ones_wait_for_a_thread(bench: Bench) -> None:
    release = threading.Event()
    runs: list[int] = []

    @bench.app.task
    def hold() -> None:
        release.wait(10)

    @bench.app.task
    async def note() -> None:
        runs.append(1)

    worker = await bench.worker(threads=1, concurrency=4)
    for _ in range(3):
        await bench.enqueue(hold)
    await bench.enqueue(note)
    await bench.relay()

    await started(worker)
    await until(lambda: len(worker.turns.runs) == 3, "one has ended")

    assert runs == [1]
    release.set()
    await until(lambda: not worker.turns.runs, "all ended")
    await settled(worker)


async def test_a_job_that_moves_on_while_it_waits_for_a_thread_does_not_run(bench: Bench) -> None:
    release = threading.Event()
    runs: list[str] = []

    @bench.app.task
    def hold(name: str) -> None:
        runs.append(name)
        release.wait(10)

    worker = await bench.worker(threads=1)
    await bench.commit_and_relay(hold, "first")
    await started(worker)
    moved = await bench.commit_and_relay(hold, "second")
    await started(worker)
    await until(lambda: worker.executor.waiting, "the second one waits")
    await bench.db.execute("UPDATE jobq.outbox SET generation = 2 WHERE id = $1", moved)

    await worker.turns.lose("default", [Entry.of(moved, 1, 2).raw])
    await until(lambda: len(worker.turns.runs) == 1, "it waits no more")
    release.set()
    await until(lambda: not worker.turns.runs, "the first one ended")
    await settled(worker)

    assert runs == ["first"]
    assert (await bench.row(moved))["attempts"] == 0  # type: ignore[index]
    assert len(worker.owned) == 0


@pytest.mark.parametrize("is_mixed", [True, False], ids=["with asynchronous tasks", "alone"])
async def test_a_worker_whose_slots_all_wait_for_threads_says_so_once(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, is_mixed: bool
) -> None:
    monkeypatch.setattr(turns_module, "_SHORT_OF_THREADS_S", 0.0)
    release = threading.Event()

    @bench.app.task
    def hold() -> None:
        release.wait(10)

    if is_mixed:

        @bench.app.task
        async def other() -> None: ...

    worker = await bench.worker(threads=1, concurrency=3)
    for _ in range(3):
        await bench.enqueue(hold)
    await bench.relay()
    await started(worker)
    for _ in range(3):
        await started(worker)
    release.set()
    await until(lambda: not worker.turns.runs, "all ended")
    await settled(worker)

    said = [r.fields for r in caplog.records if r.message.startswith("synchronous jobs that wait")]  # type: ignore[attr-defined]
    assert said == ([{"waiting": 2, "threads": 1, "slots": 3}] if is_mixed else [])


async def test_a_synchronous_task_sees_the_context_variables_of_its_run(bench: Bench) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    @bench.app.task
    def look() -> None:
        seen.append(variable.get())
        variable.set("by a thread")

    worker = await bench.worker()
    token = variable.set("by the test")
    await bench.commit_and_relay(look)

    await turn(worker)
    variable.reset(token)

    assert seen == ["by the test"]


async def test_a_function_that_turns_out_to_return_an_awaitable_has_failed(bench: Bench) -> None:
    """As a decorator makes of an async function: nothing of it would run."""

    async def body() -> None: ...

    @bench.app.task
    def wrapped() -> Any:
        return body()

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(wrapped)

    await turn(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert row["error_type"] == "TypeError"


# --- the state of the process ----------------------------------------------------------------------------------------


async def test_a_task_sees_what_the_lifespan_yielded_and_it_ends_with_the_worker(
    shared_database_url: str, redis_url: str
) -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[dict[str, str]]:
        seen.append("begin")
        yield {"http": "client"}
        seen.append("end")

    async with Bench.open(shared_database_url, redis_url, lifespan=lifespan) as bench:

        @bench.app.task
        async def look(ctx: Context[dict[str, str]]) -> None:
            seen.append(ctx.state["http"])

        worker = await bench.worker()
        await bench.commit_and_relay(look)
        await turn(worker)

    assert seen == ["begin", "client", "end"]


async def test_a_run_that_was_cancelled_by_its_own_hand_is_a_failure(bench: Bench) -> None:
    @bench.app.task
    async def give_up() -> None:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        await asyncio.sleep(0)

    worker = await bench.worker()
    job_id = await bench.commit_and_relay(give_up)

    await turn(worker)

    row = await bench.row(job_id)
    assert row is not None
    assert (row["attempts"], row["error_type"]) == (1, "CancelledError")


async def test_jobs_run_side_by_side_up_to_the_number_of_slots(bench: Bench) -> None:
    gate = Gate()
    running: list[int] = []

    @bench.app.task
    async def wait(number: int) -> None:
        running.append(number)
        await gate.wait()

    worker = await bench.worker(concurrency=3)
    for number in range(3):
        await bench.enqueue(wait, number)
    await bench.relay()
    await started(worker)
    await until(lambda: len(running) == 3, "three jobs run at the same time")
    gate.open.set()
    await until(lambda: not worker.turns.runs, "all runs ended")
    await settled(worker)

    await bench.assert_drained()


async def test_a_failure_is_told_with_its_traceback_from_the_task_on(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await run_raising(bench, LookupError("no such order"))

    (record,) = [record for record in caplog.records if record.name == "jobq.worker.attempt"]
    assert record.exc_info is not None
    frames = traceback.extract_tb(record.exc_info[2])
    assert [frame.name for frame in frames] == ["fail"]
