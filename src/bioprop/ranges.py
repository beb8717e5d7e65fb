"""Checks of hyperparameters: numbers, ranges, one value a stage."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bioprop.errors import UserError

#: What a hyperparameter may be instead of numbers, where an algorithm finds them itself.
AUTO = "auto"


def per_stage(
    name: str, value: float | str | Sequence[float], stages: Sequence[str], whole: bool = False, auto: bool = False
) -> dict[str, Any]:
    """Spread a single value over all stages, or take exactly one value a stage.

    Args:
        name: name of the hyperparameter, for the message.
        value: one number for all, or a sequence of numbers.
        stages: names of the stages that need a value, from the input to the output.
        whole: whether the numbers must be whole ones.
        auto: whether the value may be `AUTO`.

    Returns:
        A plain int or float by name of stage; None for each where the value is `AUTO`.

    Raises:
        UserError: if a sequence is not exactly as long as there are stages, or an entry is not such a number.
    """
    if auto and isinstance(value, str):
        if value != AUTO:
            raise UserError(f"{name} is {value!r}, but it must be {AUTO}, a number, or one number a stage")
        return dict.fromkeys(stages)
    listed = value.tolist() if hasattr(value, "tolist") else value  # numpy's and torch's numbers and vectors
    values = list(listed) if isinstance(listed, Sequence) and not isinstance(listed, str) else [listed] * len(stages)
    if len(values) != len(stages):
        raise UserError(
            f"{name} has {len(values)} values {values}, but {len(stages)} stages need one each "
            f"({', '.join(stages)}): give that many, or a single value for all"
        )
    return {stage: number(name, item, whole) for stage, item in zip(stages, values, strict=True)}


def number(name: str, value: Any, whole: bool = False) -> float:
    """Return a finite plain number (numpy's and one-element tensors too).

    Raises:
        UserError: if the value is not a number, not finite, or not whole where it must be.
    """
    kind = "a whole number" if whole else "a finite number"
    if isinstance(value, str | bool) or not hasattr(value, "__float__") or not math.isfinite(float(value)):
        raise UserError(f"{name} holds {value!r}, but it must be {kind}")
    if whole and float(value) != int(value):
        raise UserError(f"{name} holds {value}, but it must be {kind}")
    return int(value) if whole else float(value)


def count(name: str, value: int, low: int = 0) -> int:
    """Return a whole number, at least ``low``.

    Raises:
        UserError: naming the hyperparameter.
    """
    counted = int(number(name, value, whole=True))
    check_range(name, [counted], low)
    return counted


def check_range(name: str, values: Iterable[float], low: float, low_allowed: bool = True) -> None:
    """Refuse numbers below ``low``, or at it unless ``low_allowed``.

    Raises:
        UserError: naming the hyperparameter and the first value out of range.
    """
    for value in values:
        if value < low or (value == low and not low_allowed):
            raise UserError(f"{name} is {value}, but it must be {'at least' if low_allowed else 'above'} {low:g}")
