"""Arguments of a task, and results of its steps, <-> the JSON kept in PostgreSQL, and the limits of what can be kept.

Invariant: what `encode` returns, every PostgreSQL and every JSON reader takes, and `decode` gives back to
the task as the annotations ask. What it cannot keep it refuses, naming the field; values never appear in a
message.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple, NotRequired, Required

import pydantic
import pydantic_core
from typing_extensions import TypedDict

from .errors import ConfigurationError, InvalidArguments, InvalidResult
from .settings import ARGS_LIMIT, NESTING_LIMIT

_make_typed_dict: Any = TypedDict  # type checkers know it only with literals
_SMALLEST_INT, _LARGEST_INT = -(2**63), 2**63 - 1
_PROBLEMS_NAMED = 5
_MASK = "**********"
"""What pydantic writes for a SecretStr."""


class ArgumentCodec:
    """The arguments of one task.

    1. binds a call to the signature, as Python would,
    2. validates each argument against its annotation, or sees that it is exactly of the plain type that this names,
    3. writes what was given, by name, as one JSON object, and reads it back before a run.
    """

    def __init__(self, task: str, parameters: Mapping[str, inspect.Parameter], hints: Mapping[str, Any]):
        self.task = task
        self._signature = inspect.Signature(list(parameters.values()))
        self._positional = [name for name, it in parameters.items() if it.kind is not it.KEYWORD_ONLY]
        required = [place for place, it in enumerate(parameters.values(), 1) if it.default is it.empty]
        self._fewest = max(required, default=0)
        self._plain_types = {name: _plain_types_of(hints.get(name, Any)) for name in parameters}
        fields: dict[str, Any] = {}
        for name, parameter in parameters.items():
            hint = hints.get(name, Any)
            fields[name] = Required[hint] if parameter.default is parameter.empty else NotRequired[hint]
        shape = _make_typed_dict("arguments", fields)
        shape.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")
        try:
            self._adapter: pydantic.TypeAdapter[dict[str, Any]] = pydantic.TypeAdapter(shape)
        except pydantic.errors.PydanticUserError as error:
            raise ConfigurationError(
                f"task {task!r}: an annotation cannot be kept as JSON ({_first_line(error)}); "
                "pass an id and load the object in the task"
            ) from error
        self._serializer = _serializer_of(self._adapter)

    def encode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Check one call's arguments and return them as JSON. Raises InvalidArguments."""
        given = self._given(args, kwargs)
        return self._written_plainly(given) or self._written(given)

    def _given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if not kwargs and self._fewest <= len(args) <= len(self._positional):  # what binding makes of it, in a tenth
            return dict(zip(self._positional, args, strict=False))
        try:
            return self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise InvalidArguments(f"{self.task}(): {error}") from None

    def _written_plainly(self, given: dict[str, Any]) -> str | None:
        """What `_written` returns, where each value is exactly of a plain type that is asked for; None elsewhere."""
        for name, value in given.items():
            kind = type(value)
            if kind not in self._plain_types[name] or (kind in _PROBLEMS and _PROBLEMS[kind](value)):
                return None
        data = pydantic_core.to_json(given)
        return data.decode() if len(data) <= ARGS_LIMIT else None

    def _written(self, given: dict[str, Any]) -> str:
        owner = f"{self.task}()"
        checked: dict[str, Any] = {}
        try:
            checked = self._adapter.validate_python(given)
            _refuse_faults(owner, checked)  # before a model's own settings write a NaN as null
            text = to_json(owner, self._plain(checked))
            again = self._adapter.validate_json(text)  # what cannot be read back is refused now, not at the run
        except pydantic.ValidationError as error:
            raise InvalidArguments(f"{owner}: {describe(error)}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidArguments(f"{owner}: {self._unwritable_field(checked)}: {_reason(error)}") from None
        if _MASK in text and again != checked:
            raise InvalidArguments(f"{owner}: a secret would be stored as asterisks; pass its name, or a plain str")
        return text

    def decode(self, text: str) -> dict[str, Any]:
        """Read stored arguments as the task wants them now. Raises InvalidArguments."""
        try:
            return self._adapter.validate_json(text)
        except pydantic.ValidationError as error:
            raise InvalidArguments(f"{self.task}(): {describe(error)}") from None

    def _plain(self, checked: dict[str, Any], only: set[str] | None = None) -> Any:
        return self._serializer.to_python(checked, mode="json", warnings="error", include=only)

    def _unwritable_field(self, checked: dict[str, Any]) -> str:
        for name in checked:
            try:
                self._plain(checked, {name})
            except (ValueError, TypeError, RecursionError):
                return name
        return "arguments"


class ResultCodec:
    """What a step may return, by the annotation of its function; without one, whatever is plain JSON.

    `decode(encode(result))` is what the task gets, at the first run and at every later one.
    """

    def __init__(self, annotation: Any):
        """Raises ConfigurationError for an annotation that JSON cannot hold, before anything is run."""
        try:
            self._adapter, self._serializer = _result_adapter(annotation)
        except TypeError:  # an annotation that cannot be hashed
            self._adapter, self._serializer = _result_adapter.__wrapped__(annotation)
        except pydantic.errors.PydanticUserError as error:
            raise ConfigurationError(f"its return type cannot be kept as JSON ({_first_line(error)})") from error

    def encode(self, result: Any) -> str:
        """Check a result and return it as JSON. Raises InvalidResult."""
        try:
            checked = self._adapter.validate_python(result)
            if (fault := _fault(checked, "result")) is not None:  # before a model's own settings write a NaN as null
                raise InvalidResult(f"{_shortened(fault.path)}: {fault.problem}")
            text = to_json("result", self._serializer.to_python(checked, mode="json", warnings="error"))
            again = self._adapter.validate_json(text)
        except pydantic.ValidationError as error:
            raise InvalidResult(f"result: is not of its annotated type ({describe(error)})") from None
        except InvalidArguments as error:
            raise InvalidResult(str(error)) from None
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidResult(f"result: {_reason(error)}") from None
        if _MASK in text and again != checked:
            raise InvalidResult("result: a secret would be kept as asterisks; return a plain str")
        return text

    def decode(self, text: str) -> Any:
        """Read a kept result as the annotation wants it now. Raises InvalidResult."""
        try:
            return self._adapter.validate_json(text)
        except pydantic.ValidationError as error:
            raise InvalidResult(
                f"result: what an earlier run has kept does not fit its annotated type ({describe(error)})"
            ) from None


@lru_cache(maxsize=256)
def _result_adapter(annotation: Any) -> tuple[pydantic.TypeAdapter[Any], pydantic_core.SchemaSerializer]:
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(annotation)
    return adapter, _serializer_of(adapter)


def _serializer_of(adapter: pydantic.TypeAdapter[Any]) -> pydantic_core.SchemaSerializer:
    # A type adapter has no say over values annotated Any: pydantic would write their NaN as null.
    return pydantic_core.SchemaSerializer(adapter.core_schema, pydantic_core.CoreConfig(ser_json_inf_nan="constants"))


def _plain_types_of(hint: Any) -> frozenset[type]:
    """The plain types of which a value is kept and read back as it is, whatever pydantic would do about others."""
    if hint is Any:
        return _PLAIN_TYPES
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    asked = typing.get_args(hint) if is_union else (hint,)
    found = frozenset(kind for kind in _PLAIN_TYPES if kind in asked)
    return found if len(found) == len(asked) else frozenset()


def describe(error: pydantic.ValidationError) -> str:
    """Name the wrong fields and what is wrong with them, without their values."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    named = [
        f"{_shortened('.'.join(map(str, problem['loc']))) or 'arguments'}: "
        f"{_WITHOUT_VALUE.get(problem['type'], problem['msg'])}"
        for problem in problems[:_PROBLEMS_NAMED]
    ]
    if len(problems) > _PROBLEMS_NAMED:
        named.append(f"and {len(problems) - _PROBLEMS_NAMED:,} more")
    return "; ".join(named)


def to_json(owner: str, value: Any) -> str:
    """Write plain values as JSON that PostgreSQL and other readers keep whole. Raises InvalidArguments.

    jsonb and text refuse NUL; UTF-8 has no lone surrogates; JSON knows no NaN or Infinity; most readers hold
    integers in 64 bits.
    """
    _refuse_faults(owner, value)
    data = pydantic_core.to_json(value)
    if len(data) > ARGS_LIMIT:
        raise InvalidArguments(
            f"{owner}: takes {len(data):,} bytes of JSON, the limit is {ARGS_LIMIT:,}; store the data and pass its id"
        )
    return data.decode()


class _Fault(NamedTuple):
    path: str
    problem: str


def _refuse_faults(owner: str, value: Any) -> None:
    fault = _fault(value)
    if fault is not None:
        raise InvalidArguments(f"{owner}: {_shortened(fault.path) or 'it'}: {fault.problem}")


def _fault(value: Any, path: str = "", depth: int = 0) -> _Fault | None:
    """The first thing in `value` that cannot be kept, with the path that leads to it."""
    kind = type(value)
    if kind in _CONTAINERS:
        return _fault_inside(value, path, depth + 1)
    if kind in _PROBLEMS:
        problem = _PROBLEMS[kind](value)
        return _Fault(path, problem) if problem else None
    if isinstance(value, pydantic.BaseModel):
        return _fault_inside(value.__dict__, path, depth + 1)
    return None


def _fault_inside(container: Any, path: str, depth: int) -> _Fault | None:
    if depth > NESTING_LIMIT:
        return _Fault(path, f"nested deeper than {NESTING_LIMIT} levels")
    is_mapping = isinstance(container, dict)
    for name, item in container.items() if is_mapping else enumerate(container):
        fault = _fault(name, f"a key of {path or 'it'}", depth) if is_mapping else None
        fault = fault or _fault(item, f"{path}.{name}" if path else str(name), depth)
        if fault is not None:
            return fault
    return None


def _problem_of_str(value: str) -> str | None:
    if "\0" in value:
        return "holds a NUL character, which PostgreSQL cannot store"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return "holds a lone surrogate, which is no character and has no UTF-8"
    return None


def _problem_of_int(value: int) -> str | None:
    if _SMALLEST_INT <= value <= _LARGEST_INT:
        return None
    return "is an integer beyond 64 bits; pass it as a string"


def _problem_of_float(value: float) -> str | None:
    return None if math.isfinite(value) else "is not a finite number, and JSON has no other"


def _problem_of_decimal(value: Decimal) -> str | None:
    return None if value.is_finite() else "is not a finite number"


_PLAIN_TYPES: frozenset[type] = frozenset({str, int, float, bool, types.NoneType})
_CONTAINERS = frozenset({dict, list, tuple, set, frozenset})
_PROBLEMS: dict[type, Callable[[Any], str | None]] = {
    str: _problem_of_str,
    int: _problem_of_int,
    float: _problem_of_float,
    Decimal: _problem_of_decimal,
}
_WITHOUT_VALUE = {
    # The application's own words, or pydantic's, that may repeat the value.
    "value_error": "refused by its validator",
    "assertion_error": "refused by its validator",
    "union_tag_invalid": "its tag names none of the expected types",
}


def _reason(error: BaseException) -> str:
    """What a serializer says, without the words of the application's own ones."""
    first = _first_line(error)
    if first.startswith("Error calling function"):
        return "its own serializer failed"
    return "is not of its annotated type" if first.startswith("Pydantic serializer warnings") else first


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _shortened(path: str) -> str:
    return path if len(path) <= 60 else f"{path[:57]}..."
