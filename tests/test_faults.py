"""Whose fault an exception is: the outside's is one sentence, a bug keeps its traceback."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback

from bioprop.algorithms import Backprop
from bioprop.algorithms.base import Gradients
from bioprop.cli import main
from bioprop.errors import UserError
from bioprop.faults import as_user_error

TINY = [
    "--model.network=MLP",
    "--model.network.hidden=[8]",
    "--data=Digits",
    "--data.limit_train=64",
    "--data.limit_val=32",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=1",
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(*arguments: str, model: str = "Backprop") -> None:
    main(["fit", f"--model={model}", *TINY, *arguments])


def own(name: str) -> str:
    """An option that adds a callback of this file, as a user's own."""
    return f"--trainer.callbacks+=tests.test_faults.{name}"


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as refused:
        fit(*arguments)
    sentence = str(refused.value)
    assert len(sentence.splitlines()) == 1
    return sentence


# -- constructors ----------------------------------------------------------------------------------------------------


class Opens(Callback):
    def __init__(self, path: str) -> None:
        Path(path).read_text()


class Imports(Callback):
    def __init__(self) -> None:
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401


class Broken(Callback):
    def __init__(self) -> None:
        {}["missing"]


def test_what_a_constructor_of_the_users_lacks_is_named() -> None:
    Path("self").symlink_to("self")
    for path, reason in (("nowhere", "No such file or directory"), ("self", "Too many levels of symbolic links")):
        said = refusal(own("Opens"), f"--trainer.callbacks.path={path}")
        assert said == f"{path}: {reason}: check the path and the disk, or choose another"
    assert refusal(own("Imports")).startswith("Imports needs what is not installed (No module named 'no_such_package')")


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_a_logger_whose_package_is_missing_is_named() -> None:
    assert refusal("--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=there").startswith(
        "TensorBoardLogger needs what is not installed (Neither `tensorboard` nor `tensorboardX` is available."
    )


def test_a_bug_in_a_constructor_of_the_users_stays_one() -> None:
    with pytest.raises(ValueError, match="missing") as raised:  # the parser's, from the KeyError
        fit(own("Broken"))
    assert not isinstance(raised.value, UserError)


# -- memory ----------------------------------------------------------------------------------------------------------


class Allocates(Callback):
    def on_train_batch_end(self, *batch: Any) -> None:
        torch.empty(10**15)


@pytest.mark.parametrize("width", [10**11, 10**18, 10**20])
def test_a_network_that_fits_no_memory_is_refused(width: int) -> None:
    assert "there is not enough memory (" in refusal(f"--model.network.hidden=[{width}]")


def test_memory_that_runs_out_in_training_is_said() -> None:
    assert "not enough memory (tried to allocate 4000000000000000 bytes): lower" in refusal(own("Allocates"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "Tried to allocate 2.00 GiB",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
        ),
        (MemoryError("Unable to allocate 3.7 TiB for an array with shape (9, 9)"), "Unable to allocate 3.7 TiB"),
        (MemoryError(), "no amount is known"),
    ],
)
def test_every_allocators_words_are_known(error: Exception, said: str) -> None:
    assert f"not enough memory ({said}" in str(as_user_error(error))


# -- training --------------------------------------------------------------------------------------------------------


class OpensLater(Callback):
    def on_train_batch_end(self, *batch: Any) -> None:
        Path("nowhere.txt").read_text()


class ImportsLater(Callback):
    def on_train_batch_end(self, *batch: Any) -> None:
        import no_such_package  # noqa: F401


class Refuses(Callback):
    def on_train_batch_end(self, *batch: Any) -> None:
        raise ValueError("not this batch")


class LogsText(Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, *batch: Any) -> None:
        module.log("text", "text")


class Buggy(Backprop):
    def _gradients(self, images: torch.Tensor, labels: torch.Tensor) -> Gradients:
        return Gradients({}, torch.ones(3, 4) @ torch.ones(3, 4))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("OpensLater", FileNotFoundError),
        ("ImportsLater", ModuleNotFoundError),
        ("Refuses", ValueError),
        ("LogsText", ValueError),
    ],
)
def test_a_bug_of_the_users_in_training_keeps_its_traceback(name: str, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        fit(own(name))
    assert not isinstance(raised.value, UserError)


def test_a_bug_of_an_algorithm_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2") as raised:
        fit(model="tests.test_faults.Buggy")
    assert not isinstance(raised.value, UserError)


def test_what_lightning_refuses_by_itself_is_said() -> None:
    early = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/los"]
    assert "metric `val/los` which is not available" in refusal(*early)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_strategies_that_copy_the_process_are_refused(strategy: str) -> None:
    assert "such as ddp_spawn" in refusal(f"--trainer.strategy={strategy}")


def test_a_full_disk_without_a_name_is_said() -> None:
    assert str(as_user_error(OSError(28, os.strerror(28)))).startswith("[Errno 28] No space left on device: check")


# -- schedules -------------------------------------------------------------------------------------------------------

ONE_CYCLE = ["--model.scheduler=OneCycleLR", "--model.scheduler.max_lr=0.1"]


class OwnSchedule(torch.optim.lr_scheduler.LRScheduler):
    def get_lr(self) -> list[float | torch.Tensor]:
        return [0.1 / (2 - self.last_epoch)]


def test_a_schedule_that_ends_before_training_is_refused_at_once() -> None:
    said = refusal(*ONE_CYCLE, "--model.scheduler.total_steps=3", "--trainer.max_epochs=5")
    assert said.startswith("OneCycleLR does not last beyond epoch 3 (Tried to step 4 times.")
    assert not list(Path("runs").rglob("*.ckpt"))
    fit(*ONE_CYCLE, "--model.scheduler.total_steps=2", "--trainer.max_epochs=2")


def test_a_schedule_that_ends_within_training_is_said_when_it_does() -> None:
    steps = ["--trainer.max_epochs=9", "--trainer.max_steps=4", "--data.batch_size=64"]  # which nobody looks ahead for
    assert "does not last beyond epoch 2" in refusal(*ONE_CYCLE, "--model.scheduler.total_steps=2", *steps)


def test_a_bug_in_a_schedule_of_the_users_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        fit("--model.scheduler=tests.test_faults.OwnSchedule", "--trainer.max_epochs=3")


def test_an_operation_without_a_defined_order_is_named() -> None:
    maps = torch.zeros(1, 1, 1, 1)
    torch.use_deterministic_algorithms(True)
    try:
        torch.nn.functional.max_unpool2d(maps, maps.long(), 2)
    except RuntimeError as error:
        said = str(as_user_error(error))
    finally:
        torch.use_deterministic_algorithms(False)
    assert said.startswith("max_unpooling2d_forward_out adds up in no defined order here: leave --trainer.determin")
