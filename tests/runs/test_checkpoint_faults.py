"""Damaged and foreign checkpoints, full disks, refused writes: a sentence each, and the previous checkpoint intact."""

import errno
import io
import os
import pickle
import resource
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from bioprop import files
from bioprop.algorithms import Backprop
from bioprop.cli import main
from bioprop.datamodules import Digits
from bioprop.errors import UserError
from bioprop.files import read_checkpoint
from bioprop.networks import LeNet
from bioprop.runs import RunCheckpoints
from bioprop.testing.helpers import KilledError, make_trainer
from bioprop.testing.resuming import differences, read_metrics

BATCHES = 4  # an epoch
TINY = [
    "--model=Backprop",
    "--model.network=LeNet",
    "--model.network.channels=[4,4]",
    "--model.network.hidden=8",
    "--data=Digits",
    "--data.limit_train=64",
    "--data.limit_val=20",
    "--data.batch_size=16",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
RUN = Path("runs/backprop_lenet_digits/version_0")
LAST, BEST = RUN / "checkpoints" / "last.ckpt", RUN / "checkpoints" / "best.ckpt"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(*arguments: str, epochs: int = 1) -> Trainer:
    return main(["fit", *TINY, f"--trainer.max_epochs={epochs}", *arguments]).trainer


def step_of(checkpoint: Path) -> int:
    step: int = read_checkpoint(checkpoint)["global_step"]
    return step


# -- files that are no checkpoint of this run ------------------------------------------------------------------------


class Malicious:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch it_ran",)


def saved(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def zipped() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("notes.txt", "hello")
    return buffer.getvalue()


def flipped(good: bytes) -> bytes:
    """One bit of a weight; torch alone loads this without a word."""
    place = good.index(torch.load(io.BytesIO(good))["state_dict"]["network.fc2.linear.weight"].numpy().tobytes())
    return good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]


def without(good: bytes, *names: str) -> bytes:
    content = torch.load(io.BytesIO(good), weights_only=True)
    return saved({name: value for name, value in content.items() if name not in names})


FOREIGN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda good: good[: len(good) // 2], "it is damaged: a part of it is missing"),
    "the last byte missing": (lambda good: good[:-1], "it is damaged: a part of it is missing"),
    "a bit flipped": (flipped, "it is damaged, in "),
    "empty": (lambda good: b"", "it is empty"),
    "text": (lambda good: b"model: LDRL\n", "it is damaged, or another kind of file"),
    "a zip file": (lambda good: zipped(), "it is damaged"),
    "a plain state_dict": (lambda good: saved(torch.nn.Linear(2, 2).state_dict()), "it holds no state_dict"),
    "a tensor": (lambda good: saved(torch.zeros(3)), "it holds no state_dict"),
    "another program's": (lambda good: without(good, "algorithm"), "was not written by bioprop"),
    "no settings": (lambda good: without(good, "hyper_parameters"), "was not written by bioprop"),
    "weights alone": (lambda good: without(good, "optimizer_states", "loops"), "(loops, optimizer_states)"),
    "code": (lambda good: saved({"state_dict": {}, "x": Malicious()}), "more than numbers and text, none of which was"),
    "code, in an old format": (
        lambda good: saved({"state_dict": {}, "x": Malicious()}, _use_new_zipfile_serialization=False),
        "another kind of file",
    ),
    "a bare pickle of code": (lambda good: pickle.dumps(Malicious()), "another kind of file"),
}


@pytest.mark.parametrize(("make", "sentence"), FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_cannot_be_resumed_from_is_refused(
    make: Callable[[bytes], bytes], sentence: str, good: bytes
) -> None:
    Path("some.ckpt").write_bytes(make(good))
    with pytest.raises(UserError) as refused:
        fit("--ckpt_path=some.ckpt", epochs=2)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not Path("it_ran").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("good")
    trainer = fit(f"--trainer.default_root_dir={folder}")
    return Path(trainer.checkpoint_callback.last_model_path).read_bytes()


def test_a_folder_is_refused() -> None:
    Path("some.ckpt").mkdir()
    with pytest.raises(UserError, match=r"some\.ckpt cannot be read as a checkpoint: it is a folder"):
        fit("--ckpt_path=some.ckpt")


def test_weights_alone_still_serve_a_test(good: bytes) -> None:
    Path("some.ckpt").write_bytes(without(good, "optimizer_states", "lr_schedulers", "callbacks"))
    assert "test/loss" in main(["test", *TINY, "--ckpt_path=some.ckpt"]).trainer.callback_metrics


def test_a_damaged_last_checkpoint_is_named_with_the_way_out() -> None:
    fit()
    LAST.write_bytes(LAST.read_bytes()[:-1000])
    with pytest.raises(UserError) as refused:
        fit("--ckpt_path=last", epochs=2)
    assert str(refused.value) == (
        f"{LAST} cannot be read as a checkpoint: it is damaged: a part of it is missing; --ckpt_path {BEST} can be read"
    )
    assert fit(f"--ckpt_path={BEST}", epochs=2).global_step == 2 * BATCHES
    BEST.unlink()
    with pytest.raises(UserError, match="its run has no other: start a new one without --ckpt_path"):
        fit(f"--ckpt_path={LAST}", epochs=2)


# -- writes that fail ------------------------------------------------------------------------------------------------


class LimitFileSize(Callback):
    """Lets the operating system refuse every file above a size, from one batch to another."""

    def __init__(self, first: int, last: int, size: int = 20_000) -> None:
        self.first, self.last, self.size = first, last, size

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in (self.first, self.last):
            limit = self.size if trainer.global_step == self.first else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def limited() -> Iterator[None]:
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert signal.getsignal(signal.SIGXFSZ) == handler


def limit(first: int, last: int) -> list[str]:
    at = [f"--trainer.callbacks.first={first}", f"--trainer.callbacks.last={last}"]
    return ["--trainer.callbacks+=tests.runs.test_checkpoint_faults.LimitFileSize", *at]


@pytest.mark.usefixtures("limited")
def test_a_refused_write_leaves_the_previous_checkpoint_and_training_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = fit("--checkpoint.every_n_batches=1", *limit(first=3, last=6), epochs=2)
    assert trainer.global_step == step_of(LAST) == 2 * BATCHES
    said = [line for line in caplog.messages if "could not be written" in line]
    # the best is tried at the end of the epoch as well
    assert [line.split()[4] for line in said] == ["4", "4", "5", "6"]
    assert f"{LAST}: File too large: the last good checkpoint is {LAST}, training goes on" in said[-1]
    assert {path.name for path in LAST.parent.iterdir()} == {"last.ckpt", "best.ckpt"}


@pytest.mark.slow
@pytest.mark.usefixtures("limited")
def test_a_run_killed_when_no_checkpoint_could_be_written_goes_on_from_the_previous_one() -> None:
    settings = ["--checkpoint.every_n_batches=1", *limit(first=3, last=100)]
    kill = ["--trainer.callbacks+=bioprop.testing.helpers.KillAfter", "--trainer.callbacks.batches=6"]
    with pytest.raises(KilledError):
        fit(*settings, *kill, epochs=2)
    assert step_of(LAST) == 3
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    fit("--checkpoint.every_n_batches=1", "--ckpt_path=last", epochs=2)
    fit("--checkpoint.every_n_batches=1", "--trainer.default_root_dir=whole", epochs=2)
    assert differences("whole" / RUN.relative_to("runs"), RUN) == []


@pytest.mark.usefixtures("limited")
def test_a_run_whose_last_checkpoint_cannot_be_written_ends_in_an_error() -> None:
    with pytest.raises(UserError) as failed:
        fit(*limit(first=5, last=100), epochs=2)
    assert str(failed.value) == (
        f"training is over, but its last checkpoint could not be written: {LAST}: File too large; the last good "
        f"checkpoint is {LAST}: make room, and go on from there with --ckpt_path last"
    )
    assert step_of(LAST) == step_of(BEST) == BATCHES


def fill_disk(monkeypatch: pytest.MonkeyPatch, kind: str, times: int) -> None:
    """Fill the disk in the middle of writing a kind of checkpoint, so many times after the first."""
    save, seen = torch.save, []

    def full(checkpoint: Any, file: Any) -> None:
        if file.name.endswith(f"{kind}.ckpt.part"):
            seen.append(checkpoint)
            if 1 < len(seen) <= 1 + times:
                save(checkpoint, half := io.BytesIO())
                file.write(half.getvalue()[:1000])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(checkpoint, file)

    monkeypatch.setattr(files.torch, "save", full)


def test_a_disk_full_at_the_end_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, "last", times=1)
    fit(epochs=2)
    assert step_of(LAST) == 2 * BATCHES
    assert fit("--ckpt_path=last", epochs=3).global_step == 3 * BATCHES


def test_a_best_checkpoint_that_could_not_be_written_is_not_believed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next good one is compared with the one on the disk."""
    fill_disk(monkeypatch, "best", times=1)
    monkeypatch.setattr("bioprop.runs.RunCheckpoints._monitor_candidates", rising_then_between)
    trainer = fit(epochs=3)
    assert step_of(BEST) == 3 * BATCHES
    assert trainer.checkpoint_callback.best_model_score == 0.5


def rising_then_between(self: Any, trainer: Trainer) -> dict[str, torch.Tensor]:
    """Accuracies of 0.2, 0.9 (which cannot be saved), 0.5."""
    return {"val/accuracy": torch.tensor([0.2, 0.9, 0.5][trainer.current_epoch])}


def test_a_folder_that_cannot_be_written_is_refused_before_training() -> None:
    Path("taken").write_text("a file")
    with pytest.raises(UserError, match=r"no checkpoint can be written in .*taken/here \(Not a directory\)"):
        fit("--checkpoint.dirpath=taken/here")


@pytest.mark.usefixtures("limited")
def test_metrics_that_cannot_be_written_wait_until_they_can(caplog: pytest.LogCaptureFixture) -> None:
    fit(*limit(first=3, last=6), "--trainer.callbacks.size=10", epochs=2)
    waiting = f"{RUN}/metrics.csv: File too large: metrics wait in memory until it can be written"
    assert caplog.messages.count(waiting) == 1
    fit("--trainer.default_root_dir=whole", epochs=2)
    assert read_metrics("whole" / RUN.relative_to("runs")) == read_metrics(RUN)


def test_weights_that_are_not_finite_are_never_saved() -> None:
    """Whether or not somebody watches for divergence."""
    trainer = make_trainer(Path(), max_epochs=1, enable_checkpointing=True, callbacks=[RunCheckpoints(1), Break()])
    algorithm = Backprop(LeNet((1, 16, 16), 10, channels=(4, 4), hidden=8))
    with pytest.raises(UserError, match="the weights are infinite or NaN after batch 3, so they are not saved: the"):
        trainer.fit(algorithm, datamodule=Digits(limit_train=64, limit_val=20, batch_size=16))
    assert step_of(Path("checkpoints/last.ckpt")) == 2


def test_divergence_is_named_before_it_is_saved() -> None:
    with pytest.raises(UserError, match=rf"diverged in epoch 0, batch 2: .*\(the last good checkpoint is {LAST}"):
        fit("--trainer.callbacks+=tests.runs.test_checkpoint_faults.Break", "--checkpoint.every_n_batches=1")
    assert step_of(LAST) == 2


class Break(Callback):
    """Puts a NaN into the weights in the third batch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            next(pl_module.parameters()).data[0] = float("nan")
