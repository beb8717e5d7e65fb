"""The promises of every method of target propagation, beyond those of every algorithm."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bioprop.algorithms import TargetAlgorithm
from bioprop.feedback.training import FeedbackTraining
from bioprop.networks import Network
from bioprop.testing.algorithms import AlgorithmContract
from bioprop.testing.helpers import (
    changed,
    copy_state,
    draw_batch,
    on_every_network,
    refused,
)


def training_of(algorithm: TargetAlgorithm) -> FeedbackTraining:
    """Return the training of feedback stage by stage, which the suite is for."""
    assert algorithm.feedback_training is not None
    return algorithm.feedback_training


class TargetPropagationContract(AlgorithmContract):
    """Promises of the methods with trained feedback weights."""

    phases = ("_train_feedback", "_local_gradients", "_step_forward_weights")

    @abstractmethod
    def make(self, network: Network, **settings: Any) -> TargetAlgorithm:
        """Make the algorithm."""

    def test_feedback_angles_are_between_the_weights_of_each_stage(self) -> None:
        algorithm = self.make(self.small_network())
        assert list(algorithm.feedback_angles()) == ["conv2", "fc1", "fc2"]
        assert all(45 < angle < 135 for angle in algorithm.feedback_angles().values())
        algorithm.symmetrize_feedback()
        assert all(angle < 1e-5 for angle in algorithm.feedback_angles().values())

    def test_there_is_no_feedback_to_the_input(self) -> None:
        names = {
            name.split(".")[1] for name in self.make(self.small_network()).state_dict() if name.startswith("feedback.")
        }
        assert names == {"conv2", "fc1", "fc2"}

    @on_every_network
    def test_symmetric_feedback_is_a_copy(self, build: Callable[[], Network], tmp_path: Path) -> None:
        algorithm = self.make(build(), iterations=0)
        algorithm.symmetrize_feedback()
        assert_not_aliased(algorithm)
        feedback = copy_state(algorithm.feedback)
        self.fit(algorithm, tmp_path)
        assert changed(feedback, copy_state(algorithm.feedback)) == set()

    def test_phase_1_trains_every_feedback_weight(self) -> None:
        algorithm = self.make(self.small_network())
        forward, feedback = copy_state(algorithm.network), copy_state(algorithm.feedback)
        losses = algorithm.train_feedback(draw_batch()[0])
        assert list(losses) == ["conv2", "fc1", "fc2"]
        assert changed(forward, copy_state(algorithm.network)) == set()
        assert {name for name in feedback if "weight" in name} <= changed(feedback, copy_state(algorithm.feedback))
        assert all(parameter.grad is None for parameter in algorithm.parameters())

    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_without_iterations_a_stages_feedback_stays(self, position: int) -> None:
        iterations = [2, 2, 2]
        iterations[position] = 0
        algorithm = self.make(self.small_network(), iterations=tuple(iterations))
        before = copy_state(algorithm.feedback)
        for _ in range(2):
            losses = algorithm.train_feedback(draw_batch()[0])
        still = ["conv2", "fc1", "fc2"][position]
        names = changed(before, copy_state(algorithm.feedback))
        assert {name.split(".")[0] for name in names} == {"conv2", "fc1", "fc2"} - {still} == set(losses)

    def test_stages_are_trained_independently(self) -> None:
        """The feedback that one stage learns does not depend on the settings of the others."""
        runs = []
        for settings in ({"iterations": (1, 3, 1)}, {"iterations": (4, 3, 0), "noise": (0.3, 0.1, 0.5)}):
            algorithm = self.made_from_seed(3, **({"noise": 0.1} | settings))
            algorithm.train_feedback(draw_batch()[0])
            runs.append(copy_state(algorithm.feedback["fc1"]))
        assert changed(*runs) == set()

    def test_every_batch_draws_noise_of_its_own(self) -> None:
        first, second, same = (self.made_from_seed(3) for _ in range(3))
        second.train_feedback(draw_batch(seed=9)[0])
        second.feedback.load_state_dict(first.feedback.state_dict())
        if (optimizer := training_of(second).optimizer) is not None:
            optimizer.state.clear()
        random_state = torch.get_rng_state()
        losses = [algorithm.train_feedback(draw_batch()[0]) for algorithm in (first, second, same)]
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(losses[0][name] == losses[2][name] != losses[1][name] for name in losses[0])

    def test_observers_see_every_iteration(self) -> None:
        events: list[Any] = []
        algorithm = self.make(self.small_network(), iterations=(2, 0, 3))
        with algorithm.observe_feedback(events.append):
            losses = algorithm.train_feedback(draw_batch()[0])
        algorithm.train_feedback(draw_batch()[0])
        assert [(event.stage, event.iteration) for event in events] == [
            *(("conv2", number) for number in range(2)),
            *(("fc2", number) for number in range(3)),
        ]
        for name in ("conv2", "fc2"):
            mean = torch.stack([event.loss for event in events if event.stage == name]).mean()
            torch.testing.assert_close(losses[name], mean)
        assert all(0 < event.angle < 180 for event in events)

    def test_observed_angles_are_those_after_the_step(self) -> None:
        events: list[Any] = []
        algorithm = self.make(self.small_network(), iterations=2)
        with algorithm.observe_feedback(events.append):
            algorithm.train_feedback(draw_batch()[0])
        last = {event.stage: event.angle.item() for event in events}
        assert last == pytest.approx(algorithm.feedback_angles(), abs=1e-9)

    def test_the_feedback_optimizers_momentum_survives_a_checkpoint(self, tmp_path: Path) -> None:
        algorithm = self.make(self.small_network())
        self.fit(algorithm, tmp_path).save_checkpoint(tmp_path / "one.ckpt")
        states = torch.load(tmp_path / "one.ckpt", weights_only=True)["optimizer_states"]
        assert len(states) == (1 if training_of(algorithm).optimizer is None else 2)
        assert all(state["state"] for state in states)

    @pytest.mark.parametrize("name", ["noise", "feedback_lr", "iterations"])
    @pytest.mark.parametrize("length", [0, 1, 2, 4])
    def test_lists_of_the_wrong_length_are_refused(self, name: str, length: int) -> None:
        with refused(f"{name} has {length} values", "3 stages", "conv2, fc1, fc2"):
            self.make(self.small_network(), **{name: (1,) * length})

    def test_a_single_value_stands_for_every_stage(self) -> None:
        algorithm = self.make(self.small_network(), noise=0.25, feedback_lr=(0.1, 0.2, 0.3), iterations=2)
        assert list(training_of(algorithm).noise.values()) == [0.25] * 3
        assert list(training_of(algorithm).feedback_lr.values()) == [0.1, 0.2, 0.3]
        assert list(training_of(algorithm).iterations.values()) == [2] * 3

    @pytest.mark.parametrize(
        ("name", "value", "shown"),
        [
            ("beta", 0.0, "0.0"),
            ("beta", -0.1, "-0.1"),
            ("beta", float("nan"), "nan"),
            ("noise", 0.0, "0.0"),
            ("noise", (0.1, -0.2, 0.1), "-0.2"),
            ("feedback_lr", 0.0, "0.0"),
            ("feedback_lr", (0.1, 0.1, float("nan")), "nan"),
            ("iterations", -1, "-1"),
            ("iterations", (1, -3, 1), "-3"),
            ("beta", float("inf"), "inf"),
            ("noise", (0.1, float("inf"), 0.1), "inf"),
            ("noise", "0.1", "'0.1'"),
            ("iterations", 2.5, "2.5"),
            ("feedback_momentum", 1.0, "1.0"),
            ("mirror", "mine", "'mine'"),
        ],
    )
    def test_values_out_of_range_are_refused(self, name: str, value: Any, shown: str) -> None:
        with refused(f"{name} ", f" {shown}"):
            self.make(self.small_network(), **{name: value})

    def test_numbers_of_other_libraries_become_plain_ones(self) -> None:
        algorithm = self.make(self.small_network(), noise=torch.tensor(0.5), feedback_lr=[np.float32(0.25)] * 3)
        assert algorithm.hparams["noise"] == 0.5
        training = training_of(algorithm)
        assert {type(value) for value in [*training.noise.values(), *training.feedback_lr.values()]} == {float}

    @pytest.mark.parametrize(
        ("name", "other", "named"),
        [
            ("beta", 0.4, "beta was 0.3 and is now 0.4"),
            ("noise", 0.2, "noise was 0.1 and is now 0.2"),
            ("iterations", (2, 2, 1), "iterations was 2 and is now [2, 2, 1]"),
            ("feedback_lr", 0.02, "feedback_lr was 0.01 and is now 0.02"),
        ],
    )
    def test_resuming_with_another_hyperparameter_is_refused(
        self, name: str, other: Any, named: str, tmp_path: Path
    ) -> None:
        first = {"beta": 0.3, "noise": 0.1, "iterations": 2, "feedback_lr": 0.01}
        self.fit(self.make(self.small_network(), **first), tmp_path).save_checkpoint(tmp_path / "half.ckpt")
        with refused(named):
            second = self.make(self.small_network(), **(first | {name: other}))
            self.fit(second, tmp_path, epochs=2, ckpt_path=tmp_path / "half.ckpt")


def assert_not_aliased(algorithm: TargetAlgorithm) -> None:
    """Forward and feedback weights are equal, in other memory, and an optimizer step on one leaves the other."""
    pairs = [pair for _, stage, mirror in algorithm.mirrored_stages() for pair in mirror.pairs(stage)]
    for forward, feedback in pairs:
        assert torch.equal(forward, feedback)
        assert forward.data_ptr() != feedback.data_ptr()
    before = [feedback.detach().clone() for _, feedback in pairs]
    for forward, _ in pairs:
        forward.grad = torch.ones_like(forward)
    if pairs:
        torch.optim.SGD([forward for forward, _ in pairs], lr=1e-3).step()
    for (forward, feedback), kept in zip(pairs, before, strict=True):
        assert torch.equal(feedback, kept)
        assert not torch.equal(forward, kept)
        forward.grad = None
