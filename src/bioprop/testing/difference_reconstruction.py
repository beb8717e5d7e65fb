"""The promises of every method of the DRL family, beyond those of every algorithm."""

import logging
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LRScheduler

from bioprop.algorithms import DifferenceReconstruction
from bioprop.networks import Network
from bioprop.testing.algorithms import AlgorithmContract
from bioprop.testing.helpers import (
    changed,
    copy_state,
    cosine,
    draw_batch,
    make_loader,
    make_trainer,
    refused,
    sgd,
)

adam = torch.optim.Adam


class Epochs(Callback):
    """Records for every epoch whether forward and feedback weights moved, and the forward learning rate after it."""

    def __init__(self) -> None:
        self.course: list[tuple[bool, bool]] = []
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = copy_state(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        moved = changed(self.before, copy_state(pl_module))
        forward = {name for name in self.before if name.startswith("network.")}
        assert moved & forward in (forward, set())  # all of them or none
        self.course.append((bool(moved & forward), any(name.startswith("feedback.") for name in moved)))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class DifferenceReconstructionContract(AlgorithmContract):
    """Promises of feedback trained through all stages above.

    On one batch it takes more steps than the suite of all algorithms, with more for the feedback, which starts from any
    direction.

    Attributes:
        operators: names of LeNet's stages that have feedback weights.
    """

    phases = ("_train_feedback", "_local_gradients", "_step_forward_weights")
    loss_falls_to = 0.5
    one_batch_epochs = 60
    one_batch_settings: Mapping[str, Any] = {
        "iterations": 5,
        "feedback_lr": 0.01,
        "optimizer": partial(torch.optim.Adam, lr=0.005),
    }
    operators = ("conv1", "conv2", "fc1")

    @abstractmethod
    def make(self, network: Network, **settings: Any) -> DifferenceReconstruction:
        """Make the algorithm."""

    # -- feedback training -------------------------------------------------------------------------------------------

    def test_phase_1_trains_every_feedback_weight(self) -> None:
        algorithm = self.make(self.small_network())
        before, feedback = copy_state(algorithm), copy_state(algorithm.feedback)
        losses = algorithm.train_feedback(draw_batch()[0])
        assert tuple(losses) == tuple(algorithm.feedback) == self.operators
        assert all(loss.dim() == 0 and loss > 0 for loss in losses.values())
        moved = changed(before, copy_state(algorithm))
        assert moved == {f"feedback.{name}" for name in feedback} | {"streams.batches"}
        assert all(parameter.grad is None for parameter in algorithm.parameters())

    def test_without_iterations_feedback_stays(self, tmp_path: Path) -> None:
        algorithm = self.make(self.small_network(), iterations=0)
        before = copy_state(algorithm.feedback)
        assert algorithm.train_feedback(draw_batch()[0]) == {}
        self.fit(algorithm, tmp_path)
        assert changed(before, copy_state(algorithm.feedback)) == set()

    def test_every_batch_and_iteration_draws_noise_of_its_own(self) -> None:
        first, second, same = (self.made_from_seed(3, iterations=1) for _ in range(3))
        second.train_feedback(draw_batch(seed=9)[0])
        second.feedback.load_state_dict(first.feedback.state_dict())
        second._feedback_optimizer.state.clear()
        random_state = torch.get_rng_state()
        losses = [algorithm.train_feedback(draw_batch()[0]) for algorithm in (first, second, same)]
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(losses[0][name] == losses[2][name] != losses[1][name] for name in losses[0])
        seen: list[Any] = []
        still = self.made_from_seed(3, iterations=2, feedback_lr=1e-30)
        with still.observe_feedback(seen.append):
            still.train_feedback(draw_batch()[0])
        assert len({event.loss.item() for event in seen}) == 2 * len(self.operators)

    def test_observers_see_every_iteration(self) -> None:
        events: list[Any] = []
        algorithm = self.make(self.small_network(), iterations=3)
        with algorithm.observe_feedback(events.append):
            losses = algorithm.train_feedback(draw_batch()[0])
        algorithm.train_feedback(draw_batch()[0])
        expected = [(name, number) for number in range(3) for name in self.operators]
        assert [(event.stage, event.iteration) for event in events] == expected
        for name in self.operators:
            mean = torch.stack([event.loss for event in events if event.stage == name]).mean()
            torch.testing.assert_close(losses[name], mean)
        angles = algorithm.feedback_angles()
        assert all(event.angle.isnan() == (event.stage not in angles) for event in events)

    def test_the_feedback_loss_falls(self) -> None:
        events: list[Any] = []
        algorithm = self.made_from_seed(1, iterations=120, feedback_lr=0.01)
        with algorithm.observe_feedback(events.append):
            algorithm.train_feedback(draw_batch(64)[0])
        losses = torch.stack([event.loss for event in events]).view(120, -1).sum(1)
        assert losses[-10:].mean() < 0.98 * losses[:10].mean()

    # -- optimizers --------------------------------------------------------------------------------------------------

    def test_the_feedback_optimizers_state_survives_a_checkpoint(self, tmp_path: Path) -> None:
        algorithm = self.make(self.small_network())
        self.fit(algorithm, tmp_path).save_checkpoint(tmp_path / "one.ckpt")
        _, feedback = torch.load(tmp_path / "one.ckpt", weights_only=True)["optimizer_states"]
        assert len(feedback["state"]) == len(list(algorithm.feedback.parameters()))

    def test_resuming_with_another_feedback_optimizer_is_refused(self, tmp_path: Path) -> None:
        self.fit(self.make(self.small_network()), tmp_path).save_checkpoint(tmp_path / "half.ckpt")
        other = self.make(self.small_network(), feedback_optimizer=partial(adam, betas=(0.5, 0.9)))
        with refused("feedback_optimizer.group0.betas was [0.9, 0.999] and is now [0.5, 0.9]"):
            self.fit(other, tmp_path, epochs=2, ckpt_path=tmp_path / "half.ckpt")

    def test_every_stage_can_have_a_learning_rate_of_its_own(self, tmp_path: Path) -> None:
        """One step of plain SGD in each direction: ``W <- W - lr_n * gradient``."""
        rates = (0.006, 0.012, 0.018, 0.024)
        algorithm = self.make(self.small_network(), forward_lr=rates, iterations=0, optimizer=sgd(5.0, 0.0, 0.0))
        before, gradients = copy_state(algorithm.network), algorithm.forward_gradients(*draw_batch())
        make_trainer(tmp_path, max_epochs=1).fit(algorithm, make_loader(1))
        for place, (name, stage) in enumerate(algorithm.network.named_children()):
            for part, value in stage.named_parameters():
                key = f"{name}.{part}"
                expected = before[key] - rates[place] * gradients[key]
                torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-7)

    def test_feedback_learning_rates_are_the_stages_own(self) -> None:
        """Adam's first step is about the learning rate long."""
        rates = (1e-4, 1e-3, 1e-2)
        algorithm = self.make(self.small_network(), feedback_lr=rates, iterations=1)
        before = copy_state(algorithm.feedback)
        algorithm.train_feedback(draw_batch()[0])
        for name, lr in zip(self.operators, rates, strict=True):
            steps = [
                (value - before[key]).abs().max()
                for key, value in algorithm.feedback.state_dict().items()
                if key.startswith(f"{name}.") and key.endswith("weight")
            ]
            assert all(0.9 * lr < step < 1.1 * lr for step in steps)

    def test_a_feedback_optimizer_that_refuses_is_one_sentence(self) -> None:
        with refused("the feedback optimizer refuses its arguments"):
            self.make(self.small_network(), feedback_optimizer=partial(adam, betas=(2.0, 0.9)))

    # -- the schedule ------------------------------------------------------------------------------------------------

    def test_pretraining_and_extra_epochs_train_feedback_alone(self, tmp_path: Path) -> None:
        algorithm = self.make(
            self.small_network(),
            feedback_pretraining_epochs=2,
            extra_feedback_epochs=1,
            optimizer=sgd(lr=0.06),
            scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        )
        epochs = Epochs()
        trainer = make_trainer(tmp_path, max_epochs=7, callbacks=[epochs])
        trainer.fit(algorithm, make_loader())
        assert [forward for forward, _ in epochs.course] == [False, False, True, False, True, False, True]
        assert all(feedback for _, feedback in epochs.course)
        # stepped after the epochs that trained forward weights
        assert cast(LRScheduler, algorithm.lr_schedulers()).last_epoch == 3
        assert trainer.global_step == 21
        assert algorithm.schedule.trains_forward(trainer.current_epoch) is False

    @pytest.mark.parametrize("interrupted_after", [1, 3])
    def test_a_resumed_schedule_equals_the_uninterrupted_one(self, interrupted_after: int, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"feedback_pretraining_epochs": 2, "extra_feedback_epochs": 1}
        settings["scheduler"] = cosine(2)
        whole, half = self.made_from_seed(1, **settings), self.made_from_seed(1, **settings)
        self.fit(whole, tmp_path, epochs=5)
        self.fit(half, tmp_path, epochs=interrupted_after).save_checkpoint(tmp_path / "half.ckpt")
        resumed = self.made_from_seed(7, **settings)
        trainer = self.fit(resumed, tmp_path, epochs=5, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
        assert changed(copy_state(whole), copy_state(resumed)) == set()
        assert trainer.global_step == 15

    def test_a_run_that_trains_no_network_says_so(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="bioprop"):
            self.fit(self.make(self.small_network(), feedback_pretraining_epochs=1), tmp_path, epochs=2)
            assert not [each for each in caplog.records if each.name.startswith("bioprop")]
            self.fit(self.make(self.small_network(), feedback_pretraining_epochs=2), tmp_path, epochs=2)
        (record,) = [each for each in caplog.records if each.name.startswith("bioprop")]
        assert "all 2 epochs train feedback weights alone" in record.getMessage()

    # -- settings ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", ["noise", "feedback_lr", "feedback_decay"])
    @pytest.mark.parametrize("length", [0, 2, 4])
    def test_lists_of_the_wrong_length_are_refused(self, name: str, length: int) -> None:
        with refused(f"{name} has {length} values", "3 stages", ", ".join(self.operators)):
            self.make(self.small_network(), **{name: (1,) * length})

    def test_forward_rates_need_one_for_each_stage(self) -> None:
        with refused("forward_lr has 3 values", "4 stages", "conv1, conv2, fc1, fc2"):
            self.make(self.small_network(), forward_lr=(0.1,) * 3)

    def test_a_single_value_stands_for_every_stage(self) -> None:
        algorithm = self.make(self.small_network(), noise=0.25, feedback_lr=(0.1, 0.2, 0.3), forward_lr=0.5)
        assert list(algorithm.noise.values()) == [0.25] * 3
        assert list(algorithm.feedback_lr.values()) == [0.1, 0.2, 0.3]
        assert algorithm.forward_lr is not None
        assert list(algorithm.forward_lr.values()) == [0.5] * 4

    @pytest.mark.parametrize(
        ("name", "value", "shown"),
        [
            ("beta", 0.0, "0.0"),
            ("noise", 0.0, "0.0"),
            ("noise", (0.1, float("nan"), 0.1), "nan"),
            ("feedback_lr", (0.1, -0.2, 0.1), "-0.2"),
            ("feedback_decay", -1e-3, "-0.001"),
            ("iterations", -1, "-1"),
            ("iterations", 1.5, "1.5"),
            ("iterations", "2", "'2'"),
            ("feedback_pretraining_epochs", -1, "-1"),
            ("extra_feedback_epochs", 0.5, "0.5"),
            ("forward_lr", 0.0, "0.0"),
        ],
    )
    def test_values_out_of_range_are_refused(self, name: str, value: Any, shown: str) -> None:
        with refused(f"{name} ", f" {shown}"):
            self.make(self.small_network(), **{name: value})

    @pytest.mark.parametrize(
        ("name", "other", "named"),
        [
            ("noise", 0.2, "noise was 0.1 and is now 0.2"),
            ("feedback_decay", 0.5, "feedback_decay was 0.1 and is now 0.5"),
            ("iterations", 2, "iterations was 1 and is now 2"),
            ("extra_feedback_epochs", 1, "extra_feedback_epochs was 0 and is now 1"),
            ("forward_lr", 0.1, "forward_lr was None and is now 0.1"),
        ],
    )
    def test_resuming_with_another_hyperparameter_is_refused(
        self, name: str, other: Any, named: str, tmp_path: Path
    ) -> None:
        first = {"noise": 0.1, "iterations": 1, "feedback_decay": 0.1}
        self.fit(self.make(self.small_network(), **first), tmp_path).save_checkpoint(tmp_path / "half.ckpt")
        with refused(named):
            second = self.make(self.small_network(), **(first | {name: other}))
            self.fit(second, tmp_path, epochs=2, ckpt_path=tmp_path / "half.ckpt")
