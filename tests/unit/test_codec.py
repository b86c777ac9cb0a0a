"""Arguments to JSON and back: what is kept comes back as it was, what cannot be kept is refused by name."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import math
import re
import typing
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobq import ConfigurationError, InvalidArguments, JobQ
from jobq.codec import ArgumentCodec
from jobq.settings import ARGS_LIMIT

NAN = math.nan
SECRET = "hunter2"
LARGEST_INT = 2**63 - 1


class Colour(enum.Enum):
    RED = "red"


class Size(enum.IntEnum):
    SMALL = 1


@dataclasses.dataclass
class Point:
    x: float
    note: Any = None


class Line(NamedTuple):
    start: float
    note: Any = None


class Order(pydantic.BaseModel):
    id: int
    note: Any = None
    placed_at: datetime | None = None
    children: list[Order] = []


class Credentials(pydantic.BaseModel):
    key: pydantic.SecretStr


class OpenCredentials(pydantic.BaseModel):
    key: pydantic.SecretStr

    @pydantic.field_serializer("key", when_used="json")
    def _write(self, key: pydantic.SecretStr) -> str:
        return key.get_secret_value()


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]


class Text(str):
    pass


class Number(float):
    pass


def named(value: object) -> str:
    """A test's id: the same in every process, so without addresses in memory or the order of a set."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}({sorted(map(repr, value))})"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value) if not isinstance(value, str) else value)


def refuse(value: str) -> str:
    raise ValueError(f"{value} is not wanted")


class Stubborn(pydantic.BaseModel):
    text: str

    @pydantic.field_serializer("text")
    def _write(self, text: str) -> str:
        raise ValueError(f"cannot write {text}")


def codec_of(function: Callable[..., Any]) -> ArgumentCodec:
    return JobQ().task(function).codec


def codec_for(annotation: Any) -> ArgumentCodec:
    """The codec of a task `send(value: annotation)`."""

    def send(value):
        pass

    send.__annotations__ = {"value": annotation}
    return codec_of(send)


def refusal(annotation: Any, value: Any) -> str:
    """What InvalidArguments says of `send(value)`."""
    with pytest.raises(InvalidArguments) as caught:
        codec_for(annotation).encode((value,), {})
    return str(caught.value)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


# What is kept


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, LARGEST_INT),
        (int, -LARGEST_INT - 1),
        (float, 0.1),
        (float, -0.0),
        (float, 5e-324),
        (float, 1.7976931348623157e308),
        (bool, True),
        (str, ""),
        (str, 'quotes " and \\ backslash, :name, %s, {schema}, -- comment'),
        (str, "zażółć 漢字 🦆 \u2028 \x7f"),
        (str, "\\u0000 as six characters"),
        (bytes, "żółw".encode()),
        (type(None), None),
        (datetime, datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)),
        (datetime, datetime(2026, 3, 1, 12, 30, tzinfo=timezone(timedelta(hours=5, minutes=45)))),
        (datetime, datetime(2026, 3, 1, 12, 30)),  # noqa: DTZ001  one without a zone stays without
        (datetime, datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
        (date, date(1, 1, 1)),
        (time, time(23, 59, 59, 999999)),
        (timedelta, timedelta(days=-1, microseconds=1)),
        (timedelta, timedelta.max),
        (timedelta, timedelta.min),
        (uuid.UUID, uuid.UUID("01900000-0000-7000-8000-000000000001")),
        (Decimal, Decimal("1.10")),
        (Decimal, Decimal("123456789012345678901234567890.123456789")),
        (Colour, Colour.RED),
        (Size, Size.SMALL),
        (Point, Point(1.5, {"a": [1]})),
        (Line, Line(1.5, "x")),
        (Order, Order(id=7, placed_at=datetime(2026, 1, 1, tzinfo=UTC), children=[Order(id=8)])),
        (set[int], {1, 2, 3}),
        (frozenset[str], frozenset({"a", "b"})),
        (tuple[int, str], (1, "a")),
        (tuple[int, ...], (1, 2, 3)),
        (deque[int], deque([1, 2])),
        (Literal["a", 2], 2),
        (int | None, None),
        (int | str, "7"),
        (dict[int, str], {1: "a"}),
        (dict[uuid.UUID, list[tuple[date, Decimal | None]]], {uuid.UUID(int=1): [(date(2026, 1, 1), None)]}),
        (dict[str, list[Order]], {"open": [Order(id=1), Order(id=2)]}),
        (Annotated[int, pydantic.Field(ge=0)], 3),
        (Annotated[Cat | Dog, pydantic.Field(discriminator="kind")], Dog(kind="dog")),
        (Any, {"a": [1, 2.5, "x", None, True, {"b": []}]}),
        (OpenCredentials, OpenCredentials(key=pydantic.SecretStr(SECRET))),
    ],
    ids=named,
)
def test_a_value_comes_back_as_it_went_in(annotation, value):
    codec = codec_for(annotation)

    found = codec.decode(codec.encode((value,), {}))["value"]

    assert found == value
    assert type(found) is type(value)


def test_negative_zero_keeps_its_sign():
    codec = codec_for(float)

    found = codec.decode(codec.encode((-0.0,), {}))["value"]

    assert math.copysign(1, found) == -1


def test_arguments_are_kept_by_name_in_one_object_and_defaults_are_left_out():
    async def send(order_id: int, locale: str = "en", *, urgent: bool = False): ...

    codec = codec_of(send)

    assert json.loads(codec.encode((7,), {})) == {"order_id": 7}
    assert json.loads(codec.encode((7, "sv"), {"urgent": False})) == {"order_id": 7, "locale": "sv", "urgent": False}
    assert json.loads(codec.encode((), {"order_id": 7})) == {"order_id": 7}
    assert codec.decode('{"order_id": 7}') == {"order_id": 7}  # the function's own default applies at the run


def test_a_task_without_parameters_takes_nothing():
    async def tick(): ...

    codec = codec_of(tick)

    assert codec.encode((), {}) == "{}"
    assert codec.decode("{}") == {}


def test_a_parameter_without_annotation_takes_any_json():
    def send(value): ...

    codec = codec_of(send)

    assert codec.decode(codec.encode(([1, "a", None],), {})) == {"value": [1, "a", None]}


def test_what_an_annotation_can_turn_into_its_type_is_stored_as_that_type():
    assert json.loads(codec_for(int).encode(("7",), {})) == {"value": 7}


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-LARGEST_INT - 1, LARGEST_INT)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs", "Cc"])), inner),
)


@given(JSON_VALUES)
@settings(deadline=None)
def test_any_json_value_comes_back_as_it_went_in(value):
    codec = codec_for(Any)

    assert codec.decode(codec.encode((value,), {}))["value"] == value


# What is written without asking pydantic


def two(first: int, second: str = "") -> None: ...


def last_by_name(first: int, second: int = 0, *, third: int) -> None: ...


def all_by_name(*, first: int = 0) -> None: ...


ODD_VALUES = (
    *(True, 7, -LARGEST_INT - 2, LARGEST_INT + 1, 1.5, -0.0, 1e300, NAN, math.inf, "", "å", "\0", "\ud800", None),
    *("7", "*" * 10, "x" * (ARGS_LIMIT - 12), "x" * (ARGS_LIMIT - 11), Text("text"), Number(1.5), Size.SMALL, [7]),
)
PLAIN = (int, str, float, bool, None, int | None, int | float, float | str | None, Any)
OTHERS = (bytes, Size, Literal[7], Annotated[int, pydantic.Field(gt=7)], Annotated[str, []], uuid.UUID, int | Colour)


def said(write: Callable[..., str], *args: Any) -> str:
    try:
        return write(*args)
    except InvalidArguments as error:
        return str(error)


@pytest.mark.parametrize("annotation", [*PLAIN, *OTHERS], ids=str)
def test_plain_arguments_are_written_as_all_others_are(annotation):
    codec = codec_for(annotation)

    for value in ODD_VALUES:
        assert said(codec.encode, (value,), {}) == said(codec._written, {"value": value})


@pytest.mark.parametrize("annotation", PLAIN, ids=str)
def test_a_plain_type_asks_for_no_validation(annotation, monkeypatch):
    codec = codec_for(annotation)
    monkeypatch.setattr(codec, "_adapter", None)
    plain = [value for value in (True, 7, 1.5, "å", None) if annotation is Any or type(value) in types_of(annotation)]

    assert [json.loads(codec.encode((value,), {}))["value"] for value in plain] == plain
    assert plain != []


def types_of(annotation: Any) -> tuple[type, ...]:
    return tuple(one or type(None) for one in typing.get_args(annotation) or (annotation,))


@pytest.mark.parametrize("annotation", OTHERS, ids=str)
def test_any_other_annotation_does(annotation):
    codec = codec_for(annotation)

    assert [codec._written_plainly({"value": value}) for value in ODD_VALUES] == [None] * len(ODD_VALUES)


@pytest.mark.parametrize("function", [two, last_by_name, all_by_name], ids=lambda function: function.__name__)
def test_a_call_is_bound_as_python_binds_it(function):
    codec, signature = codec_of(function), inspect.signature(function)

    for args in ((), (1,), (1, 2), (1, 2, 3)):
        for kwargs in ({}, {"third": 3}, {"second": 2, "first": 1}, {"other": 1}):
            try:
                bound = list(signature.bind(*args, **kwargs).arguments.items())
            except TypeError:
                with pytest.raises(InvalidArguments):
                    codec._given(args, kwargs)
            else:
                assert list(codec._given(args, kwargs).items()) == bound


# What is refused


def send(order_id: int, locale: str = "en") -> None: ...


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "'order_id'"),
        ((), {"locale": "sv"}, "'order_id'"),
        ((1, "sv", SECRET), {}, "too many positional arguments"),
        ((1,), {"region": SECRET}, "'region'"),
        ((1,), {"order_id": SECRET}, "'order_id'"),
        ((SECRET,), {}, "order_id:"),
        ((None,), {}, "order_id:"),
        ((1.5,), {}, "order_id:"),
        ((1, 5), {}, "locale:"),
    ],
    ids=named,
)
def test_a_call_that_python_or_the_annotations_refuse_is_refused_by_name(args, kwargs, said):
    with pytest.raises(InvalidArguments) as caught:
        codec_of(send).encode(args, kwargs)

    assert "send()" in str(caught.value)
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)


def generator_of(value: Any) -> Iterable[Any]:
    return (item for item in [value])


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    ("annotation", "wrap"),
    [
        (float, lambda bad: bad),
        (float | None, lambda bad: bad),
        (list[float], lambda bad: [1.0, bad]),
        (dict[str, float], lambda bad: {"a": bad}),
        (tuple[float, ...], lambda bad: (bad,)),
        (Any, lambda bad: bad),
        (Any, lambda bad: {"a": [bad]}),
        (Any, lambda bad: {bad: 1}),
        (Any, Number),
        (Any, generator_of),
        (Any, Point),
        (Any, lambda bad: Point(1.0, bad)),
        (Any, Line),
        (Any, lambda bad: Order(id=1, note=bad)),
        (Any, lambda bad: [Order(id=1, children=[Order(id=2, note=[bad])])]),
        (Point, Point),
        (Point, lambda bad: Point(1.0, bad)),
        (Order, lambda bad: Order(id=1, note={"a": bad})),
        (Decimal, Decimal),
        (Any, Decimal),
        (list[Any], lambda bad: [Decimal(bad)]),
    ],
)
def test_nan_and_infinity_are_refused_wherever_they_stand(annotation, wrap, bad):
    said = refusal(annotation, wrap(bad))

    assert "value" in said
    assert "finite" in said


@pytest.mark.parametrize("surrogate", ["\ud800", "ok \udcff"], ids=ascii)
@pytest.mark.parametrize(
    ("annotation", "wrap"),
    [
        (str, lambda bad: bad),
        (str, Text),
        (list[str], lambda bad: ["fine", bad]),
        (dict[str, int], lambda bad: {bad: 1}),
        (Any, lambda bad: bad),
        (Any, Text),
        (Any, lambda bad: {"a": {bad: 1}}),
        (Any, lambda bad: {"a": [bad]}),
        (Point, lambda bad: Point(1.0, bad)),
        (Order, lambda bad: Order(id=1, note=bad)),
    ],
)
def test_a_lone_surrogate_is_refused_wherever_it_stands(annotation, wrap, surrogate):
    said = refusal(annotation, wrap(surrogate))

    assert "value" in said
    said.encode()  # the message itself can be printed


@pytest.mark.parametrize(
    ("annotation", "wrap"),
    [
        (str, lambda bad: bad),
        (bytes, str.encode),
        (dict[str, int], lambda bad: {bad: 1}),
        (Any, lambda bad: {"a": {bad: 1}}),
        (Any, lambda bad: [[bad]]),
        (Any, Text),
        (Any, lambda bad: Line(1.0, bad)),
        (Point, lambda bad: Point(1.0, bad)),
        (Order, lambda bad: Order(id=1, note=[bad])),
    ],
)
def test_a_nul_character_is_refused_wherever_it_stands(annotation, wrap):
    said = refusal(annotation, wrap("a\0b"))

    assert "value" in said
    assert "NUL" in said
    assert "\0" not in said


@pytest.mark.parametrize("bad", [LARGEST_INT + 1, -LARGEST_INT - 2, 10**30], ids=str)
@pytest.mark.parametrize(
    ("annotation", "wrap"),
    [
        (int, lambda bad: bad),
        (Any, lambda bad: bad),
        (Any, lambda bad: {bad: 1}),
        (list[int], lambda bad: [bad]),
        (Point, lambda bad: Point(1.0, bad)),
        (Order, lambda bad: Order(id=bad)),
    ],
)
def test_an_integer_beyond_64_bits_is_refused_wherever_it_stands(annotation, wrap, bad):
    said = refusal(annotation, wrap(bad))

    assert "value" in said
    assert "64 bits" in said
    assert str(bad) not in said


def test_arguments_may_nest_64_levels_with_their_object_and_no_more():
    codec = codec_for(Any)

    assert codec.decode(codec.encode((nested(63),), {}))["value"] == nested(63)
    assert "value.0.0" in refusal(Any, nested(64))
    assert "deeper than 64" in refusal(Any, nested(64))


def deep_dict(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def deep_order(levels: int) -> Order:
    order = Order(id=0)
    for _ in range(levels):
        order = Order.model_construct(id=0, children=[order])
    return order


def ring(kind: type) -> Any:
    if kind is Order:
        order = Order(id=0)
        order.children.append(order)
        return order
    value = kind()
    if kind is list:
        value.append(value)
    else:
        value["a"] = value
    return value


@pytest.mark.parametrize(
    ("annotation", "make"),
    [
        (Any, lambda: nested(20_000)),
        (list, lambda: nested(20_000)),
        (Any, lambda: deep_dict(20_000)),
        (pydantic.JsonValue, lambda: nested(20_000)),
        (Any, lambda: deep_order(20_000)),
        (Order, lambda: deep_order(20_000)),
        (Any, lambda: ring(list)),
        (Any, lambda: ring(dict)),
        (pydantic.JsonValue, lambda: ring(list)),
        (Any, lambda: ring(Order)),
        (Order, lambda: ring(Order)),
    ],
)
def test_endless_nesting_is_refused_and_breaks_nothing(annotation, make):
    said = refusal(annotation, make())

    assert "value" in said
    assert len(said) < 2_000


def test_arguments_may_take_one_mib_of_json_and_no_more():
    codec = codec_for(str)
    largest = "x" * (ARGS_LIMIT - len('{"value":""}'))

    assert len(codec.encode((largest,), {})) == ARGS_LIMIT
    assert "1,048,577 bytes" in refusal(str, largest + "x")
    assert "limit is 1,048,576" in refusal(str, "é" * (ARGS_LIMIT // 2))


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Any, object()),
        (Any, [object()]),
        (Any, print),
        (Any, Order),
        (Any, range(3)),
        (object, object()),
        (Any, b"\xff"),
        (bytes, b"\xff"),
        (Order, Order.model_construct(id=SECRET)),
    ],
    ids=named,
)
def test_what_is_not_json_is_refused_by_name(annotation, value):
    said = refusal(annotation, value)

    assert said.startswith("send(): value")
    assert SECRET not in said


@pytest.mark.parametrize(
    ("annotation", "value", "field"),
    [
        (int, SECRET, "value:"),
        (uuid.UUID, f"{SECRET}-and-more", "value:"),
        (datetime, SECRET, "value:"),
        (Decimal, SECRET, "value:"),
        (Colour, SECRET, "value:"),
        (Literal["a"], SECRET, "value:"),
        (list[int], [1, SECRET], "value.1:"),
        (dict[str, int], {"a": SECRET}, "value.a:"),
        (Order, {"id": SECRET}, "value.id:"),
        (Annotated[str, pydantic.Field(pattern="^a")], SECRET, "value:"),
        (Annotated[str, pydantic.AfterValidator(refuse)], SECRET, "value:"),
        (Annotated[Cat | Dog, pydantic.Field(discriminator="kind")], {"kind": SECRET}, "value:"),
        (Stubborn, Stubborn(text=SECRET), "value:"),
        (Order, Order.model_construct(id=SECRET), "value:"),
    ],
    ids=named,
)
def test_a_message_names_the_field_and_never_contains_the_value(annotation, value, field):
    said = refusal(annotation, value)

    assert said.startswith(f"send(): {field}")
    assert SECRET not in said


@pytest.mark.parametrize(
    ("annotation", "value"),
    [(dict[tuple[int, int], int], {(1, 2): 3}), (pydantic.Json, '{"a": 1}')],
    ids=["keys that are no strings", "text that becomes an object"],
)
def test_what_could_be_written_and_not_read_back_is_refused_now(annotation, value):
    assert refusal(annotation, value).startswith("send(): value")


def test_a_message_about_many_wrong_values_stays_short():
    said = refusal(list[int], ["x"] * 10_000)

    assert "value.0:" in said
    assert said.endswith("and 9,995 more")
    assert len(said) < 1_000


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (pydantic.SecretStr, pydantic.SecretStr(SECRET)),
        (Credentials, Credentials(key=pydantic.SecretStr(SECRET))),
        (Any, [pydantic.SecretStr(SECRET)]),
    ],
    ids=["secret", "model", "any"],
)
def test_a_secret_that_pydantic_would_mask_is_refused(annotation, value):
    said = refusal(annotation, value)

    assert "asterisks" in said
    assert SECRET not in said


def test_a_run_of_asterisks_is_text_like_any_other():
    codec = codec_for(str)

    assert codec.decode(codec.encode(("**********",), {})) == {"value": "**********"}


def test_an_annotation_that_json_cannot_hold_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match=r"'send'.*pass an id"):
        codec_for(Number)


# Reading


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "order_id: Field required"),
        ('{"order_id": "x"}', "order_id:"),
        ('{"order_id": null}', "order_id:"),
        ('{"order_id": 1, "gone": "hunter2"}', "gone: Extra inputs"),
        ("[]", "arguments:"),
        ("not json", "arguments:"),
        ("", "arguments:"),
        ('{"order_id": ' + "9" * 5000 + "}", "arguments:"),
        ('{"order_id": ' + "[" * 20_000 + "]" * 20_000 + "}", "arguments:"),
    ],
    ids=lambda text: text[:30],
)
def test_stored_arguments_that_do_not_fit_are_refused_by_name(text, said):
    with pytest.raises(InvalidArguments) as caught:
        codec_of(send).decode(text)

    assert said in str(caught.value)
    assert SECRET not in str(caught.value)
