"""No algorithm reads a value of a tensor within a batch: a GPU's host would wait for it, and no graph could hold it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from bioprop.algorithms import (
    DDTPRHL,
    DTP,
    DTPDRL,
    LDRL,
    Algorithm,
    Backprop,
    DDTPControl,
    DDTPLinear,
    DifferenceReconstruction,
    DirectFeedbackAlignment,
    DirectRandomTargetProjection,
    FeedbackAlignment,
    FixedWeightDTP,
    TargetPropagation,
)
from bioprop.networks import MLP, ResNet
from bioprop.testing.helpers import CLASSES, SHAPE, draw_batch, small_lenet
from tests.algorithms.test_simulated_gpu import Counters

RULES = ("fa", "usf", "frsf", "brsf", "transpose")  # a weight mirror looks at its generator's state


def small_resnet() -> ResNet:
    return ResNet(SHAPE, CLASSES, blocks=(1, 1), widths=(4, 6), activation="elu")


def sgd_alone(parameters: Any) -> torch.optim.Optimizer:
    """Adam counts its steps on the host, and keeps values of its own."""
    return torch.optim.SGD(parameters, lr=0.1, foreach=False)


MADE: dict[str, Callable[[], Algorithm]] = {
    "BP": lambda: Backprop(small_lenet()),
    "BP, batch norm": lambda: Backprop(small_resnet()),
    **{f"FA, {rule}": lambda rule=rule: FeedbackAlignment(small_lenet(), rule=rule) for rule in RULES},  # type: ignore[misc]
    "FA, norms": lambda: FeedbackAlignment(small_lenet(), normalize_feedback=True, batch_manhattan=True),
    "DFA": lambda: DirectFeedbackAlignment(small_lenet()),
    "DRTP": lambda: DirectRandomTargetProjection(small_lenet()),
    "L-DRL, batch norm": lambda: LDRL(small_resnet()),
    "L-DRL by stages": lambda: LDRL(small_resnet(), noise_at="stage", feedback_step="sgd", feedback_lr=0.01),
    "DTP, batch norm": lambda: DTP(small_resnet()),
    "TP": lambda: TargetPropagation(small_lenet()),
    "DTP-DRL": lambda: DTPDRL(small_lenet(), feedback_optimizer=sgd_alone),
    "DDTP-linear": lambda: DDTPLinear(small_resnet(), feedback_optimizer=sgd_alone),
    "DDTP-RHL": lambda: DDTPRHL(small_lenet(), feedback_optimizer=sgd_alone),
    "DDTP-control": lambda: DDTPControl(small_lenet(), feedback_optimizer=sgd_alone),
    "FW-DTP": lambda: FixedWeightDTP(MLP(SHAPE, CLASSES, activation="tanh", standardize=True)),
}


def learn_without_values(algorithm: Algorithm) -> dict[str, Tensor]:
    """Form the gradients of a batch on tensors that have a shape and no values."""
    training, batch = getattr(algorithm, "feedback_training", None), draw_batch()
    if hasattr(algorithm, "streams"):
        algorithm.streams = Counters()
    with FakeTensorMode() as fake:
        for module in algorithm.modules():
            for kept in (module._parameters, module._buffers):
                kept.update({name: fake.from_tensor(tensor) for name, tensor in kept.items() if tensor is not None})
        if training is not None:
            training.streams, optimizer = algorithm.streams, training.restart()
            for group in optimizer.param_groups if optimizer else ():
                group["fused"], group["foreach"] = False, False  # fake tensors know no fused step
        if isinstance(algorithm, DifferenceReconstruction):
            algorithm._feedback_optimizer = algorithm._build_feedback_optimizer()
        _, gradients = algorithm._learn(*(fake.from_tensor(each) for each in batch))
        return algorithm._direction(gradients.forward)


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_batch_reads_no_value(make: Callable[[], Algorithm]) -> None:
    algorithm = make()
    found = learn_without_values(algorithm)
    assert found.keys() == dict(algorithm.network.named_parameters()).keys()


@pytest.mark.parametrize("read", [Tensor.item, Tensor.nonzero])
def test_one_that_does_is_noticed(read: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = Backprop(small_lenet())
    learn = algorithm._learn

    def reading(images: Tensor, labels: Tensor) -> Any:
        read(images.sum())
        return learn(images, labels)

    monkeypatch.setattr(algorithm, "_learn", reading)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        learn_without_values(algorithm)
