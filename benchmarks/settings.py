"""Settings of a benchmark: a network, the size of its batch and the hyperparameters of feedback training."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bioprop.algorithms import DTP, LDRL, Backprop
from bioprop.feedback.noise import SecondNoise
from bioprop.networks import LeNet, Network, SimpleVGG

#: Of the published SGD of feedback weights.
FEEDBACK_MOMENTUM = 0.9


@dataclass(frozen=True)
class Setting:
    """A network with its batch and hyperparameters.

    Attributes:
        network: function that makes the network; can be pickled, for a process of its own.
        batch: images in a batch.
        beta: step of the output target.
        noise: standard deviation, stages 2..N.
        feedback_lr: learning rates of plain SGD, stages 2..N.
        iterations: feedback iterations, stages 2..N.
    """

    network: Callable[[], Network]
    batch: int
    beta: float
    noise: tuple[float, ...]
    feedback_lr: tuple[float, ...]
    iterations: tuple[int, ...]

    def build(self) -> Network:
        """Build the network, with the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.network()

    def draw(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw a batch of noise images and labels; ``batch`` images, or as many as the setting has."""
        generator = torch.Generator().manual_seed(1)
        stages = self.build().stages()
        count, shape, classes = batch or self.batch, stages[0][1].input_shape, stages[-1][1].output_shape[0]
        return torch.randn(count, *shape, generator=generator), torch.randint(classes, (count,), generator=generator)

    def short(self) -> "Setting":
        """Return the setting with one feedback iteration a stage."""
        return replace(self, iterations=(1,) * len(self.iterations))

    def ldrl(self, **changes: Any) -> LDRL:
        """Make L-DRL as published: switches of the noisy pass, the paper's mirror, SGD with momentum.

        Its forward steps are those that the plain twin, whose gradient carries ``beta``, takes at a learning rate of
        0.02 and a weight decay of 1e-4.
        """
        published: dict[str, Any] = {
            "beta": self.beta,
            "second_noise": "independent",
            "noise": self.noise,
            "feedback_lr": self.feedback_lr,
            "iterations": self.iterations,
            "switches": "noisy",
            "mirror": "paper",
            "feedback_step": "sgd",
            "feedback_momentum": FEEDBACK_MOMENTUM,
            "optimizer": partial(torch.optim.SGD, lr=0.02 * self.beta, momentum=0.9, weight_decay=1e-4 / self.beta),
        }
        return self._with_feedback(**(published | changes))

    def probed(self, second_noise: SecondNoise, **changes: Any) -> LDRL:
        """Make L-DRL with another second noise: everything else is left to the algorithm."""
        return self._with_feedback(second_noise=second_noise, **changes)

    def _with_feedback(self, **settings: Any) -> LDRL:
        """Make L-DRL, with the same feedback weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            return LDRL(self.build(), **settings)

    def dtp(self, **changes: Any) -> DTP:
        """Make DTP with as many iterations, at a learning rate so small that nothing moves far: for timing alone."""
        settings = {"beta": self.beta, "noise": self.noise, "iterations": self.iterations, "feedback_lr": 1e-7}
        return DTP(self.build(), **(settings | changes))

    def backprop(self) -> Backprop:
        """Make BP."""
        return Backprop(self.build())


#: Hyperparameters of Ernoult et al. (ICML 2022) for CIFAR-10.
PUBLISHED = {
    "simplevgg": Setting(
        network=partial(SimpleVGG, (3, 32, 32), 10),
        batch=128,
        beta=0.7,
        noise=(0.4, 0.4, 0.2, 0.2, 0.08),
        feedback_lr=(1e-4, 3.5e-4, 8e-3, 8e-3, 0.18),
        iterations=(20, 30, 35, 55, 20),
    ),
    "lenet": Setting(
        network=partial(LeNet, (3, 32, 32), 10),
        batch=256,
        beta=0.4655,
        noise=(0.4164, 0.3826, 0.1395),
        feedback_lr=(7.188427e-4, 1.2510321e-4, 3.541467e-2),
        iterations=(41, 51, 24),
    ),
}
