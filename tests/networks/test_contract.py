"""The networks of the package keep the promises of every network, and the suite notices a broken one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bioprop.algorithms import LDRL
from bioprop.networks import MLP, InvertibleMLP, LeNet, LinearStage, Network, ResNet, SimpleVGG, StageOutput
from bioprop.networks.mirrors import LinearMirror, build_mirror
from bioprop.testing import NetworkContract

NETWORKS: dict[str, Callable[..., Network]] = {
    "MLP": lambda *sizes: MLP(*sizes, hidden=(9, 8), activation="tanh"),
    "StandardizedMLP": lambda *sizes: MLP(*sizes, hidden=(9, 8), activation="relu", standardize=True),
    "LeNet": lambda *sizes: LeNet(*sizes, channels=(3, 4), hidden=8),
    "SimpleVGG": lambda *sizes: SimpleVGG(*sizes, channels=(3, 4, 5), activation="relu"),
    "ResNet": lambda *sizes: ResNet(*sizes, blocks=(1, 1), widths=(3, 4)),
    "InvertibleMLP": lambda *sizes: InvertibleMLP(*sizes),
}


def suite_of(build: Callable[..., Network], mirrors: bool = True) -> type[NetworkContract]:
    class Suite(NetworkContract):
        has_mirrors = mirrors

        def make(self, image_shape: tuple[int, int, int], num_classes: int) -> Network:
            return build(image_shape, num_classes)

    return Suite


for name, build in NETWORKS.items():
    globals()[f"Test{name}"] = suite_of(build, name not in ("StandardizedMLP", "InvertibleMLP"))


# -- broken promises -------------------------------------------------------------------------------------------------


class Forgetful(Network):
    """Does not say how many units it has."""

    def __init__(self, image_shape: Any, num_classes: int, hidden: int = 5) -> None:
        stages = {"hidden": LinearStage(image_shape, hidden, "tanh"), "out": LinearStage((hidden,), num_classes, "elu")}
        super().__init__(stages, {"image_shape": list(image_shape), "num_classes": num_classes})


class Flipped(LinearStage):
    """Is mirrored with the wrong sign."""


class FlippedMirror(LinearMirror):
    def forward(self, outputs: Tensor, switches: Any) -> Tensor:
        return -super().forward(outputs, switches)


@build_mirror.register
def _(stage: Flipped, form: Any) -> FlippedMirror:
    return FlippedMirror(stage, form)


class TwoWays(LinearStage):
    """Computes something else alone than in training."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


class Idle(LinearStage):
    """Has a bias that it never uses."""

    def run(self, inputs: Tensor) -> StageOutput:
        return self.activate(inputs.flatten(1) @ self.weight.t())


def with_output(kind: type[LinearStage]) -> Callable[..., Network]:
    def build(image_shape: Any, num_classes: int) -> Network:
        return Network({"in": LinearStage(image_shape, 9, "tanh"), "out": kind((9,), num_classes, "identity")}, {})

    return build


Check = Callable[[NetworkContract, Path], None]


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (
            lambda *sizes: Forgetful(*sizes, hidden=6),
            lambda suite, _: suite.test_it_is_built_again_from_its_description(),
        ),
        (
            with_output(Flipped),
            lambda suite, _: suite.test_exact_mirrors_with_copied_weights_are_transposed_jacobians(),
        ),
        (with_output(TwoWays), lambda suite, _: suite.test_each_stage_takes_what_the_one_below_hands_out()),
        (with_output(Idle), lambda suite, folder: suite.test_a_step_trains_every_weight(LDRL, folder)),
    ],
    ids=["forgetful", "flipped", "two ways", "idle"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_a_broken_promise_is_noticed(broken: Callable[..., Network], check: Check, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check(suite_of(broken)(), tmp_path)
    check(suite_of(NETWORKS["MLP"])(), tmp_path)
