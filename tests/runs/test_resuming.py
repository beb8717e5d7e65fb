"""Runs cut off at any batch and resumed from their last checkpoint, beside uninterrupted ones: everything is equal."""

import csv
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.cli import ReduceLROnPlateau
from torch import Tensor, nn

from bioprop.algorithms import DTPDRL, LDRL, Algorithm, Backprop, FeedbackAlignment
from bioprop.callbacks import AlignmentToBackprop, DivergenceGuard, EpochSeconds, FeedbackRecord
from bioprop.datamodules import Digits
from bioprop.errors import UserError
from bioprop.networks import LeNet
from bioprop.runs import RunCheckpoints
from bioprop.runs.metrics import MetricsFile
from bioprop.testing.helpers import KillAfter, KilledError, cosine
from bioprop.testing.resuming import differences

BATCHES = 4  # an epoch


def lenet() -> LeNet:
    return LeNet((1, 16, 16), 10, channels=(3, 4), hidden=8)


def backprop(**settings: Any) -> Algorithm:
    return Backprop(lenet(), **settings)


class Dropping(nn.Module):
    """A user's network that draws from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(256, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 10))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers(images)
        return out


class LogsSteps(Callback):
    """Logs in every place a user may: each batch, the start of an epoch, sums and extremes."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("mine/started", float(trainer.current_epoch))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"]
        pl_module.log("mine/loss", loss, on_step=True, on_epoch=True)
        pl_module.log("mine/worst", loss, on_step=False, on_epoch=True, reduce_fx="max")
        pl_module.log("mine/sum", loss, on_step=False, on_epoch=True, reduce_fx="sum")
        if batch_idx == 0:
            pl_module.log("mine/first", loss, on_step=False, on_epoch=True)


def run(
    folder: Path,
    make: Callable[[], Algorithm],
    kill: int | None = None,
    seed: int = 1,
    every: int = 1,
    data: dict[str, Any] | None = None,
    callbacks: Callable[[], list[Callback]] = list,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Trainer:
    torch.manual_seed(seed)
    algorithm = make()
    standing = [RunCheckpoints(every), AlignmentToBackprop(32), DivergenceGuard(), EpochSeconds(), KillAfter(kill)]
    trainer = Trainer(
        accelerator="cpu",
        logger=MetricsFile(folder.parent, name="", version=folder.name),
        callbacks=[*standing, *callbacks()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 2} | settings),
    )
    images = Digits(limit_train=16 * BATCHES, limit_val=20, batch_size=16, **(data or {}))
    trainer.fit(algorithm, datamodule=images, ckpt_path=ckpt_path, weights_only=True)
    return trainer


CASES: dict[str, dict[str, Any]] = {
    "augmentation": {"make": backprop, "data": {"horizontal_flip": True, "crop_padding": 2}},
    "validation within the epoch": {"make": backprop, "val_check_interval": 0.5},
    "validation across epochs": {
        "make": partial(backprop, scheduler=partial(ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=0.5)),
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
    },
    "validation every second epoch": {"make": backprop, "check_val_every_n_epoch": 2, "max_epochs": 3},
    "plateau of validations every second epoch": {
        "make": partial(backprop, scheduler=partial(ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=0.5)),
        "check_val_every_n_epoch": 2,
        "max_epochs": 4,
    },
    "no validation": {"make": backprop, "limit_val_batches": 0},
    "limited batches": {"make": backprop, "limit_train_batches": 3},
    "max_steps": {
        "make": partial(backprop, scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1)),
        "max_steps": 2 * BATCHES + 2,
        "max_epochs": -1,
    },
    "max_steps, validation within": {
        "make": backprop,
        "max_steps": 2 * BATCHES + 1,
        "max_epochs": -1,
        "val_check_interval": 2,
    },
    "max_steps, no validation": {"make": backprop, "max_steps": 2 * BATCHES, "limit_val_batches": 0},
    "early stopping": {
        "make": backprop,
        "callbacks": lambda: [EarlyStopping("val/loss", min_delta=9.0, patience=1)],
        "max_epochs": 5,
    },
    "metrics of every batch": {"make": backprop, "callbacks": lambda: [LogsSteps()], "log_every_n_steps": 2},
    "feedback record": {
        "make": lambda: LDRL(lenet(), iterations=2),
        "callbacks": lambda: [FeedbackRecord(every_n_batches=3)],
    },
    "epochs of feedback alone": {
        "make": lambda: DTPDRL(lenet(), feedback_pretraining_epochs=1, extra_feedback_epochs=1),
        "max_epochs": 3,
    },
    "dropout": {"make": lambda: FeedbackAlignment(Dropping())},
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`max_epochs` was not set"),
]


def cut_off_and_resume(folder: Path, whole: Path, kill: int, **settings: Any) -> list[str]:
    """Names of what differs from the whole run."""
    with suppress(KilledError):
        run(folder, kill=kill, **settings)
    run(folder, seed=7, ckpt_path=folder / "checkpoints" / "last.ckpt", **settings)
    found = differences(whole, folder)
    record = "feedback_training.csv"
    if (whole / record).exists() and (folder / record).read_text() != (whole / record).read_text():
        found.append(record)
    return found


SOME = CASES.keys() - {
    "validation every second epoch",
    "no validation",
    "limited batches",
    "max_steps, validation within",
    "max_steps, no validation",
    "early stopping",
}


@pytest.mark.parametrize(("name", "settings"), [(name, CASES[name]) for name in sorted(SOME)], ids=sorted(SOME))
def test_a_run_killed_at_a_random_batch_equals_the_uninterrupted_one(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = run(tmp_path / "whole", **settings)
    kills = {random.Random(name).randrange(1, whole.global_step)}
    if "max_steps" in settings:
        kills.add(BATCHES)  # Lightning would end the epoch that has just ended once more
    found = {kill: cut_off_and_resume(tmp_path / str(kill), tmp_path / "whole", kill, **settings) for kill in kills}
    assert found == {kill: [] for kill in kills}


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param("on_validation_start", marks=pytest.mark.slow),
        pytest.param("on_validation_end", marks=pytest.mark.slow),
        "on_train_epoch_end",
    ],
)
def test_a_run_killed_at_the_end_of_an_epoch_equals_the_uninterrupted_one(hook: str, tmp_path: Path) -> None:
    """Its last batch is behind, its end is not: that is done by the resumed run."""
    settings: dict[str, Any] = {"make": partial(backprop, scheduler=cosine(2)), "num_sanity_val_steps": 0}
    run(tmp_path / "whole", **settings)
    with suppress(KilledError):
        run(tmp_path / "killed", callbacks=lambda: [KillIn(hook)], **settings)
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == BATCHES - 1
    run(tmp_path / "killed", seed=7, ckpt_path=last, **settings)
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


def test_a_run_that_stopped_early_does_not_go_on(tmp_path: Path) -> None:
    settings = CASES["early stopping"]
    whole = run(tmp_path / "whole", **settings)
    with suppress(KilledError):
        callbacks = settings["callbacks"]
        run(tmp_path / "run", **(settings | {"callbacks": lambda: [*callbacks(), KillIn("on_train_end")]}))
    resumed = run(tmp_path / "run", seed=7, ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt", **settings)
    assert resumed.global_step == whole.global_step == 2 * BATCHES
    assert differences(tmp_path / "whole", tmp_path / "run") == []


class KillIn(Callback):
    """Ends a run in a hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.kill)

    def kill(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise KilledError


@pytest.mark.slow
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_a_run_killed_at_any_batch_equals_the_uninterrupted_one(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", **settings)
    kills = range(1, whole.global_step)
    found = {kill: cut_off_and_resume(tmp_path / str(kill), tmp_path / "whole", kill, **settings) for kill in kills}
    assert found == {kill: [] for kill in kills}


def test_a_run_killed_again_and_again_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = CASES["metrics of every batch"]
    run(tmp_path / "whole", **settings)
    for kill in (2, 3, 6, 7):
        with suppress(KilledError):
            last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
            run(tmp_path / "killed", kill=kill, ckpt_path=last if last.exists() else None, **settings)
    run(tmp_path / "killed", seed=7, ckpt_path=last, **settings)
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


def test_seconds_of_an_epoch_go_on_from_its_checkpoint(tmp_path: Path) -> None:
    """The clock of another process says nothing about this one."""
    with suppress(KilledError):
        run(tmp_path / "run", backprop, kill=2)
    resumed = run(tmp_path / "run", backprop, ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt")
    (seconds,) = (callback._before for callback in resumed.callbacks if isinstance(callback, EpochSeconds))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        logged = [float(row["train/seconds"]) for row in csv.DictReader(file) if row["train/seconds"]]
    assert 0.0 < seconds < logged[0] < 60.0
    assert 0.0 < logged[1] < 60.0


def test_a_moved_run_still_knows_its_best(tmp_path: Path) -> None:
    with suppress(KilledError):
        run(tmp_path / "run", backprop, kill=6)
    (tmp_path / "run").rename(tmp_path / "moved")
    last = tmp_path / "moved" / "checkpoints" / "last.ckpt"
    resumed = run(tmp_path / "moved", backprop, ckpt_path=last)
    assert resumed.checkpoint_callback.best_model_path == str(last.with_name("best.ckpt"))
    run(tmp_path / "whole", backprop)
    assert differences(tmp_path / "whole", tmp_path / "moved") == []


def test_last_is_of_the_last_epoch_whether_or_not_it_was_the_best(tmp_path: Path) -> None:
    trainer = run(
        tmp_path / "run", partial(backprop, optimizer=partial(torch.optim.SGD, lr=0.0)), max_epochs=3, every=0
    )
    steps = {
        kind: torch.load(tmp_path / "run" / "checkpoints" / f"{kind}.ckpt", weights_only=True)["global_step"]
        for kind in ("best", "last")
    }
    assert steps == {"best": BATCHES, "last": trainer.global_step}


def test_a_negative_distance_between_checkpoints_is_refused() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.every_n_batches is -1"):
        RunCheckpoints(-1)
