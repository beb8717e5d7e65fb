"""Options and classes that are gone: one sentence each says what took their place, wherever they are still named."""

from collections.abc import Iterable

from bioprop.errors import UserError

#: Options, by the name behind ``--model.``.
REMOVED = {
    "sampling": "sampling is gone: use second_noise, one of independent (as published), expected or echo",
    "speed.compile": "speed.compile is gone, since L-DRL no longer needs many iterations: leave it out",
    "on_device": "on_device is gone, since images that fit live on the GPU by themselves: leave it out",
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
