"""Whole steps as CUDA graphs, with the stand-in of `tests.feedback.test_recorded`: the numbers of steps one by one."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bioprop.algorithms import (
    DTP,
    LDRL,
    PEPITA,
    Algorithm,
    AnalyticFeedback,
    Backprop,
    DirectFeedbackAlignment,
    DirectKolenPollack,
    DirectRandomTargetProjection,
    FeedbackAlignment,
    FixedWeightDTP,
    ParallelLDRL,
    TargetPropagation,
    base,
)
from bioprop.feedback.recorded import Recorded
from bioprop.feedback.speed import Speed
from bioprop.networks import MLP, Network, ResNet
from bioprop.testing.helpers import (
    CLASSES,
    SHAPE,
    WITHOUT_REMINDERS,
    changed,
    copy_state,
    draw_batch,
    make_trainer,
    sgd,
    small_lenet,
)
from tests.feedback.test_recorded import StandIn, refuse

pytestmark = WITHOUT_REMINDERS
PUBLISHED = {"second_noise": "independent", "noise": 0.1, "feedback_lr": 0.01, "iterations": 2, "feedback_step": "sgd"}


def small_resnet() -> Network:
    return ResNet(SHAPE, CLASSES, blocks=(1, 1), widths=(4, 6), activation="elu")


MADE: dict[str, Callable[[], Algorithm]] = {
    "BP": lambda: Backprop(small_lenet(), optimizer=torch.optim.Adam),
    "BP, batch norm": lambda: Backprop(small_resnet()),
    "BP, dropout": lambda: Backprop(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(256, CLASSES))),
    **{
        f"FA, {rule}": lambda rule=rule: FeedbackAlignment(small_lenet(), rule=rule)  # type: ignore[misc]
        for rule in ("fa", "frsf", "brsf", "kolen_pollack", "weight_mirror")
    },
    "PEPITA": lambda: PEPITA(MLP(SHAPE, CLASSES, hidden=(9,))),
    "analytic feedback": lambda: AnalyticFeedback(small_lenet()),
    "DFA": lambda: DirectFeedbackAlignment(small_lenet(), constrain_norm=True),
    "DRTP": lambda: DirectRandomTargetProjection(small_lenet()),
    "L-DRL": lambda: LDRL(small_lenet()),
    "L-DRL, expected": lambda: LDRL(small_lenet(), second_noise="expected"),
    "L-DRL as published": lambda: LDRL(small_lenet(), mirror="paper", switches="noisy", **PUBLISHED),
    "L-DRL, batch norm": lambda: LDRL(small_resnet()),
    "L-DRL, bfloat16": lambda: LDRL(small_lenet(), speed=Speed(bfloat16=True)),
    "parallel L-DRL": lambda: ParallelLDRL(small_lenet(), samples=2),
    "DTP": lambda: DTP(small_lenet()),
    "TP": lambda: TargetPropagation(small_lenet()),
    "FW-DTP": lambda: FixedWeightDTP(MLP(SHAPE, CLASSES, hidden=(9,), activation="tanh", standardize=True)),
}
#: Two epochs of three batches of 8 and one of 4.
LOADER = DataLoader(TensorDataset(*draw_batch(28)), batch_size=8)


class Losses(Callback):
    """Reads the feedback losses of all batches when training is over."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.kept += [outputs["loss"], *outputs["feedback_losses"].values()]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Let steps be recorded on the CPU, by a backend."""

    def install(backend: Any) -> None:
        monkeypatch.setattr(base, "Recorded", lambda streams: Recorded(streams, backend))
        monkeypatch.setattr(Algorithm, "_may_record", lambda self, images: True)

    return install


def train(make: Callable[[], Algorithm], folder: Path, *callbacks: Callback) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return all tensors, the figures of the last epoch included, and the losses of every batch."""
    torch.manual_seed(0)
    algorithm, losses = make(), Losses()
    trainer = make_trainer(folder, max_epochs=2, callbacks=[losses, *callbacks])
    trainer.fit(algorithm, LOADER)
    assert trainer.global_step == 8
    return copy_state(algorithm) | {
        f"logged {name}": each for name, each in trainer.callback_metrics.items()
    }, losses.kept


def assert_same(found: tuple[dict[str, Tensor], list[Tensor]], wanted: tuple[dict[str, Tensor], list[Tensor]]) -> None:
    assert changed(wanted[0], found[0]) == set()
    assert len(found[1]) == len(wanted[1]) > 0
    assert all(torch.equal(*pair) for pair in zip(found[1], wanted[1], strict=True))


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_recorded_steps_train_to_the_same_bits(
    make: Callable[[], Algorithm], tmp_path: Path, record: Callable[[Any], None]
) -> None:
    alone, backend = train(make, tmp_path), StandIn()
    record(backend)
    found = train(make, tmp_path)
    # the first batch of a size runs one by one: five of 8 images are replayed, and one of 4
    assert (backend.recordings, backend.replays) == (2, 6)
    assert_same(found, alone)


@pytest.mark.parametrize("make", [MADE["BP"], MADE["FA, brsf"], MADE["L-DRL as published"]])
def test_a_recording_that_fails_changes_no_number(
    make: Callable[[], Algorithm], tmp_path: Path, record: Callable[[Any], None]
) -> None:
    """Here within the first iteration of the second stage, whose gradients are set by then."""
    alone = train(make, tmp_path)

    def broken(function: Callable[[], Any], generators: Sequence[torch.Generator]) -> Callable[[], Any]:
        steps = Counter[str]()

        def third_is_refused(self: torch.optim.SGD) -> None:
            steps.update(["asked for"])
            if steps["asked for"] == 3:
                refuse(function, generators)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.SGD, "step", third_is_refused)
            state = copy_state(algorithms[-1])
            try:
                function()
                refuse(function, generators)
            finally:  # what is recorded is not executed
                algorithms[-1].load_state_dict(state)
        return function

    algorithms: list[Algorithm] = []

    def remembered() -> Algorithm:
        algorithms.append(make())
        return algorithms[-1]

    record(broken)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = train(remembered, tmp_path)
    assert [str(each.message) for each in said if "CUDA graph" in str(each.message)] == [
        "training is not recorded as a CUDA graph (operation not permitted when stream is capturing)"
    ]
    assert_same(found, alone)


class Rate(Callback):
    """Changes what is no part of a batch before the last batch of an epoch but one."""

    def __init__(self, change: Callable[[Algorithm], object]) -> None:
        self.change = change

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.change(pl_module)


def change_beta(algorithm: Algorithm) -> None:
    algorithm.beta = 0.3


def change_noise(algorithm: Algorithm) -> None:
    algorithm.feedback_training.noise["fc1"] = 0.5


def move_a_weight(algorithm: Algorithm) -> None:
    weight = algorithm.network.fc1.linear.weight
    weight.data = 2 * weight.data


def freeze(algorithm: Algorithm) -> None:
    algorithm.network.fc1.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "recordings", "replays"),
    # from the third batch on everything is new, and with a weight that moves again from the seventh
    [(change_beta, 3, 5), (change_noise, 3, 5), (freeze, 3, 5), (move_a_weight, 2, 3)],
)
def test_what_changes_between_batches_is_noticed(
    change: Callable[[Algorithm], object],
    recordings: int,
    replays: int,
    tmp_path: Path,
    record: Callable[[Any], None],
) -> None:
    make, backend = MADE["L-DRL as published"], StandIn()
    alone = train(make, tmp_path, Rate(change))
    record(backend)
    assert_same(train(make, tmp_path, Rate(change)), alone)
    assert (backend.recordings, backend.replays) == (recordings, replays)


class OwnBackprop(Backprop):
    """A user's."""


class OwnLayer(nn.Linear):
    """A user's."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: OwnBackprop(small_lenet()),
        lambda: Backprop(nn.Sequential(nn.Flatten(), OwnLayer(256, CLASSES))),
        lambda: DirectKolenPollack(small_lenet(), feedback_optimizer=sgd()),
    ],
    ids=["subclass", "module", "hands on more than gradients"],
)
def test_what_is_not_known_runs_one_by_one(
    make: Callable[[], Algorithm], tmp_path: Path, record: Callable[[Any], None]
) -> None:
    backend = StandIn()
    record(backend)
    train(make, tmp_path)
    assert backend.recordings == 0


def test_observers_and_profilers_see_every_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = LDRL(small_lenet())
    make_trainer(tmp_path, fast_dev_run=1).fit(algorithm, LOADER)
    images = torch.empty(1, device="meta")
    monkeypatch.setattr(type(images), "is_cuda", True)
    assert algorithm._may_record(images)
    with algorithm.observe_feedback(lambda event: None):
        assert not algorithm._may_record(images)
    make_trainer(tmp_path, fast_dev_run=1, profiler="simple").fit(algorithm, LOADER)
    assert not algorithm._may_record(images)
