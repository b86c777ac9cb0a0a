"""Tasks: registered by name, still their function, and strict about options and signatures."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import TYPE_CHECKING, Any

import pytest

from jobq import ConfigurationError, Context, InvalidArguments, JobQ, RetryPolicy, Task
from jobq.model import Intent

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForTheTypeChecker

SECRET = "hunter2"
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


async def send(ctx: Context[Any], order_id: int, *, locale: str = "en") -> str:
    return f"{order_id} {locale} {ctx}"


async def tidy() -> None: ...


def task_of(function: Callable[..., Any] = send, **options: Any) -> Task[..., Any, Any]:
    return JobQ().task(**options)(function)


# Registration


def test_a_task_has_its_functions_name_and_queue_default():
    jobs = JobQ()

    task = jobs.task(send)

    assert (task.name, task.queue, task.timeout_s) == ("send", "default", None)
    assert jobs.tasks == {"send": task}


def test_options_of_the_decorator_are_kept():
    retry = RetryPolicy(max_attempts=3)

    task = task_of(name="mail.send", queue="mail", retry=retry, timeout=timedelta(minutes=1), aliases=["old"])

    assert (task.name, task.queue, task.retry, task.timeout_s) == ("mail.send", "mail", retry, 60.0)


def test_a_task_is_found_by_its_name_and_by_each_alias():
    jobs = JobQ()

    task = jobs.task(name="send_receipt", aliases=["send", "mail"])(send)

    assert jobs.tasks == {"send_receipt": task, "send": task, "mail": task}


@pytest.mark.parametrize("retry", [3, 0, False, {"max_attempts": 3}, RetryPolicy], ids=str)
def test_what_is_no_retry_policy_is_refused_when_the_task_is_registered(retry):
    with pytest.raises(ConfigurationError, match=r"task 'send': retry is a RetryPolicy, such as RetryPolicy\(max_att"):
        task_of(retry=retry)


@pytest.mark.parametrize(
    ("again", "said"),
    [
        ({"name": "send"}, "two tasks are named 'send': give one of them name='...'"),
        ({"name": "mail"}, "task 'mail' cannot be known as 'mail': that is an alias of task 'send'"),
        (
            {"name": "other", "aliases": ["send"]},
            "task 'other' cannot be known as 'send': that is the name of another task",
        ),
        ({"name": "other", "aliases": ["mail"]}, "task 'other' cannot be known as 'mail': that is an alias of"),
    ],
    ids=str,
)
def test_a_name_that_is_taken_is_refused_and_registers_nothing(again, said):
    jobs = JobQ()
    first = jobs.task(aliases=["mail"])(send)

    with pytest.raises(ConfigurationError, match=re.escape(said)):
        jobs.task(**again)(tidy)

    assert jobs.tasks == {"send": first, "mail": first}


@pytest.mark.parametrize(
    ("aliases", "said"),
    [
        ("mail", "task 'send': aliases is a list of names: aliases=['mail']"),
        (["send"], "task 'send': name each of its former names in aliases once, and not its own"),
        (["mail", "mail"], "task 'send': name each of its former names in aliases once"),
    ],
    ids=str,
)
def test_aliases_that_cannot_be_meant_are_refused(aliases, said):
    jobs = JobQ()

    with pytest.raises(ConfigurationError, match=re.escape(said)):
        jobs.task(aliases=aliases)(send)

    assert jobs.tasks == {}


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "\ud800", "x" * 129, 5], ids=ascii)
def test_a_name_that_a_row_or_a_key_could_not_carry_is_refused(name):
    with pytest.raises(ConfigurationError, match="name"):
        task_of(name=name)
    with pytest.raises(ConfigurationError, match="name"):
        task_of(aliases=[name])


def test_a_callable_without_a_name_needs_one():
    with pytest.raises(ConfigurationError, match="name="):
        task_of(functools.partial(tidy))


@pytest.mark.parametrize("queue", ["", "Mail", "a b", "x" * 65, "ä", "a:b", "a\n", "{a}", None, 5], ids=repr)
def test_a_bad_queue_name_is_refused_at_the_task_and_in_options(queue):
    with pytest.raises(ConfigurationError, match="queue"):
        task_of(queue=queue)
    if queue is not None:
        with pytest.raises(InvalidArguments, match="queue"):
            task_of().opts(queue=queue)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, "5", True], ids=str)
def test_a_bad_timeout_is_refused_at_the_task_and_in_options(timeout):
    with pytest.raises(ConfigurationError, match="timeout"):
        task_of(timeout=timeout)
    with pytest.raises(InvalidArguments, match="timeout"):
        task_of().opts(timeout=timeout)


def with_args(*ids: int) -> None: ...
def with_kwargs(**ids: int) -> None: ...
def positional_only(id_: int, /) -> None: ...


@pytest.mark.parametrize("function", [with_args, with_kwargs, positional_only])
def test_parameters_that_cannot_be_kept_by_name_are_refused(function):
    with pytest.raises(ConfigurationError, match="by name"):
        task_of(function)


async def stream() -> AsyncIterator[int]:
    yield 1


def count() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("function", [stream, count])
def test_a_generator_function_would_never_run_and_is_refused(function):
    with pytest.raises(ConfigurationError, match="yield"):
        task_of(function)


@pytest.mark.parametrize("schema", ["", "Jobs", "a b", 'a"b', "1a", "a" * 64, "jobq\n"], ids=repr)
def test_a_bad_schema_name_is_refused(schema):
    with pytest.raises(ConfigurationError, match="schema"):
        JobQ(schema=schema)


def test_making_an_app_and_its_tasks_connects_to_nothing():
    jobs = JobQ(database="postgresql://nobody@127.0.0.1:1/none", redis="redis://127.0.0.1:1")

    jobs.task(send)

    assert "1 tasks" in repr(jobs)


# A task is its function


async def test_a_task_called_is_its_function():
    task = task_of()

    assert await task("ctx", 7, locale="sv") == "7 sv ctx"


def test_a_plain_function_called_answers_at_once():
    task = task_of(lambda number: number + 1, name="next")

    assert task(1) == 2
    assert task_of().is_async
    assert not task.is_async


def test_a_task_looks_like_its_function():
    task = task_of()

    assert (task.__name__, task.__module__, task.__wrapped__) == ("send", __name__, send)
    assert inspect.signature(task) == inspect.signature(send)
    assert repr(task) == "<Task 'send' queue='default'>"


# The context


async def bare(ctx: Context, n: int) -> None: ...
async def named_otherwise(running: Context[dict[str, int]], n: int) -> None: ...
async def without(n: int) -> None: ...
async def unannotated(ctx, n): ...


@pytest.mark.parametrize("function", [bare, named_otherwise, send])
def test_a_first_parameter_annotated_context_is_not_an_argument(function):
    task = task_of(function)

    assert task.takes_context
    assert list(json.loads(task.job(1).args).values()) == [1]


@pytest.mark.parametrize(("function", "args"), [(without, (1,)), (unannotated, ("a", 1)), (tidy, ())])
def test_other_first_parameters_are_arguments(function, args):
    task = task_of(function)

    assert not task.takes_context
    assert list(json.loads(task.job(*args).args).values()) == list(args)


async def context_late(n: int, ctx: Context) -> None: ...
async def context_by_keyword(n: int, *, ctx: Context[Any]) -> None: ...
async def context_first_by_keyword(*, ctx: Context, n: int) -> None: ...
async def context_twice(first: Context, ctx: Context, n: int) -> None: ...


@pytest.mark.parametrize("function", [context_late, context_by_keyword, context_first_by_keyword, context_twice])
def test_a_context_anywhere_else_is_a_configuration_error(function):
    jobs = JobQ()
    jobs.task(function)

    with pytest.raises(ConfigurationError) as refused:
        jobs.check()

    name = function.__name__
    assert str(refused.value) == (
        f"task {name!r}: parameter 'ctx' is a Context, which must be the first parameter and not keyword-only: "
        f"def {name}(ctx: Context, ...)"
    )


def test_giving_ctx_to_job_is_refused():
    with pytest.raises(InvalidArguments, match="too many positional"):
        task_of(bare).job("ctx", 1)
    with pytest.raises(InvalidArguments, match="'ctx'"):
        task_of(bare).job(1, ctx="ctx")


# Annotations


def test_annotations_are_resolved_at_first_use_so_that_names_may_be_defined_later():
    task = task_of(uses_later)

    assert json.loads(task.job({"id": 1}).args) == {"value": {"id": 1}}


def uses_later(value: Later) -> None: ...


Later = dict[str, int]


def uses_typing_only(value: OnlyForTheTypeChecker) -> None: ...


def test_an_annotation_that_cannot_be_resolved_is_named_by_check_with_the_remedy():
    jobs = JobQ()
    jobs.task(send)
    jobs.check()
    jobs.task(uses_typing_only)

    with pytest.raises(ConfigurationError, match=r"'uses_typing_only'.*OnlyForTheTypeChecker.*TYPE_CHECKING"):
        jobs.check()


def test_annotations_may_name_what_an_enclosing_function_defined():
    bound = int

    def inner(value: bound) -> None:
        _ = bound

    with pytest.raises(InvalidArguments, match="value"):
        task_of(inner).job("x")


LIBRARY = """
import functools

def logged(function):
    @functools.wraps(function)
    async def wrapper(*args, **kwargs):
        return await function(*args, **kwargs)
    return wrapper
"""


def test_a_decorated_function_is_read_as_the_one_inside():
    library: dict[str, Any] = {}
    exec(LIBRARY, library)  # a module in which `Context` means nothing

    task = task_of(library["logged"](bare))

    assert task.takes_context
    assert task.is_async
    with pytest.raises(InvalidArguments, match="n:"):
        task.job("x")


def test_the_codec_is_built_once_for_a_task_and_all_its_options():
    task = task_of(tidy)

    assert task.opts(priority=1).codec is task.opts(priority=3).opts(delay=1).codec
    assert task.opts(priority=1).codec is task.codec


# Options


def option(**options: Any) -> Intent:
    return task_of(tidy).opts(**options).job()


def test_an_intent_without_options_takes_the_defaults():
    assert task_of(tidy, queue="mail").job() == Intent(
        task="tidy",
        queue="mail",
        args="{}",
        priority=2,
        delay_s=None,
        run_at=None,
        max_attempts=None,
        timeout_s=None,
        idempotency_key=None,
        idempotency_ttl_s=86_400.0,
        headers=None,
    )


def test_every_option_reaches_the_intent():
    found = option(
        delay=timedelta(minutes=1),
        priority=1,
        queue="mail",
        max_attempts=3,
        timeout=2.5,
        idempotency_key="order:7",
        idempotency_ttl=timedelta(days=7),
        headers={"traceparent": "00-1"},
    )

    assert found == Intent(
        task="tidy",
        queue="mail",
        args="{}",
        priority=1,
        delay_s=60.0,
        max_attempts=3,
        timeout_s=2.5,
        idempotency_key="order:7",
        idempotency_ttl_s=604_800.0,
        headers='{"traceparent":"00-1"}',
    )
    assert option(run_at=NOON).run_at == NOON


def test_options_add_up_and_leave_the_task_as_it_was():
    task = task_of(tidy)

    urgent = task.opts(priority=1)
    later = urgent.opts(delay=5)

    assert (later.job().priority, later.job().delay_s) == (1, 5.0)
    assert (urgent.job().priority, urgent.job().delay_s) == (1, None)
    assert (task.job().priority, task.job().delay_s) == (2, None)


class NoOffset(tzinfo):
    def utcoffset(self, moment: datetime | None) -> None:
        return None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"priority": 0}, "priority"),
        ({"priority": 5}, "priority"),
        ({"priority": 2.0}, "priority"),
        ({"priority": "1"}, "priority"),
        ({"priority": True}, "priority"),
        ({"delay": -1}, "delay"),
        ({"delay": math.nan}, "delay"),
        ({"delay": math.inf}, "delay"),
        ({"delay": "5"}, "delay"),
        ({"delay": True}, "delay"),
        ({"delay": 10**400}, "delay"),
        ({"delay": timedelta(days=40_000)}, "delay"),
        ({"delay": timedelta(seconds=-1)}, "delay"),
        ({"run_at": NOON.replace(tzinfo=None)}, "run_at"),
        ({"run_at": NOON.replace(tzinfo=NoOffset())}, "run_at"),
        ({"run_at": "2026-03-01T12:00:00Z"}, "run_at"),
        ({"run_at": NOON.date()}, "run_at"),
        ({"run_at": 1_700_000_000}, "run_at"),
        ({"run_at": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))}, "run_at"),
        ({"run_at": datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-12)))}, "run_at"),
        ({"run_at": NOON, "delay": 1}, "not both"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"max_attempts": 32_768}, "max_attempts"),
        ({"max_attempts": 1.5}, "max_attempts"),
        ({"max_attempts": "3"}, "max_attempts"),
        ({"max_attempts": True}, "max_attempts"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": 1e300}, "timeout"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "x" * 501}, "idempotency_key"),
        ({"idempotency_key": "a\0b"}, "idempotency_key"),
        ({"idempotency_key": "a\nb"}, "idempotency_key"),
        ({"idempotency_key": "\ud800"}, "idempotency_key"),
        ({"idempotency_key": 7}, "idempotency_key"),
        ({"idempotency_key": b"k"}, "idempotency_key"),
        ({"idempotency_ttl": -1}, "idempotency_ttl"),
        ({"idempotency_ttl": "day"}, "idempotency_ttl"),
        ({"headers": {"a": 1}}, "headers"),
        ({"headers": {1: "a"}}, "headers"),
        ({"headers": [("a", SECRET)]}, "headers"),
        ({"headers": {"a": f"{SECRET}\0"}}, "headers"),
        ({"headers": {f"{SECRET}\0": "a"}}, "headers"),
        ({"headers": {"a": f"{SECRET}\ud800"}}, "headers"),
        ({"headers": {f"{SECRET}\ud800": "a"}}, "headers"),
        ({"headers": {"a": SECRET * 200_000}}, "headers"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_a_wrong_option_is_refused_by_name_and_never_with_a_headers_value(options, said):
    with pytest.raises(InvalidArguments) as caught:
        option(**options)

    assert str(caught.value).startswith("tidy.opts(")
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)
    str(caught.value).encode()


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="unique"):
        option(unique=True)


@pytest.mark.parametrize("key", ["k" * 500, "order:7/2", "żółw 🦆"], ids=ascii)
def test_printable_keys_of_up_to_500_characters_are_taken(key):
    assert option(idempotency_key=key).idempotency_key == key


def test_run_at_is_kept_as_the_same_moment():
    there = datetime(2026, 3, 1, 17, 45, tzinfo=timezone(timedelta(hours=5, minutes=45)))

    assert option(run_at=there).run_at == NOON


def test_no_headers_at_all_are_kept_as_such():
    assert option(headers={}).headers == "{}"


# What the command line fills in


def test_what_the_code_gave_wins_over_the_environment():
    jobs = JobQ(redis="redis://code")

    jobs.connect_to(database="postgresql://environment/db", redis="redis://environment")

    assert jobs.redis_url == "redis://code"
    assert jobs.given_database == "postgresql://environment/db"


def test_an_app_without_a_database_or_redis_says_how_to_give_one():
    with pytest.raises(ConfigurationError, match="JOBQ_DATABASE_URL"):
        _ = JobQ().database
    with pytest.raises(ConfigurationError, match="JOBQ_REDIS_URL"):
        _ = JobQ().redis_url


def test_on_dead_takes_async_functions_only():
    jobs = JobQ()

    async def alert(session: Any, job: Any) -> None: ...

    assert jobs.on_dead(alert) is alert
    with pytest.raises(ConfigurationError, match="async"):
        jobs.on_dead(lambda session, job: None)  # type: ignore[arg-type,return-value]
