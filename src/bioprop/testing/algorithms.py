"""The promises of every algorithm, as a test suite to inherit."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor

from bioprop.algorithms import Algorithm
from bioprop.callbacks import AlignmentToBackprop, DivergenceGuard
from bioprop.datamodules.loader import ResidentLoader
from bioprop.networks import LeNet, Network
from bioprop.runs import RunCheckpoints
from bioprop.runs.metrics import MetricsFile
from bioprop.testing.helpers import (
    CLASSES,
    SHAPE,
    WITHOUT_REMINDERS,
    Handed,
    KillAfter,
    KilledError,
    Phases,
    Weights,
    changed,
    copy_state,
    cosine,
    draw_batch,
    from_one_seed,
    make_loader,
    make_trainer,
    on_every_network,
    refused,
    sgd,
    small_lenet,
)
from bioprop.testing.processes import ProcessPool, shared_pool
from bioprop.testing.resuming import differences


class AlgorithmContract(ABC):
    """Promises of every algorithm: a test class inherits them all and overrides `make`.

    Attributes:
        phases: the methods that train feedback weights, form the forward gradients, and step the forward weights.
        loss_falls_to: share of the loss of one batch that may be left after training on it.
        one_batch_epochs: number of steps on that batch.
        one_batch_settings: constructor arguments of the algorithm that trains on it.
        bf16_mixed_differs_by: how far the fall of the loss may be from that in float32, as a share of it.
    """

    pytestmark = WITHOUT_REMINDERS
    phases = ("train_feedback", "_gradients", "_step_forward_weights")
    loss_falls_to = 0.75
    one_batch_epochs = 30
    one_batch_settings: Mapping[str, Any] = {"optimizer": partial(torch.optim.Adam, lr=0.005)}
    bf16_mixed_differs_by = 0.1

    @abstractmethod
    def make(self, network: Network, **settings: Any) -> Algorithm:
        """Make the algorithm; ``settings`` go to its constructor and win over those of the suite."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss that the algorithm descends and logs."""
        return F.cross_entropy(logits, labels)

    def fit(self, algorithm: Algorithm, folder: Path, epochs: int = 1, **settings: Any) -> Trainer:
        """Train on three batches an epoch; ``settings`` go to ``Trainer.fit``."""
        trainer = make_trainer(folder, max_epochs=epochs)
        trainer.fit(algorithm, make_loader(), **settings)
        return trainer

    def small_network(self) -> Network:
        """Make the network of the tests that need only one."""
        return small_lenet()

    def made_from_seed(self, seed: int, **settings: Any) -> Any:
        """Make network and algorithm, whose weights follow from the seed."""
        torch.manual_seed(seed)
        return self.make(self.small_network(), **settings)

    @pytest.fixture(autouse=True)
    def _from_one_seed(self) -> Iterator[None]:
        with from_one_seed():
            yield

    @pytest.fixture
    def processes(self, request: pytest.FixtureRequest) -> ProcessPool:
        """Two processes that train together."""
        return shared_pool(request)

    # -- the two phases ----------------------------------------------------------------------------------------------

    @on_every_network
    def test_it_runs_on_every_network(self, build: Callable[[], Network], tmp_path: Path) -> None:
        algorithm = self.make(build())
        before = copy_state(algorithm.network)
        trainer = make_trainer(tmp_path, fast_dev_run=2)
        trainer.fit(algorithm, make_loader(), make_loader(1))
        trainer.test(algorithm, make_loader(1), verbose=False)
        assert changed(before, copy_state(algorithm.network)) == set(before)
        assert all(value.isfinite().all() for value in algorithm.state_dict().values())

    @on_every_network
    def test_forward_gradients_cover_every_parameter_and_change_nothing(self, build: Callable[[], Network]) -> None:
        algorithm = self.make(build())
        before, random_state = copy_state(algorithm), torch.get_rng_state()
        gradients = algorithm.forward_gradients(*draw_batch())
        assert {name: value.shape for name, value in gradients.items()} == {
            name: value.shape for name, value in algorithm.network.named_parameters()
        }
        assert all(value.abs().max() > 0 and not value.requires_grad for value in gradients.values())
        assert changed(before, copy_state(algorithm)) == set()
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(parameter.grad is None for parameter in algorithm.parameters())
        again = algorithm.forward_gradients(*draw_batch())
        assert changed(gradients, again) == set()

    def test_phase_1_leaves_forward_weights_and_phase_2_feedback_weights(self, tmp_path: Path) -> None:
        algorithm = self.make(self.small_network())
        phases = Phases(algorithm, self.phases)
        self.fit(algorithm, tmp_path)
        assert [phase for phase, _ in phases.course] == [*self.phases] * 3
        for phase, names in phases.course:
            if phase == self.phases[0]:
                assert all(name.startswith(("feedback.", "backward_weights.", "streams.")) for name in names)
            elif phase == self.phases[1]:
                assert names == set()
            else:
                assert names == {name for name in algorithm.state_dict() if name.startswith("network.")}

    def test_the_forward_optimizer_is_handed_the_forward_gradients(self, tmp_path: Path) -> None:
        """As they are; and one step of plain SGD: ``W <- W - lr * forward_gradients``."""
        algorithm = self.make(self.small_network(), optimizer=sgd(lr=0.5, momentum=0.0, weight_decay=0.0))
        before, expected, handed = copy_state(algorithm.network), {}, Handed()
        run = algorithm._step_forward_weights

        def recorded(gradients: Weights) -> None:
            expected.update(algorithm.forward_gradients(*draw_batch(8)))
            run(gradients)

        with patch.object(algorithm, "_step_forward_weights", recorded):
            make_trainer(tmp_path, max_epochs=1, callbacks=[handed]).fit(algorithm, make_loader(1))
        assert changed(expected, handed.gradients) == set()
        for name, weight in algorithm.network.state_dict().items():
            torch.testing.assert_close(weight, before[name] - 0.5 * expected[name], rtol=1e-5, atol=1e-7)

    def test_the_loss_of_one_batch_falls(self, tmp_path: Path) -> None:
        algorithm = self.made_from_seed(0, **self.one_batch_settings)
        images, labels = draw_batch(8)
        before = self.loss(algorithm(images), labels).item()
        make_trainer(tmp_path, max_epochs=self.one_batch_epochs).fit(algorithm, make_loader(1))
        after = self.loss(algorithm(images), labels).item()
        assert after < self.loss_falls_to * before, (
            f"{self.one_batch_epochs} steps took the loss of one batch from {before:.4g} to {after:.4g}, not below "
            f"{self.loss_falls_to * before:.4g}: give the suite other one_batch_settings, one_batch_epochs or "
            "loss_falls_to"
        )

    def test_the_loss_of_training_is_logged(self, tmp_path: Path) -> None:
        algorithm, trainer = self.make(self.small_network()), make_trainer(tmp_path, max_epochs=1)
        images, labels = draw_batch(8)
        before = self.loss(algorithm(images), labels).item()
        trainer.fit(algorithm, make_loader(1))
        assert trainer.callback_metrics["train/loss"].item() == pytest.approx(before, rel=1e-5)

    # -- exactness ---------------------------------------------------------------------------------------------------

    def test_the_same_seed_gives_the_same_weights(self, tmp_path: Path) -> None:
        runs = [self.made_from_seed(seed) for seed in (1, 1, 2)]
        for run in runs:
            torch.rand(3)  # what the global generator does between construction and training plays no part
            self.fit(run, tmp_path)
        first, second, other = (copy_state(run) for run in runs)
        assert changed(first, second) == set()
        assert {name for name in first if "weight" in name} <= changed(first, other)

    def test_global_step_counts_batches(self, tmp_path: Path) -> None:
        assert self.fit(self.make(self.small_network()), tmp_path, epochs=2).global_step == 6

    def test_a_resumed_run_equals_the_uninterrupted_one(self, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"scheduler": cosine(2)}
        whole, half = self.made_from_seed(1, **settings), self.made_from_seed(1, **settings)
        self.fit(whole, tmp_path, epochs=2)
        self.fit(half, tmp_path, epochs=1).save_checkpoint(tmp_path / "half.ckpt")
        resumed = self.made_from_seed(7, **settings)
        trainer = self.fit(resumed, tmp_path, epochs=2, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
        assert changed(copy_state(whole), copy_state(resumed)) == set()
        assert changed(copy_state(half.network), copy_state(resumed.network)) == set(copy_state(half.network))
        assert trainer.global_step == 6

    def test_a_run_killed_within_an_epoch_equals_the_uninterrupted_one(self, tmp_path: Path) -> None:
        """Weights, optimizers, schedules, callbacks, metrics and logs, from the last checkpoint before a random batch.

        Five batches an epoch, checkpoints every third and at the ends of epochs.
        """
        at = random.Random(type(self).__name__).choice([3, 4, 7, 8])
        for name, stop in (("whole", None), ("killed", at)):
            with suppress(KilledError):
                self.fit_and_save(self.made_from_seed(1, scheduler=cosine(2)), tmp_path / name, stop)
        checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
        assert torch.load(checkpoint, weights_only=True)["global_step"] == (6 if at > 6 else 3)
        resumed = self.made_from_seed(7, scheduler=cosine(2))
        self.fit_and_save(resumed, tmp_path / "killed", None, ckpt_path=checkpoint, weights_only=True)
        assert differences(tmp_path / "whole", tmp_path / "killed") == []

    def fit_and_save(self, algorithm: Algorithm, folder: Path, stop: int | None, **settings: Any) -> None:
        logger = MetricsFile(folder.parent, name="", version=folder.name)
        callbacks = [RunCheckpoints(every_n_batches=3), AlignmentToBackprop(), DivergenceGuard(), KillAfter(stop)]
        on = {"logger": logger, "callbacks": callbacks, "enable_checkpointing": True}
        trainer = make_trainer(folder, max_epochs=2, num_sanity_val_steps=0, **on)
        train = ResidentLoader(*draw_batch(40), batch_size=8, shuffle=True)
        trainer.fit(algorithm, train, ResidentLoader(*draw_batch(16, seed=1), batch_size=8), **settings)

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"optimizer": sgd(lr=0.04)}, "optimizer.lr was 0.05 and is now 0.04"),
            ({"optimizer": torch.optim.Adam}, "optimizer.class was SGD and is now Adam"),
            ({"scheduler": cosine(5)}, "scheduler.T_max was 2 and is now 5"),
            ({"scheduler": None}, "scheduler.class was CosineAnnealingLR and is now nothing"),
        ],
        ids=["lr", "optimizer", "T_max", "scheduler"],
    )
    def test_resuming_with_other_settings_is_refused(
        self, settings: dict[str, Any], named: str, tmp_path: Path
    ) -> None:
        first = {"optimizer": sgd(), "scheduler": cosine(2)}
        self.fit(self.make(self.small_network(), **first), tmp_path).save_checkpoint(tmp_path / "half.ckpt")
        with refused(named):
            self.fit(
                self.make(self.small_network(), **(first | settings)),
                tmp_path,
                epochs=2,
                ckpt_path=tmp_path / "half.ckpt",
            )

    def test_resuming_with_another_network_is_refused(self, tmp_path: Path) -> None:
        self.fit(self.make(self.small_network()), tmp_path).save_checkpoint(tmp_path / "half.ckpt")
        other = self.make(LeNet(SHAPE, CLASSES, channels=(3, 4), hidden=13))
        with refused("network.init_args.hidden was 12 and is now 13"):
            self.fit(other, tmp_path, epochs=2, ckpt_path=tmp_path / "half.ckpt")

    # -- several processes -------------------------------------------------------------------------------------------

    def test_two_processes_train_as_one(self, processes: ProcessPool) -> None:
        """Half of every batch each, with the same noise for the same rows."""
        from bioprop.testing.shared_training import train

        # by SGD, since Adam's first steps are signs of gradients, which rounding decides where they are zero
        settings = {"optimizer": sgd()}
        (logged, alone), shared = train(type(self), settings), processes.run(train, type(self), settings)
        (first_logged, first), (second_logged, second) = shared
        for whole, one, other in zip(alone, first, second, strict=True):
            assert changed(one, other) == set()
            torch.testing.assert_close(one, whole, rtol=1e-9, atol=1e-12)
        assert changed(first_logged, second_logged) == set()
        torch.testing.assert_close(first_logged, logged, rtol=1e-6, atol=0)  # metrics add up in single precision

    # -- checkpoints, evaluation, precision --------------------------------------------------------------------------

    @on_every_network
    def test_a_checkpoint_brings_everything_back(self, build: Callable[[], Network], tmp_path: Path) -> None:
        algorithm = self.make(build(), scheduler=cosine(3))
        path = tmp_path / "one.ckpt"
        self.fit(algorithm, tmp_path).save_checkpoint(path)
        assert torch.load(path, weights_only=True)["algorithm"] == type(algorithm).__name__
        torch.manual_seed(77)
        loaded = type(algorithm).load_from_checkpoint(path)
        assert changed(copy_state(algorithm), copy_state(loaded)) == set()
        assert loaded.hparams == algorithm.hparams
        images, labels = draw_batch()
        assert torch.equal(loaded(images), algorithm(images))
        gradients = algorithm.forward_gradients(images, labels)
        assert changed(gradients, loaded.forward_gradients(images, labels)) == set()

    def test_a_checkpoint_loads_into_a_network_of_ones_own(self, tmp_path: Path) -> None:
        algorithm, network = self.make(self.small_network()), self.small_network()
        self.fit(algorithm, tmp_path).save_checkpoint(tmp_path / "one.ckpt")
        loaded = type(algorithm).load_from_checkpoint(tmp_path / "one.ckpt", network=network)
        assert loaded.network is network
        assert changed(copy_state(algorithm), copy_state(loaded)) == set()

    def test_evaluation_trains_nothing(self, tmp_path: Path) -> None:
        algorithm, trainer = self.make(self.small_network()), make_trainer(tmp_path)
        before = copy_state(algorithm)
        # the last batch is smaller than the others
        (validated,) = trainer.validate(algorithm, make_loader(size=7), verbose=False)
        (tested,) = trainer.test(algorithm, make_loader(size=5), verbose=False)
        probabilities = torch.cat(cast(list[Tensor], trainer.predict(algorithm, make_loader())))
        assert changed(before, copy_state(algorithm)) == set()
        images, labels = draw_batch(24)
        logits = algorithm(images)
        torch.testing.assert_close(probabilities, logits.softmax(1))
        for split, figures in (("val", validated), ("test", tested)):
            assert figures[f"{split}/loss"] == pytest.approx(self.loss(logits, labels).item(), rel=1e-5)
            hits = (logits.argmax(1) == labels).float().mean().item()
            assert figures[f"{split}/accuracy"] == pytest.approx(hits, abs=1e-6)
            top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
            assert figures[f"{split}/accuracy_top5"] == pytest.approx(top5, abs=1e-6)

    def test_a_checkpoint_evaluates_as_it_did(self, tmp_path: Path) -> None:
        """Evaluation needs the weights alone: other settings of training do not stand in its way."""
        algorithm, other = self.make(self.small_network()), self.make(self.small_network(), optimizer=sgd(lr=0.3))
        self.fit(algorithm, tmp_path).save_checkpoint(tmp_path / "one.ckpt")
        (expected,) = make_trainer(tmp_path).test(algorithm, make_loader(), verbose=False)
        (found,) = make_trainer(tmp_path).test(
            other, make_loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True, verbose=False
        )
        assert found == expected

    def test_double_precision_works_throughout(self, tmp_path: Path) -> None:
        algorithm = self.make(self.small_network()).double()
        algorithm.train_feedback(draw_batch()[0].double())
        make_trainer(tmp_path, max_epochs=1, precision="64-true").fit(algorithm, make_loader())
        floating = [value for value in algorithm.state_dict().values() if value.is_floating_point()]
        assert all(value.dtype == torch.float64 for value in floating)
        gradients = algorithm.forward_gradients(draw_batch()[0].double(), draw_batch()[1])
        assert all(value.dtype == torch.float64 for value in gradients.values())

    def test_bf16_mixed_trains_like_float32_and_keeps_float32(self, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"optimizer": partial(torch.optim.Adam, lr=0.005)}
        reduced, exact = (self.made_from_seed(0, **settings) for _ in range(2))
        if "bf16-mixed" not in exact.precisions:
            with refused("precision bf16-mixed is not supported", "since ", "32-true"):
                make_trainer(tmp_path, max_epochs=1, precision="bf16-mixed").fit(exact, make_loader(1))
            return
        images, labels = draw_batch(8)
        before = self.loss(exact(images), labels).item()
        make_trainer(tmp_path, max_epochs=20).fit(exact, make_loader(1))
        trainer = make_trainer(tmp_path, max_epochs=20, precision="bf16-mixed")
        trainer.fit(reduced, make_loader(1))
        losses = [self.loss(one(images), labels).item() for one in (reduced, exact)]
        assert losses[0] == pytest.approx(losses[1], abs=self.bf16_mixed_differs_by * abs(losses[1] - before))
        assert {name for name in copy_state(exact.network) if "weight" in name} <= changed(
            copy_state(exact.network), copy_state(reduced.network)
        )
        kept = [*reduced.state_dict().values(), *trainer.callback_metrics.values()]
        kept += [value for one in trainer.optimizers for state in one.state.values() for value in state.values()]
        assert {value.dtype for value in kept if value.is_floating_point()} == {torch.float32}

    def test_a_resumed_run_in_bf16_mixed_equals_the_uninterrupted_one(self, tmp_path: Path) -> None:
        whole, half, resumed = (self.made_from_seed(seed) for seed in (1, 1, 7))
        if "bf16-mixed" not in whole.precisions:
            return  # the refusal is tested above
        trainers = [make_trainer(tmp_path, max_epochs=epochs, precision="bf16-mixed") for epochs in (2, 1, 2)]
        trainers[0].fit(whole, make_loader())
        trainers[1].fit(half, make_loader())
        trainers[1].save_checkpoint(tmp_path / "half.ckpt")
        trainers[2].fit(resumed, make_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
        assert changed(copy_state(whole), copy_state(resumed)) == set()

    def test_bf16_mixed_evaluates_in_float32_probabilities(self, tmp_path: Path) -> None:
        algorithm, trainer = self.make(self.small_network()), make_trainer(tmp_path, precision="bf16-mixed")
        if "bf16-mixed" not in algorithm.precisions:
            return  # the refusal is tested above
        before = copy_state(algorithm)
        (validated,) = trainer.validate(algorithm, make_loader(), verbose=False)
        (tested,) = trainer.test(algorithm, make_loader(), verbose=False)
        probabilities = torch.cat(cast(list[Tensor], trainer.predict(algorithm, make_loader())))
        images, labels = draw_batch(24)
        logits = algorithm(images)
        assert changed(before, copy_state(algorithm)) == set()
        assert probabilities.dtype == torch.float32
        torch.testing.assert_close(probabilities.sum(1), torch.ones(24), rtol=0, atol=1e-6)
        difference = (probabilities - logits.softmax(1)).abs().max()
        assert 0 < difference < 0.01  # rounded, but close
        for split, figures in (("val", validated), ("test", tested)):
            assert figures[f"{split}/loss"] == pytest.approx(self.loss(logits, labels).item(), rel=0.01)

    def test_mixed_half_precision_is_refused(self, tmp_path: Path) -> None:
        # as a plugin: on a CPU, Lightning turns the name "16-mixed" into another precision
        plugin = MixedPrecision("16-mixed", "cpu")
        with refused("precision 16-mixed is not supported", "32-true"):
            make_trainer(tmp_path, max_epochs=1, plugins=[plugin]).fit(self.make(self.small_network()), make_loader())
