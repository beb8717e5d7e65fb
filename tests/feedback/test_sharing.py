"""The other ways in which several processes share feedback training."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from bioprop.algorithms import DTP, LDRL, Algorithm, ParallelLDRL
from bioprop.feedback.sharing import share_stages
from bioprop.feedback.speed import DEFAULT_SPEED, Sharing
from bioprop.networks import Network
from bioprop.networks.stages import StagePass
from bioprop.testing import AlgorithmContract
from bioprop.testing.helpers import Weights, changed, refused, sgd, small_lenet
from bioprop.testing.processes import ProcessPool
from bioprop.testing.shared_training import Trained, train
from tests.algorithms.plain_models import RESNETS


class _Suite(AlgorithmContract):
    """Names an algorithm for `train`; pytest collects none of it."""

    __test__ = False
    algorithm: type[Algorithm]
    own: ClassVar[dict[str, Any]]

    def make(self, network: Network, **settings: Any) -> Algorithm:
        return self.algorithm(network, **(self.own | settings))


class EchoingLDRL(_Suite):
    """Of its stages, one takes one iteration of white noise and two a second one along the activities."""

    algorithm, own = LDRL, {}


class ExpectedLDRL(_Suite):
    algorithm, own = LDRL, {"second_noise": "expected"}


class NormalizedLDRL(_Suite):
    algorithm = LDRL
    own: ClassVar = {"second_noise": "independent", "noise": 0.1, "feedback_lr": 0.05, "iterations": (4, 0, 3)}


class PublishedLDRL(_Suite):
    algorithm = LDRL
    own: ClassVar = {
        "second_noise": "independent",
        "noise": 0.1,
        "iterations": 3,
        "feedback_step": "sgd",
        "feedback_lr": 0.02,
        "switches": "noisy",
        "mirror": "paper",
    }


class Parallel(_Suite):
    algorithm, own = ParallelLDRL, {"samples": 2, "iterations": (2, 1, 1), "feedback_step": "sgd", "feedback_lr": 0.1}


class EchoingParallel(_Suite):
    algorithm, own = ParallelLDRL, {"samples": 2}


class Reconstructing(_Suite):
    algorithm, own = DTP, {"iterations": 2}


class OnBatchNorm(_Suite):
    algorithm, own = LDRL, {"iterations": 2}

    def make(self, network: Network, **settings: Any) -> Algorithm:
        return super().make(RESNETS["resnet"](), **settings)


SUITES = [EchoingLDRL, ExpectedLDRL, NormalizedLDRL, PublishedLDRL, Parallel, EchoingParallel, Reconstructing]


def settings_of(sharing: Sharing) -> dict[str, Any]:
    return {"optimizer": sgd(), "speed": replace(DEFAULT_SPEED, processes=sharing)}


def states(trained: Trained) -> list[Weights]:
    return trained[1]


@pytest.mark.parametrize("suite", SUITES)
def test_shared_stages_equal_one_process_bit_for_bit(suite: type[_Suite], processes: ProcessPool) -> None:
    alone = states(train(suite, settings_of("stages"), same_noise=False))
    for trained in processes.run(train, suite, settings_of("stages"), False):
        for whole, shared in zip(alone, states(trained), strict=True):
            missing = shared.keys() - whole.keys()  # the momentum of weights that are never stepped
            assert all(not shared[name].any() for name in missing)
            assert changed(whole, {name: shared[name] for name in whole}) == set()


@pytest.mark.parametrize("sharing", ["gradients", "stages"])
@pytest.mark.parametrize("suite", [EchoingLDRL, EchoingParallel, ExpectedLDRL])
def test_an_echo_on_a_part_of_the_batch_is_that_of_one_process(
    suite: type[_Suite], sharing: Sharing, processes: ProcessPool
) -> None:
    """Of 24 images, one stage of `small_lenet` needs 8, one 16, and one more than all: white noise and activities."""
    same_noise = sharing == "gradients"
    alone = states(train(suite, settings_of(sharing), same_noise, 24))
    for trained in processes.run(train, suite, settings_of(sharing), same_noise, 24):
        for whole, shared in zip(alone, states(trained), strict=True):
            torch.testing.assert_close(shared, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("suite", SUITES)
def test_weights_averaged_once_a_batch_are_the_same_everywhere(suite: type[_Suite], processes: ProcessPool) -> None:
    first, second = (states(each) for each in processes.run(train, suite, settings_of("weights")))
    alone = states(train(suite, settings_of("gradients")))
    for one, other in zip(first, second, strict=True):
        assert changed(one, other) == set()
    differing = changed({name: alone[0][name] for name in first[0]}, first[0])
    assert "feedback.fc2.weight" in differing  # it is another method


def test_every_process_draws_noise_of_its_own(processes: ProcessPool) -> None:
    with_same = states(processes.run(train, NormalizedLDRL, settings_of("gradients"), True)[0])
    with_own = [states(each) for each in processes.run(train, NormalizedLDRL, settings_of("gradients"), False)]
    assert changed(with_own[0][0], with_own[1][0]) == set()
    assert "feedback.fc2.weight" in changed(with_same[0], with_own[0][0])


def test_running_statistics_are_the_same_everywhere(processes: ProcessPool) -> None:
    first, second = (states(each) for each in processes.run(train, OnBatchNorm, settings_of("gradients")))
    assert any("running_var" in name for name in first[0])
    assert changed(first[0], second[0]) == set()


def test_stages_are_divided_by_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bioprop.feedback.sharing.process_count", lambda: 2)
    maps, units = torch.zeros(1, 2, 5, 5), torch.zeros(1, 9)
    passes = {
        "conv": StagePass(maps, maps, maps, None),  # 25 positions
        "wide": StagePass(units, units, units, None),
        "narrow": StagePass(units, units, units, None),
        "block": StagePass(maps, None, maps, None),
    }
    weights = {"conv": 4, "wide": 500, "narrow": 50, "block": 2}
    # 300 + 50, 500, 100 + 50: the largest alone, then always to whoever has less
    assert share_stages(passes, weights, [3, 1, 2, 1]) == [1, 0, 1, 1]
    assert share_stages(passes, weights, [30, 1, 1, 1]) == [0, 1, 1, 1]


def test_another_way_is_refused() -> None:
    with refused("speed.processes 'rows' is not known", "stages"):
        LDRL(small_lenet(), speed=replace(DEFAULT_SPEED, processes="rows"))
