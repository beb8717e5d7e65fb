"""The whole training steps that are compared, each outside of Lightning."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.learners import Learner, algorithm_learner
from benchmarks.settings import Setting
from benchmarks.twins import plain_twin
from bioprop.feedback.noise import SecondNoise
from bioprop.feedback.speed import Speed

#: The plain variant that does in every iteration what the authors' program does.
RELEASED = "plain, as released"


class Variant(NamedTuple):
    """One line of the table.

    Attributes:
        make: builds it.
        plain: the variant that is plain autograd for the same method, to compare with.
        repeats: steps a round; short ones are noisy.
    """

    make: Callable[[Setting], Learner]
    plain: str | None = "plain"
    repeats: int = 1


def plain_learner(setting: Setting, released: bool = False) -> Learner:
    """L-DRL written plainly; with the clean pass in every iteration, as released by its authors, or once a batch."""
    plain = plain_twin(setting, setting.ldrl(), released)
    return Learner(plain.step, [weight for stage in plain.stages for weight in stage.parameters()])


def plain_backprop(setting: Setting) -> Learner:
    """BP written plainly, in torch's default layout."""
    stages = plain_twin(setting, setting.ldrl()).stages
    weights = [weight for stage in stages for weight in stage.layer.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=1e-4)

    def step(images: Tensor, labels: Tensor) -> None:
        state = images
        for stage in stages:
            state, _ = stage.run(state)
        optimizer.zero_grad()
        F.cross_entropy(state, labels).backward()
        optimizer.step()

    return Learner(step, weights)


def _ldrl(speed: Speed) -> Variant:
    return Variant(lambda setting: algorithm_learner(setting.ldrl(speed=speed)))


def _probed(second_noise: SecondNoise, speed: Speed) -> Variant:
    return Variant(lambda setting: algorithm_learner(setting.probed(second_noise, speed=speed)), repeats=3)


#: What is compared, by name.
VARIANTS = {
    "BP": Variant(lambda setting: algorithm_learner(setting.backprop()), plain=None, repeats=3),
    "echo": _probed("echo", Speed()),
    "echo, autograd": _probed("echo", Speed(closed_form=False)),
    "expected": _probed("expected", Speed()),
    "BP, plain": Variant(plain_backprop, plain=None, repeats=3),
    "plain": Variant(plain_learner),
    RELEASED: Variant(partial(plain_learner, released=True)),
    "autograd": _ldrl(Speed(closed_form=False)),
    "closed form": _ldrl(Speed()),
    "closed form, bfloat16": _ldrl(Speed(bfloat16=True)),
    "DTP, autograd": Variant(
        lambda setting: algorithm_learner(setting.dtp(speed=Speed(closed_form=False))), plain="DTP, autograd"
    ),
    "DTP, closed form": Variant(lambda setting: algorithm_learner(setting.dtp()), plain="DTP, autograd"),
}
