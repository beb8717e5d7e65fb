"""Feedback training of single stages: plain and in closed form."""

from collections.abc import Callable

from benchmarks.settings import Setting
from benchmarks.twins import plain_twin
from bioprop.algorithms import LDRL

#: Plain and ours, in the order of the table.
PLAIN, CLOSED = "plain", "closed form"


def stage_runs(
    setting: Setting, iterations: int, batch: int | None = None
) -> dict[tuple[str, str], Callable[[], None]]:
    """Make calls that train one stage's feedback weights on one batch, its clean pass not included.

    Args:
        setting: the network and its hyperparameters.
        iterations: feedback iterations a call.
        batch: images; None for those of the setting.

    Returns:
        Calls by name of stage and variant.
    """
    ours = setting.ldrl()
    plain = plain_twin(setting, ours)
    images, _ = setting.draw(batch)
    passes = ours.clean_passes(images)
    states, switches = plain.run(images)
    plain.iterations = [iterations] * len(setting.iterations)
    runs: dict[tuple[str, str], Callable[[], None]] = {}
    for place, (name, _, _) in enumerate(ours.mirrored_stages()):

        def train_plain(number: int = place + 1) -> None:
            plain.train_stage(number, states[number], states[number + 1], switches[number])

        # the other stages stay as they are
        alone = setting.ldrl(
            iterations=tuple(iterations * (other == place) for other in range(len(setting.iterations)))
        )

        def train_ours(alone: LDRL = alone) -> None:
            alone._train_feedback(passes)

        runs[name, PLAIN], runs[name, CLOSED] = train_plain, train_ours
    return runs
