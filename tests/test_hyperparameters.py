"""Hyperparameters are collected from the constructors of every class, also of one that nobody here has heard of."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bioprop.algorithms import DDTPRHL, LDRL, Backprop, ParallelLDRL
from bioprop.algorithms.checkpoints import comparable_settings, refuse_changes
from bioprop.cli import main
from bioprop.errors import UserError
from bioprop.hyperparameters import plain
from bioprop.testing.helpers import (
    KilledError,
    changed,
    copy_state,
    make_loader,
    make_trainer,
    refused,
    sgd,
    small_lenet,
)
from bioprop.testing.resuming import differences

STRANGER = '''
import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from bioprop.algorithms import Algorithm
from bioprop.algorithms.base import Gradients
from bioprop.functional.gradients import backprop_gradients
from bioprop.networks import Network


class Shrunk(Algorithm):
    """Backprop whose gradients are shrunk."""

    def __init__(
        self,
        network: Network,
        shrink: float = 0.5,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(network, optimizer, scheduler)
        self.shrink = shrink

    def _gradients(self, images: Tensor, labels: Tensor) -> Gradients:
        gradients, logits = backprop_gradients(self.network, images, labels, self.output_loss.mean)
        return Gradients({name: self.shrink * value for name, value in gradients.items()}, logits)
'''
TINY = [
    "--model=strangers.Shrunk",
    "--model.network=LeNet",
    "--model.network.channels=[4,4]",
    "--model.network.hidden=8",
    "--data=Digits",
    "--data.limit_train=64",
    "--data.limit_val=20",
    "--data.batch_size=16",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
RUN = Path("runs", "shrunk_lenet_digits", "version_0")


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module outside the package, in an empty working folder."""
    (tmp_path / "strangers.py").write_text(STRANGER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("strangers")
    monkeypatch.delitem(importlib.sys.modules, "strangers")


def fit(*words: str, epochs: int = 2) -> None:
    main(["fit", *TINY, f"--trainer.max_epochs={epochs}", *words])


@pytest.mark.usefixtures("strangers")
def test_a_strangers_algorithm_trains_is_tested_and_resumes_bit_for_bit() -> None:
    fit("--trainer.default_root_dir=whole", "--model.shrink=0.3", "--checkpoint.every_n_batches=1")
    with pytest.raises(KilledError):
        fit(
            "--model.shrink=0.3",
            "--checkpoint.every_n_batches=1",
            "--trainer.callbacks+=bioprop.testing.helpers.KillAfter",
            "--trainer.callbacks.batches=6",
        )
    fit("--model.shrink=0.3", "--checkpoint.every_n_batches=1", "--ckpt_path=last")
    assert differences("whole" / RUN.relative_to("runs"), RUN) == []
    tested = main(["test", *TINY, "--ckpt_path=last"])
    assert "test/accuracy" in tested.trainer.callback_metrics


@pytest.mark.usefixtures("strangers")
def test_a_strangers_algorithm_does_not_go_on_with_another_value() -> None:
    fit("--model.shrink=0.3", epochs=1)
    with refused("shrink was 0.3 and is now 0.5", "start a new run without --ckpt_path"):
        fit("--ckpt_path=last")


def test_a_strangers_algorithm_is_rebuilt_from_its_checkpoint(strangers: Any) -> None:
    fit("--model.shrink=0.3", epochs=1)
    assert strangers.Shrunk.load_from_checkpoint(RUN / "checkpoints" / "last.ckpt").shrink == 0.3


# -- subclasses --------------------------------------------------------------------------------------------------------


class Quieter(LDRL):
    """A subclass with an argument of its own, one that it fixes and the others as they come."""

    def __init__(self, network: Any, quiet: float = 2.0, **settings: Any) -> None:
        settings.setdefault("beta", 0.02)
        noise = 0.1 / quiet
        quiet = noise  # constructors may use their arguments as they like
        super().__init__(network, noise=noise, **settings)
        self.quiet = quiet


class Wordless(LDRL):
    """A subclass that says nothing about its arguments, not even to its base class by ``super``."""

    def __init__(self, network: Any, *more: Any, loudness: float = 1.0, optimizer: Any = None) -> None:
        LDRL.__init__(self, network, *more, optimizer=sgd())
        self.loudness = loudness


def resumed(first: LDRL, second: LDRL, folder: Path) -> None:
    trainer = make_trainer(folder, max_epochs=1)
    trainer.fit(first, make_loader())
    trainer.save_checkpoint(folder / "half.ckpt")
    make_trainer(folder, max_epochs=2).fit(second, make_loader(), ckpt_path=folder / "half.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        (lambda: Quieter(small_lenet()), lambda: Quieter(small_lenet(), 4.0), "quiet was 2.0 and is now 4.0"),
        (
            lambda: Quieter(small_lenet()),
            lambda: Quieter(small_lenet(), beta=0.05),  # what the base class has by itself
            "beta was 0.02 and is now 0.05",
        ),
        (
            lambda: Quieter(small_lenet(), iterations=1),
            lambda: Quieter(small_lenet()),
            "iterations was 1 and is now auto",
        ),
        (
            lambda: Wordless(small_lenet(), loudness=3.0),
            lambda: Wordless(small_lenet()),
            "loudness was 3.0 and is now 1.0",
        ),
        (lambda: Wordless(small_lenet(), 0.05), lambda: Wordless(small_lenet(), 0.06), "beta was 0.05 and is now 0.06"),
    ],
)
def test_a_subclass_does_not_go_on_with_another_value(
    first: Callable[[], LDRL], second: Callable[[], LDRL], named: str, tmp_path: Path
) -> None:
    resumed(first(), first(), tmp_path)
    with refused(named):
        resumed(first(), second(), tmp_path)


def test_a_subclass_is_rebuilt_as_it_was_called(tmp_path: Path) -> None:
    algorithm = Quieter(small_lenet(), 4.0, iterations=3)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(algorithm, make_loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = Quieter.load_from_checkpoint(tmp_path / "one.ckpt")
    training = loaded.feedback_training
    assert (loaded.quiet, loaded.beta) == (0.025, 0.02)
    assert (set(training.noise.values()), set(training.iterations.values())) == ({0.025}, {3})
    assert loaded.hparams == algorithm.hparams
    assert changed(copy_state(algorithm), copy_state(loaded)) == set()


def test_what_subclasses_fix_is_no_argument_of_theirs_but_compared() -> None:
    parallel = ParallelLDRL(small_lenet())
    assert parallel.hparams.keys().isdisjoint({"speed", "optimizer", "scheduler"})
    assert (parallel.hparams["noise_at"], parallel.hparams["samples"]) == ("layer", 1)
    assert DDTPRHL(small_lenet()).hyperparameters()["beta"] == 0.06


# -- values ------------------------------------------------------------------------------------------------------------


class Kind(Enum):
    SOFT = "soft"


@dataclass
class Range:
    low: float
    high: float


class Shaped(Backprop):
    """A subclass with an argument that no checkpoint holds."""

    def __init__(self, network: Any, shape: Any = F.tanh) -> None:
        super().__init__(network, optimizer=sgd())
        self.shape = shape


@pytest.mark.parametrize(
    ("value", "recorded"),
    [
        ((1, [2.5, None, True]), [1, [2.5, None, True]]),
        (np.float64(0.5), 0.5),
        (np.int32(3), 3),
        (np.str_("word"), "word"),
        (np.arange(3), [0, 1, 2]),
        (torch.tensor([0.5, 0.25]), [0.5, 0.25]),
        ({"a": (1, 2)}, {"a": [1, 2]}),
        (F.relu, "relu"),
        (torch.float64, "torch.float64"),
        (Path("here"), "here"),
        (Kind.SOFT, "Kind.SOFT"),
        (Range(0.0, 1.0), {"low": 0.0, "high": 1.0}),
        (torch.nn.ReLU(), "ReLU"),
    ],
)
def test_values_are_recorded_as_plain_data(value: Any, recorded: Any) -> None:
    found = plain(value)
    assert (found, type(found)) == (recorded, type(recorded))


def test_functions_are_compared_by_name_and_asked_for_where_an_algorithm_is_rebuilt(tmp_path: Path) -> None:
    resumed(Shaped(small_lenet()), Shaped(small_lenet(), F.tanh), tmp_path)
    with refused("shape was tanh and is now relu"):
        resumed(Shaped(small_lenet()), Shaped(small_lenet(), F.relu), tmp_path)
    with refused("half.ckpt does not hold shape of Shaped", "give it to load_from_checkpoint"):
        Shaped.load_from_checkpoint(tmp_path / "half.ckpt")
    assert Shaped.load_from_checkpoint(tmp_path / "half.ckpt", shape=F.relu).shape is F.relu


def test_one_value_for_all_stages_equals_a_list_of_it(tmp_path: Path) -> None:
    resumed(LDRL(small_lenet(), noise=0.1), LDRL(small_lenet(), noise=np.full(3, 0.1)), tmp_path)
    with refused("noise was 0.1 and is now [0.1, 0.1, 0.2]"):
        resumed(LDRL(small_lenet(), noise=0.1), LDRL(small_lenet(), noise=(0.1, 0.1, 0.2)), tmp_path)


def test_a_checkpoint_written_before_hyperparameters_were_collected_goes_on(tmp_path: Path) -> None:
    """It holds one value a stage, and not every argument."""
    make: Callable[[], LDRL] = lambda: ParallelLDRL(small_lenet(), noise=0.1, iterations=2)  # noqa: E731
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(make(), make_loader())
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    del checkpoint["inherited"], checkpoint["objects"], checkpoint["hyper_parameters"]["samples"]
    checkpoint["hyper_parameters"] |= {"noise": [0.1] * 3, "iterations": [2] * 3, "noise_at": "layer"}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    on = {"ckpt_path": tmp_path / "old.ckpt", "weights_only": True}
    make_trainer(tmp_path, max_epochs=2).fit(make(), make_loader(), **on)
    assert ParallelLDRL.load_from_checkpoint(tmp_path / "old.ckpt").hparams["noise"] == [0.1] * 3
    with pytest.raises(UserError, match=r"iterations was \[2, 2, 2\] and is now auto"):
        make_trainer(tmp_path, max_epochs=2).fit(ParallelLDRL(small_lenet(), noise=0.1), make_loader(), **on)


@pytest.mark.parametrize("before", [{}, {"cache": True, "data_dir": "there"}])
def test_where_and_how_files_are_kept_is_no_setting_of_training(before: dict[str, Any], tmp_path: Path) -> None:
    """A run of before there was a cache goes on, and so does one whose folder has moved."""
    data = SimpleNamespace(hparams={"cache": False, "data_dir": "here", "batch_size": 8})
    checkpoint = {"algorithm": "LDRL", "hyper_parameters": {"network": "LeNet"}}
    own = {"algorithm": "LDRL", "network": "LeNet"}
    checkpoint["datamodule_hyper_parameters"] = before | {"batch_size": 8}
    refuse_changes(*comparable_settings(checkpoint, own, data, "fit"))
    checkpoint["datamodule_hyper_parameters"] = before | {"batch_size": 9}
    with refused("data.batch_size was 9 and is now 8"):
        refuse_changes(*comparable_settings(checkpoint, own, data, "fit"))
