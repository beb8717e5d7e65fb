"""Options and classes that are gone: one sentence each says what took their place, wherever they are still given."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

from bioprop.errors import UserError

C = TypeVar("C", bound=type)

#: Options, by the name behind ``--model.``.
REMOVED = {
    "sampling": "sampling is gone: use second_noise, one of independent (as published), expected or echo",
    "speed.compile": "speed.compile is gone, since L-DRL no longer needs many iterations: leave it out",
}
#: Classes that a ``config.yaml`` may still name by their former place.
MOVED = {
    "bioprop.metrics_file.MetricsFile": "bioprop.runs.MetricsFile",
    "bioprop.metrics_file.NoMetrics": "bioprop.runs.NoMetrics",
}


def refuse_removed(names: Iterable[str]) -> None:
    """Look for options that are gone.

    Raises:
        UserError: saying what took the place of the first of them.
    """
    for name in names:
        if name in REMOVED:
            raise UserError(REMOVED[name])


def refuses_removed(group: str) -> Callable[[C], C]:
    """Make a class raise a UserError, not a TypeError, where it is called with an argument that is gone.

    Args:
        group: first part of the arguments' names on the command line, with its dot.
    """

    def decorate(cls: C) -> C:
        init = cls.__init__  # type: ignore[misc]

        @wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            refuse_removed(f"{group}{name}" for name in kwargs)
            init(self, *args, **kwargs)

        cls.__init__ = checked  # type: ignore[misc]
        return cls

    return decorate
