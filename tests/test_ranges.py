"""Settings that hide in optimizers and schedules, and what else must not slip through."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.cli import ReduceLROnPlateau
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, SequentialLR

from bioprop.algorithms import DTP, LDRL, Backprop
from bioprop.testing.helpers import copy_state, draw_batch, make_loader, make_trainer, refused, sgd, small_lenet


def sequential(t_max: int) -> Callable[..., Any]:
    return lambda optimizer: SequentialLR(
        optimizer, [CosineAnnealingLR(optimizer, 2), CosineAnnealingLR(optimizer, t_max)], milestones=[3]
    )


def grouped(weight_decay: float) -> Callable[..., Any]:
    def make(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "weight_decay": weight_decay}, {"params": rest}], lr=0.01)

    return make


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        (
            {"scheduler": partial(MultiStepLR, milestones=[2, 4])},
            {"scheduler": partial(MultiStepLR, milestones=[2, 9])},
            "scheduler.milestones.9 was nothing and is now 1",
        ),
        ({"scheduler": sequential(5)}, {"scheduler": sequential(50)}, "T_max was 5 and is now 50"),
        (
            {"optimizer": grouped(1e-2)},
            {"optimizer": grouped(1e-4)},
            "optimizer.group0.weight_decay was 0.01 and is now 0.0001",
        ),
    ],
    ids=["milestones", "nested schedule", "parameter group"],
)
def test_hidden_settings_are_compared_on_resuming(
    first: dict[str, Any], second: dict[str, Any], named: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(Backprop(small_lenet(), **first), make_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with refused(named):
        make_trainer(tmp_path, max_epochs=2).fit(
            Backprop(small_lenet(), **second), make_loader(), ckpt_path=tmp_path / "half.ckpt"
        )
    # the same settings, made anew, do resume
    make_trainer(tmp_path, max_epochs=2).fit(
        Backprop(small_lenet(), **first), make_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False
    )


def test_another_algorithms_checkpoint_does_not_load(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(LDRL(small_lenet(), iterations=1), make_loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with refused("was written by LDRL: DTP cannot load it"):
        DTP.load_from_checkpoint(tmp_path / "one.ckpt")


@pytest.mark.parametrize("cls", [Backprop, DTP, LDRL])
def test_frozen_stages_are_left_alone(cls: type, tmp_path: Path) -> None:
    algorithm = cls(small_lenet())
    algorithm.network[0].requires_grad_(False)
    gradients = algorithm.forward_gradients(*draw_batch())
    assert not [name for name in gradients if name.startswith("conv1")]
    before = copy_state(algorithm.network)
    make_trainer(tmp_path, max_epochs=1).fit(algorithm, make_loader())
    moved = {name for name, value in algorithm.network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(gradients)


def test_a_second_fit_starts_without_the_feedback_momentum_of_the_first(tmp_path: Path) -> None:
    algorithm = LDRL(small_lenet(), iterations=2, noise=0.1, feedback_step="sgd", feedback_lr=0.01, optimizer=sgd())
    start = copy_state(algorithm)
    runs = []
    for _ in range(2):
        algorithm.load_state_dict(start)
        make_trainer(tmp_path, max_epochs=1).fit(algorithm, make_loader())
        runs.append(copy_state(algorithm))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_a_schedule_that_follows_an_unknown_metric_is_refused(tmp_path: Path) -> None:
    algorithm = Backprop(small_lenet(), scheduler=partial(ReduceLROnPlateau, monitor="val/nothing"))
    with refused("'val/nothing', which is not logged", "train/loss"):
        make_trainer(tmp_path, max_epochs=1).fit(algorithm, make_loader())


def test_a_schedule_may_follow_a_metric(tmp_path: Path) -> None:
    algorithm = Backprop(
        small_lenet(), scheduler=partial(ReduceLROnPlateau, monitor="train/loss", patience=0, mode="max")
    )
    make_trainer(tmp_path, max_epochs=4).fit(algorithm, make_loader())
    assert algorithm.optimizers().param_groups[0]["lr"] < 0.05


@pytest.mark.parametrize("validations", [{"check_val_every_n_epoch": 2}, {"val_check_interval": 6}])
def test_a_schedule_counts_validations_and_not_the_epochs_between_them(
    tmp_path: Path, validations: dict[str, int]
) -> None:
    """Of 12 epochs of 3 batches, 6 end with a validation; the learning rate falls at each but the first."""
    follow = partial(ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=1e9, threshold_mode="abs", factor=0.5)
    every = {"check_val_every_n_epoch": None} | validations
    algorithm = Backprop(small_lenet(), optimizer=partial(torch.optim.SGD, lr=1.0), scheduler=follow)
    make_trainer(tmp_path, max_epochs=12, **every).fit(algorithm, make_loader(), make_loader())
    assert algorithm.optimizers().param_groups[0]["lr"] == 0.5**5


def test_an_unknown_metric_is_refused_at_the_first_validation(tmp_path: Path) -> None:
    algorithm = Backprop(small_lenet(), scheduler=partial(ReduceLROnPlateau, monitor="val/nothing"))
    trainer = make_trainer(tmp_path, max_epochs=4, check_val_every_n_epoch=2)
    with refused("'val/nothing', which is not logged", "val/loss"):
        trainer.fit(algorithm, make_loader(), make_loader())
    assert trainer.current_epoch == 1


def test_a_checkpoint_with_other_tensors_is_refused_in_a_sentence(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(Backprop(small_lenet()), make_loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    checkpoint["state_dict"]["network.fc3.weight"] = checkpoint["state_dict"].pop("network.fc2.linear.weight")
    torch.save(checkpoint, tmp_path / "edited.ckpt")
    with refused("network.fc2.linear.weight, network.fc3.weight differ"):
        make_trainer(tmp_path).validate(Backprop(small_lenet()), make_loader(), tmp_path / "edited.ckpt", verbose=False)
