"""The arguments an algorithm was made with, collected from its constructor and turned into plain data."""

import inspect
from collections.abc import Container, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any, NamedTuple

import torch


class Hyperparameters(NamedTuple):
    """The constructor arguments of an object, by name, as plain data (`plain`).

    Attributes:
        given: arguments of the object's own class, defaults included, which the class takes again.
        objects: arguments of the object's own class whose plain form the class would not take: functions and other
            objects that are no data, of which only a description is left.
        inherited: further arguments that its class handed, or left, to the constructors of its base classes.
    """

    given: dict[str, Any]
    objects: dict[str, Any]
    inherited: dict[str, Any]


def collect_hyperparameters(
    made: object, args: tuple[Any, ...], kwargs: Mapping[str, Any], left_out: Container[str]
) -> Hyperparameters:
    """Collect what the constructors of an object were called with; to be called within the innermost of them.

    Constructors may change their arguments before they call those of their base classes. Hence those of the object's
    own class are taken from the call, those of its base classes from the frames of their constructors.

    Args:
        made: the object under construction.
        args: positional arguments its class was called with.
        kwargs: keyword arguments its class was called with.
        left_out: names of arguments that are not collected.
    """
    call = inspect.signature(type(made).__init__).bind(made, *args, **kwargs)
    call.apply_defaults()
    own: dict[str, Any] = {}
    for name, parameter in list(call.signature.parameters.items())[1:]:
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            own |= call.arguments[name]
        elif parameter.kind != inspect.Parameter.VAR_POSITIONAL:
            own[name] = call.arguments[name]
    own = {name: value for name, value in own.items() if name not in left_out}
    return Hyperparameters(
        {name: plain(value) for name, value in own.items() if _is_data(value)},
        {name: plain(value) for name, value in own.items() if not _is_data(value)},
        {
            name: plain(value)
            for name, value in _arguments_of_constructors(made).items()
            if name not in left_out and name not in own
        },
    )


def _arguments_of_constructors(made: object) -> dict[str, Any]:
    """Merge the arguments of all constructors that are at work on an object; those of derived classes come first."""
    found: dict[str, Any] = {}
    frame = inspect.currentframe()
    while frame is not None:
        names, positional, keywords, values = inspect.getargvalues(frame)
        if frame.f_code.co_name == "__init__" and names and values.get(names[0]) is made:
            found |= {name: values[name] for name in (*names[1:], positional) if name in values}
            found |= values.get(keywords, {}) if keywords else {}
        frame = frame.f_back
    return found


def plain(value: Any) -> Any:
    """Turn a value into what a checkpoint or YAML file would give back: lists, and Python's own numbers and texts.

    Tuples and arrays become lists, dataclasses mappings. Functions and classes become their names, other objects the
    name of their class, so that they can be compared.
    """
    if isinstance(value, Enum | PurePath | torch.dtype | torch.device):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's and torch's numbers and arrays, some of which are Python's numbers too
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__name__)


def _is_data(value: Any) -> bool:
    """Return whether a constructor that takes a value takes its plain form too."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_data(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_data, value))
    numbers = value is None or isinstance(value, bool | int | float | str) or hasattr(value, "tolist")
    return numbers and not isinstance(value, Enum)
