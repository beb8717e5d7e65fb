"""A training step of target propagation written once more, from ALGORITHMS.md and with torch autograd alone.

Nothing of `bioprop` is used: weights are plain tensors, targets are targets (not differences), every loss is formed and
differentiated as its formula stands. Noise is replayed from a recording. None stands for ``auto``.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.algorithms import plain_second_noise

Batch = tuple[Tensor, Tensor]
TargetRule = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Descends the local losses as they are, whose gradients carry ``beta``.
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}


def difference_target(state: Tensor, back_target: Tensor, back_state: Tensor) -> Tensor:
    """``t^{n-1} = s^{n-1} + G^n(t^n) - G^n(s^n)``, of which the arguments are the three parts."""
    return state + back_target - back_state


class PlainStage(NamedTuple):
    """One stage's weights: conv 5x5 + ELU + max-pool 3/2/1 where ``weight`` has four dimensions, else linear."""

    weight: Tensor
    bias: Tensor
    feedback: Tensor
    feedback_bias: Tensor
    input_shape: tuple[int, ...]
    is_output: bool

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.weight.dim() == 4:
            maps = F.elu(F.conv2d(inputs, self.weight, self.bias, padding=2))
            return F.max_pool2d(maps, 3, 2, 1, return_indices=True)
        state = F.linear(inputs.flatten(1), self.weight, self.bias)
        return (state if self.is_output else F.elu(state)), None

    @property
    def geometry(self) -> tuple[int, int, tuple[int, int, int] | None]:
        """Stride and padding of the convolution, and the pooling."""
        return 1, 2, (3, 2, 1) if self.weight.dim() == 4 else None

    def features(self, values: Tensor, switches: Tensor | None, form: str) -> Tensor:
        if switches is None:
            return self.phi(values, form)
        if form == "paper":
            return self.phi(self.put_back(values, switches, adding=False), form)
        return self.put_back(self.phi(values, form), switches)

    def put_back(self, values: Tensor, switches: Tensor | None, adding: bool = True) -> Tensor:
        size = self.input_shape[1:]  # the convolution keeps it
        return values if switches is None else unpool(values, switches, size, adding)

    def back(self, values: Tensor, switches: Tensor | None, form: str) -> Tensor:
        features = self.features(values, switches, form)
        if switches is None:
            return (features @ self.feedback + self.feedback_bias).reshape(-1, *self.input_shape)
        return F.conv_transpose2d(features, self.feedback, self.feedback_bias, padding=2)

    def phi(self, values: Tensor, form: str) -> Tensor:
        if self.is_output:
            return values
        if form == "paper":
            return F.elu(values)
        low = values.clamp(-1, 0)
        return torch.where(values > 0, values, low + low**2 / 2)


def unpool(values: Tensor, switches: Tensor, size: tuple[int, int], adding: bool) -> Tensor:
    maps = values.new_zeros(*values.shape[:2], size[0] * size[1])
    for row, column in product(range(values.shape[2]), range(values.shape[3])):
        where, value = switches[:, :, row, column, None], values[:, :, row, column, None]
        maps = maps.scatter_add(2, where, value) if adding else maps.scatter(2, where, value)
    return maps.view(*values.shape[:2], *size)


class PlainLearner:
    """Stages, their settings (lists: n = 2..N), and the state of both optimizers."""

    def __init__(
        self,
        stages: list[PlainStage],
        method: str,
        form: str,
        beta: float,
        iterations: list[int | None],
        feedback_lr: list[float | None],
        normalized: bool,
        clean_switches: bool,
        target_rule: TargetRule = difference_target,
        second_noise: str = "independent",
    ) -> None:
        self.stages, self.method, self.form, self.beta = stages, method, form, beta
        self.iterations, self.feedback_lr, self.normalized = iterations, feedback_lr, normalized
        self.clean_switches, self.target_rule, self.second_noise = clean_switches, target_rule, second_noise
        for stage in stages:
            for tensor in stage[:4]:
                tensor.requires_grad_()
        self.optimizer = torch.optim.SGD([tensor for stage in stages for tensor in stage[:2]], **SGD)
        self.feedback_optimizers = [
            torch.optim.SGD(stage[2:4], lr=lr or 0.0, momentum=0.9)
            for stage, lr in zip(stages[1:], feedback_lr, strict=True)
        ]

    def training_step(self, images: Tensor, labels: Tensor, noise: Iterator[Tensor], sigma: list[float | None]) -> None:
        self.train_feedback(images, noise, sigma)
        self.optimizer.zero_grad()
        self.local_loss(images, labels).backward()
        self.optimizer.step()

    def run(self, images: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return ``s^0 .. s^N`` and the switches of stages 1..N."""
        states, switches = [images], []
        with torch.no_grad():
            for stage in self.stages:
                state, chosen = stage.forward(states[-1])
                states.append(state)
                switches.append(chosen)
        return states, switches

    def train_feedback(self, images: Tensor, noise: Iterator[Tensor], sigma: list[float | None]) -> None:
        states, switches = self.run(images)
        for n, stage in enumerate(self.stages[1:], start=1):
            if self.second_noise != "independent":
                clean = plain_second_noise.Clean(states[n], states[n + 1], switches[n])
                rule = self.rule_of(n - 1, sigma[n - 1])
                plain_second_noise.train(stage, rule, clean, noise, self.feedback_optimizers[n - 1])
                continue
            for _ in range(self.iterations[n - 1]):
                optimizer = self.feedback_optimizers[n - 1]
                optimizer.zero_grad()
                if self.method == "dtp":
                    noisy = states[n] + sigma[n - 1] * next(noise).view_as(states[n])
                    output, chosen = self.detached_pass(stage, noisy)
                    loss = ((noisy - stage.back(output, chosen, self.form)) ** 2).sum() / len(images)
                else:
                    eps, eta = (sigma[n - 1] * next(noise).view_as(like) for like in states[n : n + 2])
                    output, chosen = self.detached_pass(stage, states[n] + eps)
                    chosen = switches[n] if self.clean_switches else chosen
                    clean = stage.back(states[n + 1], switches[n], self.form)
                    shaken = stage.back(states[n + 1] + eta, switches[n], self.form)
                    first = (eps * (stage.back(output, chosen, self.form) - clean)).sum()
                    loss = (-2 * first + ((shaken - clean) ** 2).sum()) / len(images)
                loss.backward()
                if self.normalized:
                    change = stage.phi(states[n + 1] + eta, self.form) - stage.phi(states[n + 1], self.form)
                    curvature = 2 * (change**2).transpose(0, 1).flatten(1).sum(1) / len(change)
                    if stage.is_output:  # phi is the identity, so the expectation is known
                        curvature = torch.full_like(curvature, 2 * sigma[n - 1] ** 2 * change[0, 0].numel())
                    self.newton_step(stage, curvature, self.feedback_lr[n - 1])
                else:
                    optimizer.step()

    def rule_of(self, place: int, sigma: float | None) -> plain_second_noise.Rule:
        settings = sigma, self.iterations[place], self.feedback_lr[place], self.normalized
        return plain_second_noise.Rule(self.second_noise, self.form, self.clean_switches, *settings)

    @staticmethod
    @torch.no_grad()
    def detached_pass(stage: PlainStage, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        return stage.forward(inputs)

    @staticmethod
    @torch.no_grad()
    def newton_step(stage: PlainStage, curvature: Tensor, eta: float) -> None:
        """``V_o <- V_o - eta gradient_o / (D_o + 0.03 mean(D))``."""
        for unit in range(len(curvature)):
            scale = curvature[unit] + 0.03 * curvature.mean()
            stage.feedback[unit] -= eta * stage.feedback.grad[unit] / scale

    def local_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """``sum_n mean_batch 1/2 |F^n(s^{n-1}) - t^n|^2`` with detached inputs and targets."""
        states, switches = self.run(images)
        onehot = torch.eye(states[-1].shape[1], dtype=images.dtype)[labels]
        targets = [states[-1] - self.beta * (states[-1].softmax(1) - onehot)]
        with torch.no_grad():
            for n in range(len(self.stages) - 1, 0, -1):
                back = [self.stages[n].back(y, switches[n], self.form) for y in (targets[0], states[n + 1])]
                targets.insert(0, self.target_rule(states[n], *back))
        loss = images.new_zeros(())
        for stage, inputs, target in zip(self.stages, states[:-1], targets, strict=True):
            loss = loss + 0.5 * ((stage.forward(inputs)[0] - target) ** 2).sum() / len(images)
        return loss
