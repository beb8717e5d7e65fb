"""``bioprop check`` finds a planted fault of each kind, and nothing where there is none."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bioprop.algorithms import (
    DDTPRHL,
    DTP,
    DTPDRL,
    LDRL,
    Algorithm,
    Backprop,
    DDTPLinear,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    FixedWeightDTP,
)
from bioprop.experiments.check import check, main
from bioprop.experiments.findings import Checked, check_algorithm
from bioprop.functional.gradients import input_gradient
from bioprop.networks.stages import StagePass
from bioprop.testing.helpers import copy_state, draw_batch, small_lenet
from tests.test_cli import in_empty_folder

__all__ = ["in_empty_folder"]  # the fixture
TINY = ["--model.network=LeNet", "--model.network.channels=[4,4]", "--model.network.hidden=8", "--data.limit_train=320"]


class SilentLDRL(LDRL):
    """Trains feedback weights, and sends the error down through the forward weights."""

    def difference_below(self, name: str, clean: StagePass, difference: Tensor) -> Tensor:
        stage = dict(self.network.stages())[name]
        return input_gradient(stage, clean.inputs, difference)


class Bent(LDRL):
    """A feedback path that is not the transposed Jacobian: it forgets where the activation is flat."""

    def difference_below(self, name: str, clean: StagePass, difference: Tensor) -> Tensor:
        return super().difference_below(name, clean, difference).roll(1, 1)


class Deaf(LDRL):
    """Feedback weights that nothing moves."""

    def _train_feedback(self, passes: Sequence[StagePass]) -> dict[str, Tensor]:
        return {}


class Restless(Backprop):
    """Moves weights where it is only to compute."""

    def _gradients(self, images: Tensor, labels: Tensor) -> Any:
        with torch.no_grad():
            next(self.network.parameters()).mul_(0.9)
        return super()._gradients(images, labels)


def scaled(algorithm: LDRL, factor: float, *stages: str) -> LDRL:
    with torch.no_grad():
        for name in stages:
            for parameter in algorithm.feedback[name].parameters():
                parameter.mul_(factor)
    return algorithm


FAULTS: dict[str, tuple[Callable[[], Algorithm], str, str]] = {
    "silent BP": (lambda: SilentLDRL(small_lenet()), "updates are not BP's while feedback is random", "silent BP"),
    "unused": (lambda: SilentLDRL(small_lenet()), "updates depend on the feedback weights", "not used"),
    "dead": (lambda: scaled(LDRL(small_lenet()), 0.0, "fc1"), "every stage gets an update", "dead feedback"),
    "wrong path": (lambda: Bent(small_lenet()), "with symmetric feedback, updates are BP's", "transposed Jacobian"),
    "no learning": (lambda: Deaf(small_lenet()), "feedback learns on white noise", "feedback_lr"),
    "large": (lambda: scaled(LDRL(small_lenet()), 1e5, "fc2"), "updates are as large as BP's, within reason", "explod"),
    "runaway": (
        lambda: DTP(small_lenet(), feedback_lr=1e4),
        "feedback weights keep their size on white noise",
        "lower feedback_lr",
    ),
    "moves": (lambda: Restless(small_lenet()), "forward_gradients leaves no trace", "must only compute"),
}


def wrong(checked: Checked) -> dict[str, str]:
    return {finding.what: finding.advice for finding in checked.findings if finding.verdict == "wrong"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    make, what, advice = FAULTS[fault]
    checked = check_algorithm(make(), *draw_batch())
    assert not checked.is_right
    assert advice in wrong(checked)[what]


@pytest.mark.parametrize(
    "make",
    [
        Backprop,
        LDRL,
        DTP,
        DDTPLinear,
        DDTPRHL,
        DTPDRL,
        DirectFeedbackAlignment,
        FixedWeightDTP,
        FeedbackAlignment,
        lambda network: LDRL(network, mirror="paper"),  # which is not BP's way back
        lambda network: FeedbackAlignment(network, rule="usf"),
        lambda network: FeedbackAlignment(network, rule="transpose"),
        lambda network: FeedbackAlignment(network, rule="weight_mirror"),
    ],
)
def test_nothing_is_wrong_with_what_is_right_and_nothing_is_changed(make: Callable[..., Algorithm]) -> None:
    algorithm = make(small_lenet())
    before = copy_state(algorithm)
    checked = check_algorithm(algorithm, *draw_batch(24))
    assert wrong(checked) == {}
    assert all(torch.equal(value, before[name]) for name, value in algorithm.state_dict().items())
    assert [row.name for row in checked.stages] == ["conv1", "conv2", "fc1", "fc2"]
    assert all(row.parameters > 0 for row in checked.stages)


def test_a_plain_module_is_checked_by_its_children() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 15 * 15, 10))
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    checked = check_algorithm(FeedbackAlignment(network), images, labels)
    assert wrong(checked) == {}
    assert [row.kind for row in checked.stages] == ["Conv2d", "Linear"]


@pytest.mark.parametrize(
    ("options", "what", "advice"),
    [
        (["--model=Backprop", "--model.optimizer.lr=0"], "the optimizer moves every weight", "learning rate 0"),
        (["--model=Backprop", "--model.optimizer.lr=1e3"], "steps are small beside the weights", "lower the learning"),
        (["--model=LDRL", "--model.optimizer.lr=1e30"], "training goes on", "see the sentence"),
    ],
)
def test_what_the_optimizer_does_is_looked_at(options: list[str], what: str, advice: str) -> None:
    _, checked = check([*options, *TINY])
    assert advice in wrong(checked)[what]


def test_the_command_says_what_it_found_by_its_status_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n"
        "    def __init__(self, image_shape, num_classes):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(256, 12), nn.Tanh(), nn.Linear(12, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--model=FeedbackAlignment", "--model.network=own_nets.Net", "--data.limit_train=320"]
    assert main(words) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert main([*words, "--model.optimizer.lr=0"]) == 1
    assert "WRONG" in capsys.readouterr().out
    assert main([]) == 0
    assert "usage: bioprop check" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} <= {"own_nets.py", "__pycache__"}
    sys.modules.pop("own_nets", None)
