"""Callbacks in real training runs on a few digits."""

import csv
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger

from bioprop.algorithms import DTPDRL, LDRL, Algorithm, Backprop, DDTPLinear
from bioprop.callbacks import (
    AlignmentToBackprop,
    DivergenceGuard,
    EpochSeconds,
    FeedbackRecord,
    RunningLoss,
    divergence,
)
from bioprop.callbacks.divergence import LOOK_EVERY
from bioprop.datamodules import Digits
from bioprop.errors import DivergenceError, UserError
from bioprop.functional.angles import angle_degrees
from bioprop.networks import LeNet
from bioprop.runs import RunCheckpoints
from bioprop.runs.folder import run_folder


def fit(folder: Path, algorithm: Algorithm, *callbacks: Callback, epochs: int = 1) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=CSVLogger(folder, name="run"),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(algorithm, datamodule=Digits(limit_train=96, limit_val=32, batch_size=32))
    return trainer


def make(**settings: Any) -> LDRL:
    seed_everything(0, verbose=False)
    return LDRL(LeNet((1, 16, 16), 10, channels=(4, 4), hidden=8), **{"iterations": (3, 2, 1), **settings})


def metrics(trainer: Trainer) -> list[dict[str, str]]:
    with (run_folder(trainer) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_alignment_is_logged_before_training_and_each_epoch(tmp_path: Path) -> None:
    trainer = fit(tmp_path, make(), AlignmentToBackprop(max_images=16), epochs=2)

    rows = [row for row in metrics(trainer) if row["angle/conv1"]]
    assert [row["epoch"] for row in rows] == ["-1", "0", "1"]
    assert all(abs(float(row["angle/fc2"])) < 0.1 for row in rows)
    assert all(float(row["angle/conv1"]) > 1.0 for row in rows)
    for row in rows:
        hidden = [float(row[f"angle/{stage}"]) for stage in ("conv1", "conv2", "fc1")]
        assert float(row["angle/hidden_stages"]) == pytest.approx(sum(hidden) / 3, rel=1e-5)


def test_the_angle_to_gauss_newton_is_logged_where_asked_for(tmp_path: Path) -> None:
    trainer = fit(tmp_path, make(), AlignmentToBackprop(max_images=16, gauss_newton_damping=0.1), epochs=2)

    rows = [row for row in metrics(trainer) if row["angle_gn/conv1"]]
    assert [row["epoch"] for row in rows] == ["-1", "0", "1"]
    assert all(abs(float(row["angle_gn/fc2"])) < 0.1 and float(row["norm_ratio_gn/overall"]) > 0.0 for row in rows)
    assert all(float(row["angle_gn/fc1"]) > 1.0 for row in rows)


def test_without_asking_it_is_not(tmp_path: Path) -> None:
    assert not [name for name in metrics(fit(tmp_path, make(), AlignmentToBackprop()))[0] if "_gn" in name]


def test_alignment_can_be_turned_off(tmp_path: Path) -> None:
    trainer = fit(tmp_path, make(), AlignmentToBackprop(every_n_epochs=0))

    assert not [name for name in metrics(trainer)[0] if name.startswith("angle")]


def test_alignment_leaves_training_as_it_is(tmp_path: Path) -> None:
    watched, alone = make(), make()
    fit(tmp_path, watched, AlignmentToBackprop())
    torch.manual_seed(0)
    fit(tmp_path, alone)

    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_feedback_record_holds_every_iteration_of_the_chosen_batches(tmp_path: Path) -> None:
    algorithm = make()
    trainer = fit(tmp_path, algorithm, FeedbackRecord(every_n_batches=2))

    with (run_folder(trainer) / "feedback_training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["batch"], row["stage"], row["iteration"]) for row in rows] == [
        (batch, stage, str(iteration))
        for batch in ("0", "2")
        for stage, iterations in (("conv2", 3), ("fc1", 2), ("fc2", 1))
        for iteration in range(iterations)
    ]
    assert all(0.0 < float(row["angle"]) < 180.0 for row in rows)
    # the last batch is recorded, and only the forward weight moves after its last feedback iteration
    last = algorithm.feedback["fc2"].weight
    assert abs(float(rows[-1]["angle"]) - float(angle_degrees(algorithm.network.fc2.weight, last))) < 5.0
    assert not algorithm._observers


class FullDisk(Callback):
    """Files of this process can hold no more than so many bytes until a batch is over."""

    def __init__(self, size: int, until: int) -> None:
        self.size, self.until, self.limits = size, until, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_train_start(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.limits[1]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if i == self.until:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    def on_exception(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


@pytest.mark.parametrize(
    "until", [1, 2]
)  # a batch is recorded after it; none is, so that the end of training has to do
def test_rows_that_a_full_disk_refuses_are_written_when_there_is_room(
    until: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = []
    for disk in ([], [FullDisk(100, until)]):  # bytes: a header and half a batch
        trainer = fit(tmp_path / str(len(files)), make(), FeedbackRecord(every_n_batches=2), *disk)
        files.append((run_folder(trainer) / "feedback_training.csv").read_bytes())
    assert len(files[0]) > 300
    assert files[0] == files[1]
    (warning,) = [record.getMessage() for record in caplog.records if "feedback_training.csv" in record.getMessage()]
    assert warning.endswith("feedback_training.csv: File too large: its rows wait in memory until it can be written")


@pytest.mark.parametrize(("kind", "shown"), [(DDTPLinear, "nan"), (DTPDRL, "0")])
def test_feedback_record_of_feedback_through_all_stages_above(kind: type, shown: str, tmp_path: Path) -> None:
    """Direct feedback has no forward weight to form an angle with."""
    algorithm = kind(LeNet((1, 16, 16), 10, channels=(4, 4), hidden=8), iterations=2)
    trainer = fit(tmp_path, algorithm, FeedbackRecord(every_n_batches=2))

    with (run_folder(trainer) / "feedback_training.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [(b, stage, str(n)) for b in ("0", "2") for n in range(2) for stage in algorithm.feedback]
    assert [(row["batch"], row["stage"], row["iteration"]) for row in rows] == expected
    assert all((row["angle"] == "nan") == (shown == "nan") for row in rows)
    assert not algorithm._observers


def test_feedback_record_of_an_algorithm_without_feedback_leaves_no_file(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Backprop(LeNet((1, 16, 16), 10, channels=(4, 4), hidden=8)), FeedbackRecord())

    assert not (run_folder(trainer) / "feedback_training.csv").exists()
    with pytest.raises(UserError, match="every_n_batches is 0"):
        FeedbackRecord(0)


class Break(Callback):
    """Put a NaN into the weights before a batch."""

    def __init__(self, part: str) -> None:
        self.part = part

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            with torch.no_grad():
                pl_module.get_parameter(self.part)[0] = float("nan")


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("feedback.fc1.weight", "feedback weights of stage fc1 grew beyond all bounds: lower model.feedback_lr"),
        ("network.fc2.linear.weight", "fc2 became infinite or NaN: lower the learning rate of model.optimizer"),
    ],
)
def test_guard_names_the_stage_and_what_to_lower(tmp_path: Path, part: str, sentence: str) -> None:
    # no feedback iterations, so that the broken part is the only one
    with pytest.raises(DivergenceError) as caught:
        fit(tmp_path, make(iterations=0), Break(part), DivergenceGuard())
    assert "epoch 0, batch 1" in str(caught.value)
    assert sentence in str(caught.value)


class Counting(Callback):
    """Counts the batches that were trained on, and the validations that were begun."""

    def __init__(self) -> None:
        self.batches = self.validations = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validations += not trainer.sanity_checking


class Scale(Callback):
    """Multiply weights before a batch."""

    def __init__(self, part: str, factor: float) -> None:
        self.part, self.factor = part, factor

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            with torch.no_grad():
                pl_module.get_parameter(self.part).mul_(self.factor)


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (Break("feedback.fc1.weight"), "feedback weights of stage fc1 grew"),
        (Break("network.fc2.linear.weight"), "feedback weights of stage fc2 grew"),  # the noise met a NaN
        (Scale("feedback.fc1.weight", 1e15), "feedback weights of stage fc1 grew"),
        (Scale("network.conv2.conv.weight", 1e30), "feedback weights of stage conv2 grew"),
    ],
)
def test_guard_says_what_it_would_say_if_it_looked_at_every_batch(
    broken: Callback, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty batches later everything is NaN: the cause is that of the first bad batch."""
    said, data = [], Digits(limit_train=100, limit_val=32, batch_size=2)
    for every in (1, LOOK_EVERY):
        monkeypatch.setattr(divergence, "LOOK_EVERY", every)
        count, seen = Counting(), list[int]()
        trainer = make_trainer(tmp_path / str(every), count, broken, DivergenceGuard(), RunCheckpoints())
        with patched_look(seen), pytest.raises(DivergenceError) as caught:
            trainer.fit(make(iterations=1), datamodule=data)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert sentence in said[0]
    assert "there is no checkpoint yet" in said[0]
    assert (count.batches, count.validations, seen) == (LOOK_EVERY, 0, [LOOK_EVERY])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_guard_looks_at_every_batch_before_validation_and_before_the_epoch_ends(tmp_path: Path) -> None:
    seen: list[int] = []
    batches = LOOK_EVERY + LOOK_EVERY // 2
    trainer = make_trainer(tmp_path, DivergenceGuard(), val_check_interval=5)
    with patched_look(seen):
        trainer.fit(make(iterations=1), datamodule=Digits(limit_train=2 * batches, limit_val=32, batch_size=2))
    assert sum(seen) == batches
    assert set(seen) == {5}
    seen.clear()
    trainer = make_trainer(tmp_path, DivergenceGuard())
    with patched_look(seen):
        trainer.fit(make(iterations=1), datamodule=Digits(limit_train=2 * batches, limit_val=32, batch_size=2))
    assert seen == [LOOK_EVERY, LOOK_EVERY // 2]


@pytest.mark.parametrize(
    ("part", "sentence"), [("feedback.fc1.weight", "stage fc1"), ("network.fc2.linear.weight", "fc2 became infinite")]
)
def test_what_is_broken_is_never_saved(part: str, sentence: str, tmp_path: Path) -> None:
    """The checkpoint of before stays as it was, and the cause is named, not only that weights are not finite."""
    trainer = make_trainer(tmp_path, Break(part), DivergenceGuard(), RunCheckpoints(every_n_batches=1))
    with pytest.raises(DivergenceError, match="epoch 0, batch 1: ") as caught:
        trainer.fit(make(iterations=0), datamodule=Digits(limit_train=96, limit_val=32, batch_size=2))
    (last,) = tmp_path.rglob("*.ckpt")
    assert sentence in str(caught.value)
    assert f"the last good checkpoint is {last}" in str(caught.value)
    kept = torch.load(last, weights_only=True)
    assert kept["global_step"] == 1
    assert all(torch.isfinite(value).all() for value in kept["state_dict"].values() if value.is_floating_point())


def make_trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger(folder, name="run"),
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(each, RunCheckpoints) for each in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@contextmanager
def patched_look(seen: list[int]) -> Iterator[None]:
    """Note how many batches the guard reads at once: the moments at which it waits for the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "mean_over_processes", lambda read: (seen.append(len(read[0])), read)[1])
        yield


def test_the_bar_shows_the_loss_so_far_and_is_drawn_now_and_then(tmp_path: Path, monkeypatch: Any) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(RunningLoss, "_update_metrics", lambda bar, *run: shown.append(bar.get_metrics(*run)))
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    for pause, drawings in ((0.0, 4), (60.0, 2)):  # of the last batch, and of the end of the epoch
        shown.clear(), losses.clear()
        bar = RunningLoss()
        bar.pause, bar._drawn = pause, time.monotonic()
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[Losses(), bar], logger=False, enable_checkpointing=False
        )
        trainer.fit(make(iterations=0), datamodule=Digits(limit_train=96, limit_val=32, batch_size=32))
        during = [float(each["train/loss"]) for each in shown if "train/loss" in each]
        assert len(during) == drawings
        last = [sum(losses[:batches]) / batches for batches in (1, 2, 3, 3)][-drawings:]
        assert during == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("feedback.fc1.weight", "feedback weights of stage fc1 grew beyond all bounds: lower model.feedback_lr"),
        ("network.fc2.linear.weight", "fc2 became infinite or NaN: lower the learning rate of model.optimizer"),
    ],
)
def test_guard_knows_direct_feedback(tmp_path: Path, part: str, sentence: str) -> None:
    algorithm = DDTPLinear(LeNet((1, 16, 16), 10, channels=(4, 4), hidden=8), iterations=0)
    with pytest.raises(DivergenceError) as caught:
        fit(tmp_path, algorithm, Break(part), DivergenceGuard())
    assert sentence in str(caught.value)


def test_guard_watches_epochs_of_feedback_alone(tmp_path: Path) -> None:
    algorithm = DDTPLinear(LeNet((1, 16, 16), 10, channels=(4, 4), hidden=8), feedback_pretraining_epochs=1)
    with pytest.raises(DivergenceError, match="feedback weights of stage conv1 grew beyond all bounds"):
        fit(tmp_path, algorithm, Break("feedback.conv1.weight"), DivergenceGuard())


def test_guard_lets_a_sound_run_pass_and_seconds_are_logged(tmp_path: Path) -> None:
    trainer = fit(tmp_path, make(), DivergenceGuard(), EpochSeconds(), epochs=2)

    seconds = [float(row["train/seconds"]) for row in metrics(trainer) if row["train/seconds"]]
    assert len(seconds) == 2
    assert all(0.0 < value < 60.0 for value in seconds)


def test_rows_that_waited_go_to_the_file_they_are_of_and_no_other(tmp_path: Path) -> None:
    for folder, resumed, expected in (("own", 7, b"before\nwaited"), ("another", 99, b"before\nstale")):
        trainer = Trainer(logger=CSVLogger(tmp_path, name=folder), accelerator="cpu", enable_checkpointing=False)
        path = run_folder(trainer) / "feedback_training.csv"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"before\nstale")
        record = FeedbackRecord()
        record.load_state_dict({"size": resumed, "waiting": "waited"})
        record.on_train_start(trainer, make())
        record.on_train_end(trainer, make())
        assert path.read_bytes() == expected
