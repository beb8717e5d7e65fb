"""Timing in turns, so that whatever else the machine does falls on all alike."""

from collections.abc import Callable, Mapping
from time import perf_counter


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    repeats: Mapping[str, int] | None = None,
    warm_ups: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Run everything in turns and return the seconds of each call.

    Args:
        runs: calls to time, by name.
        rounds: timed rounds.
        repeats: calls a round, by name; 1 where missing.
        warm_ups: calls before the first round, in place of everything once.
    """
    for warm_up in (warm_ups or runs).values():
        warm_up()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range((repeats or {}).get(name, 1)):
                start = perf_counter()
                run()
                seconds[name].append(perf_counter() - start)
    return seconds
