"""Feedback training of single stages: plain, in closed form, compiled."""

from collections.abc import Callable

from benchmarks.settings import Setting
from benchmarks.twins import plain_twin
from bioprop.algorithms import LDRL
from bioprop.functional.speed import Speed
from bioprop.networks.local_gradients import run_stages

#: Plain and ours, in the order of the table.
PLAIN, CLOSED, COMPILED = "plain", "closed form", "compiled"


def stage_runs(
    setting: Setting, iterations: int, batch: int | None = None, compile: bool = False
) -> dict[tuple[str, str], Callable[[], None]]:
    """Make calls that train one stage's feedback weights on one batch, its clean pass not included.

    Args:
        setting: the network and its hyperparameters.
        iterations: feedback iterations a call.
        batch: images; None for those of the setting.
        compile: with the compiled variant.

    Returns:
        Calls by name of stage and variant.
    """
    speeds = {CLOSED: Speed()} | ({COMPILED: Speed(compile=True)} if compile else {})
    ours = {variant: setting.ldrl(speed=speed) for variant, speed in speeds.items()}
    plain = plain_twin(ours[CLOSED])
    images, _ = setting.draw(batch)
    passes = run_stages(ours[CLOSED].network, images)
    states, switches = plain.run(images)
    plain.iterations = [iterations] * len(setting.iterations)
    runs: dict[tuple[str, str], Callable[[], None]] = {}
    for place, (name, _, _) in enumerate(ours[CLOSED].mirrored_stages()):

        def train_plain(number: int = place + 1) -> None:
            plain.train_stage(number, states[number], states[number + 1], switches[number])

        runs[name, PLAIN] = train_plain
        for variant, algorithm in ours.items():

            def train_ours(place: int = place, algorithm: LDRL = algorithm) -> None:
                # the other stages stay as they are
                algorithm.iterations = tuple(iterations * (other == place) for other in range(len(setting.iterations)))
                algorithm._train_feedback(passes)

            runs[name, variant] = train_ours
    return runs
