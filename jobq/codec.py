"""Arguments of a task <-> the JSON object kept in the outbox, and the limits of what can be kept.

Invariant: what `encode` returns, every PostgreSQL and every JSON reader takes, and `decode` gives back to
the task as its annotations ask. What it cannot keep it refuses, naming the field; values never appear in a
message.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NotRequired, Required

import pydantic
import pydantic_core
from typing_extensions import TypedDict

from .errors import ConfigurationError, InvalidArguments
from .settings import ARGS_LIMIT, NESTING_LIMIT

_make_typed_dict: Any = TypedDict  # type checkers know it only with literals
_SMALLEST_INT, _LARGEST_INT = -(2**63), 2**63 - 1


class ArgumentCodec:
    """The arguments of one task.

    1. binds a call to the signature, as Python would,
    2. validates each argument against its annotation,
    3. writes what was given, by name, as one JSON object, and reads it back before a run.
    """

    def __init__(self, task: str, parameters: Mapping[str, inspect.Parameter], hints: Mapping[str, Any]):
        self.task = task
        self._signature = inspect.Signature(list(parameters.values()))
        fields: dict[str, Any] = {}
        for name, parameter in parameters.items():
            hint = hints.get(name, Any)
            fields[name] = Required[hint] if parameter.default is parameter.empty else NotRequired[hint]
        shape = _make_typed_dict("arguments", fields)
        shape.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", ser_json_inf_nan="constants")
        try:
            self._adapter: pydantic.TypeAdapter[dict[str, Any]] = pydantic.TypeAdapter(shape)
        except pydantic.errors.PydanticUserError as error:
            raise ConfigurationError(
                f"task {task!r}: an annotation cannot be kept as JSON ({str(error).splitlines()[0]}); "
                "pass an id and load the object in the task"
            ) from error

    def encode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Check one call's arguments and return them as JSON. Raises InvalidArguments."""
        try:
            given = self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise InvalidArguments(f"{self.task}(): {error}") from None
        try:
            checked = self._adapter.validate_python(given)
            _refuse_faults(self.task, checked)  # before pydantic writes a NaN as null
            text = to_json(self.task, self._adapter.dump_python(checked, mode="json", warnings="error"))
            self._adapter.validate_json(text)  # what cannot be read back is refused now, not at the run
            return text
        except pydantic.ValidationError as error:
            raise InvalidArguments(f"{self.task}(): {describe(error)}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidArguments(f"{self.task}(): {_unwritable_field(given)}: {_first_line(error)}") from None

    def decode(self, text: str) -> dict[str, Any]:
        """Read stored arguments as the task wants them now. Raises InvalidArguments."""
        try:
            return self._adapter.validate_json(text)
        except pydantic.ValidationError as error:
            raise InvalidArguments(f"{self.task}(): {describe(error)}") from None


def describe(error: pydantic.ValidationError) -> str:
    """Name each wrong field and what is wrong with it, without its value."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, p['loc'])) or 'arguments'}: {p['msg']}" for p in problems)


def to_json(owner: str, value: Any) -> str:
    """Write plain values as JSON that PostgreSQL and other readers keep whole. Raises InvalidArguments.

    jsonb and text refuse NUL; JSON knows no NaN or Infinity; most readers hold integers in 64 bits.
    """
    _refuse_faults(owner, value)
    data = pydantic_core.to_json(value)
    if len(data) > ARGS_LIMIT:
        raise InvalidArguments(
            f"{owner}(): arguments take {len(data):,} bytes of JSON, the limit is {ARGS_LIMIT:,}; "
            "store the data and pass its id"
        )
    return data.decode()


def _unwritable_field(given: Mapping[str, Any]) -> str:
    for name, value in given.items():
        try:
            pydantic_core.to_json(value)
        except (ValueError, TypeError, RecursionError):
            return name
    return "arguments"


def _shortened(path: str) -> str:
    return path if len(path) <= 60 else f"{path[:57]}..."


class _Fault(NamedTuple):
    path: str
    problem: str


def _refuse_faults(owner: str, value: Any) -> None:
    for fault in _faults(value):
        raise InvalidArguments(f"{owner}(): {_shortened(fault.path)}: {fault.problem}")


def _faults(value: Any, path: str = "", depth: int = 0) -> list[_Fault]:
    """The first thing in `value` that cannot be kept, with the path that leads to it."""
    kind = type(value)
    if kind in _CONTAINERS:
        if depth >= NESTING_LIMIT:
            return [_Fault(path, f"nested deeper than {NESTING_LIMIT} levels")]
        for name, item in value.items() if kind is dict else enumerate(value):
            at = f"{path}.{name}" if path else str(name)
            if faults := _faults(item, at, depth + 1) or (_scalar_faults(name, path) if kind is dict else []):
                return faults
        return []
    return _scalar_faults(value, path)


def _scalar_faults(value: Any, path: str) -> list[_Fault]:
    problem = _PROBLEMS.get(type(value), _no_problem)(value)
    return [_Fault(path, problem)] if problem else []


def _no_problem(value: Any) -> str | None:
    return None


def _problem_of_str(value: str) -> str | None:
    return "holds a NUL character, which PostgreSQL cannot store" if "\0" in value else None


def _problem_of_int(value: int) -> str | None:
    if _SMALLEST_INT <= value <= _LARGEST_INT:
        return None
    return "is an integer beyond 64 bits; pass it as a string"


def _problem_of_float(value: float) -> str | None:
    finite = value - value == 0.0
    return None if finite else "is not a finite number, and JSON has no other"


_CONTAINERS = frozenset({dict, list, tuple, set, frozenset})
_PROBLEMS: dict[type, Callable[[Any], str | None]] = {
    str: _problem_of_str,
    int: _problem_of_int,
    float: _problem_of_float,
}


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
