"""Algorithms and networks of one's own, by dotted path on the command line."""

import csv
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from bioprop.algorithms.feedback_alignment import Rule
from bioprop.cli import BiopropCLI, main
from bioprop.errors import UserError
from bioprop.experiments.configs import ParsingCLI
from tests.test_cli import TINY, in_empty_folder
from tests.test_cli_parser import said

__all__ = ["in_empty_folder"]  # the fixture

NETS = """
from torch import nn

class MyNet(nn.Module):
    def __init__(self, image_shape, num_classes, hidden: int = 8):
        super().__init__()
        self.sizes = image_shape, num_classes, hidden
        self.body = nn.Conv2d(image_shape[0], hidden, 3)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, images):
        return self.head(self.body(images).relu().mean((2, 3)))

class OnlyClasses(nn.Sequential):
    def __init__(self, num_classes: int):
        super().__init__(nn.Flatten(), nn.Linear(256, num_classes))

class NoArguments(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(256, 10))

def make() -> nn.Module:
    return NoArguments()
"""
RULES = """
from pytorch_lightning.cli import OptimizerCallable
from torch import nn, optim
from bioprop.algorithms import Algorithm, Backprop
from bioprop.algorithms.base import Gradients
from bioprop.functional.gradients import backprop_gradients

class Scaled(Backprop):
    def __init__(
        self, network: nn.Module, gain: float = 1.0, optimizer: OptimizerCallable = lambda w: optim.SGD(w, lr=0.1)
    ):
        super().__init__(network, optimizer=optimizer)
        self.gain = gain

    def _direction(self, gradients):
        return {name: self.gain * gradient for name, gradient in gradients.items()}

class Untyped(Scaled):
    def __init__(self, network):
        super().__init__(network)

class UntypedOptimizer(Scaled):
    def __init__(self, network: nn.Module, optimizer=lambda w: optim.SGD(w, lr=0.1)):
        super().__init__(network, optimizer=optimizer)
"""
DATA = TINY[3:]
NET = ["--model.network=own_nets.MyNet", "--model.network.hidden=3"]


@pytest.fixture(autouse=True)
def own_modules(in_empty_folder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets.py").write_text(NETS)
    (tmp_path / "own_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(["--model=Backprop"], id="backprop", marks=pytest.mark.slow),
        *(
            pytest.param(
                ["--model=FeedbackAlignment", f"--model.rule={rule}"],
                id=rule,
                marks=[] if rule == "kolen_pollack" else [pytest.mark.slow],
            )
            for rule in get_args(Rule)
        ),
    ],
)
def test_a_plain_torch_module_trains_resumes_and_is_evaluated(model: list[str]) -> None:
    words = [*model, *NET, *DATA]
    trained = main(["fit", *words, "--trainer.max_epochs=1"])
    assert isinstance(trained.model.network, nn.Module)
    assert trained.model.network.sizes == ((1, 16, 16), 10, 3)

    tested = main(["test", *words, "--ckpt_path=best"])
    predicted = main(["predict", *words, "--ckpt_path=best"])
    with (Path(predicted.trainer.log_dir) / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    truth = predicted.datamodule.resident["test"].labels.tolist()
    hits = sum(int(row["prediction"]) == label for row, label in zip(rows, truth, strict=True))
    assert hits / len(truth) == pytest.approx(float(tested.trainer.callback_metrics["test/accuracy"]))

    resumed = main(["fit", *words, "--trainer.max_epochs=2", "--ckpt_path=last"])
    assert resumed.trainer.global_step == 2 * trained.trainer.global_step
    whole = main(["fit", *words, "--trainer.max_epochs=2", "--trainer.default_root_dir=whole"])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("network", ["OnlyClasses", "NoArguments"])
def test_what_the_constructor_does_not_take_is_not_handed_over(network: str) -> None:
    words = ["--model=Backprop", f"--model.network=own_nets.{network}", *DATA]
    assert main(["fit", *words, "--trainer.max_epochs=1"]).model.network[1].out_features == 10
    main(["test", *words, "--ckpt_path=best"])


@pytest.mark.parametrize("network", [["--model.network=LeNet", "--model.network.hidden=8"], NET])
def test_an_algorithm_of_ones_own_trains_and_is_evaluated(network: list[str]) -> None:
    words = ["--model=own_rules.Scaled", "--model.gain=0.5", *network, *DATA]
    assert main(["fit", *words, "--trainer.max_epochs=1"]).model.gain == 0.5
    main(["test", *words, "--ckpt_path=best"])


@pytest.mark.parametrize("algorithm", ["LDRL", "DTP", "DirectFeedbackAlignment"])
def test_methods_of_stages_say_what_they_need(algorithm: str, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = said(capsys, f"--model={algorithm}", *NET, *DATA)
    assert "the algorithm needs a chain of stages, and MyNet is none: make it a bioprop.networks.Network" in sentence


@pytest.mark.parametrize(("rule", "argument"), [("Untyped", "network"), ("UntypedOptimizer", "optimizer")])
def test_an_argument_without_a_type_is_refused(rule: str, argument: str) -> None:
    words = ["fit", f"--model=own_rules.{rule}", "--model.network=LeNet", *DATA]
    for command_line in (BiopropCLI, ParsingCLI):  # as of fit, and of compare
        with pytest.raises(UserError, match=rf"{argument} of {rule} has no type, .*, as {argument}: \w+"):
            main(words, command_line)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model=Backprop", "--model.network=own_nets.make"], "network is a function that makes one, but it must"),
        (["--model=Backprop", "--model.network=own_nets.Nope"], "module 'own_nets' has no attribute 'Nope'"),
        (["--model=Backprop", "--model.network=Nope"], "; name your own by dotted path, module.Class"),
        (["--model=Backprop", "--model.network=bioprop.errors.UserError"], "UserError, which is no subclass of"),
        (
            ["--model=own_rules.Scaled", "--model.network=MLP"],
            "MLP must be named in full here: torchvision.ops.MLP or ",
        ),
        (["--model=Backprop", *NET, "--model.network.hiden=3"], "there is no argument hiden in this place"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in said(capsys, *words, *DATA)


def test_help_offers_the_networks_of_stages_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model.help=Backprop"])
    shown = capsys.readouterr().out
    assert "bioprop.networks.LeNet" in shown
    assert "torch.nn.Linear" not in shown
