"""Whole L-DRL steps by tiles against L-DRL written plainly."""

from collections.abc import Iterator
from functools import partial

import pytest
from torch import Tensor

import bioprop.algorithms.ldrl as ldrl
from benchmarks.learners import algorithm_learner
from benchmarks.settings import Setting
from benchmarks.twins import STEPS, TOLERANCE, differences, plain_twin, recorded_noise
from bioprop.functional.pooling import Pool
from bioprop.functional.speed import Speed
from bioprop.functional.tiled_feedback import TiledFeedback
from bioprop.networks import ConvStage, LinearStage, Network

BATCH = 5


def three_stages(pool: Pool) -> Network:
    below = ConvStage((3, 16, 16), 64, 3, padding=1, pool=Pool(2, 2))
    middle = ConvStage(below.output_shape, 65, 3, padding=1, pool=pool)
    return Network({"below": below, "middle": middle, "top": LinearStage(middle.output_shape, 4, "identity")}, {})


def shaped(noise: Tensor, like: Tensor) -> Tensor:
    """Noise as plain takes it: that of tiles has the batch innermost, that of linear stages is flat."""
    if len(noise) == len(like):
        return noise.reshape(like.shape)
    return noise.view(*like.shape[1:], len(like)).permute(3, 0, 1, 2)


@pytest.mark.parametrize("pool", [Pool(2, 2), Pool(3, 2, 1)], ids=str)
def test_two_steps_by_tiles_are_those_written_plainly(monkeypatch: pytest.MonkeyPatch, pool: Pool) -> None:
    made: list[TiledFeedback] = []

    def uncompiled(*args: object, compile: bool) -> TiledFeedback:
        assert compile
        made.append(TiledFeedback(*args, compile=False))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(ldrl, "TiledFeedback", uncompiled)
    setting = Setting(partial(three_stages, pool), BATCH, 0.5, (0.3, 0.2), (1e-3, 1e-2), (3, 2))
    algorithm = setting.ldrl(speed=Speed(compile=True)).double()
    plain = plain_twin(algorithm)
    images, labels = setting.draw()
    with recorded_noise() as draws:
        learner = algorithm_learner(algorithm)
        for _ in range(STEPS):
            learner.step(images.double(), labels)
    noise: Iterator[Tensor] = iter(draws)
    plain.draw = lambda like, sigma: shaped(next(noise), like)
    for _ in range(STEPS):
        plain.step(images.double(), labels)
    assert len(made) == STEPS
    assert not [*noise]
    assert max(differences(algorithm, plain).values()) <= TOLERANCE


@pytest.mark.slow  # a compiler takes its time
def test_feedback_trained_by_compiled_tiles_comes_closer() -> None:
    setting = Setting(partial(three_stages, Pool(2, 2)), 64, 0.5, (0.1, 0.1), (0.1, 0.1), (20, 20))
    algorithm = setting.ldrl(speed=Speed(compile=True), switches="clean", mirror="exact", feedback_step="normalized")
    before = algorithm.feedback_angles()
    for _ in range(3):
        algorithm.train_feedback(setting.draw()[0])
    assert all(angle < before[name] - 20 for name, angle in algorithm.feedback_angles().items())
