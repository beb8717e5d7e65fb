"""Feedback training with an echo for L-DRL's second noise, or with that integrated out, written once more.

As `plain.py`: nothing of `bioprop` is used, every term is formed as its formula stands and differentiated by autograd.
"""

from collections.abc import Iterator
from math import ceil
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

LEAST_RMS = 1e-3


class Stage(Protocol):
    """What `plain.PlainStage` and `plain_geometry.GeneralStage` have in common."""

    weight: Tensor
    feedback: Tensor
    input_shape: tuple[int, ...]

    @property
    def geometry(self) -> tuple[int, int, tuple[int, int, int] | None]: ...

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]: ...

    def features(self, values: Tensor, switches: Tensor | None, form: str) -> Tensor: ...

    def back(self, values: Tensor, switches: Tensor | None, form: str) -> Tensor: ...

    def put_back(self, values: Tensor, switches: Tensor | None) -> Tensor: ...


class Rule(NamedTuple):
    """Settings of one stage; None for those that follow from the sizes."""

    second_noise: str
    form: str
    clean_switches: bool
    sigma: float | None
    iterations: int | None
    rate: float | None
    normalized: bool


class Clean(NamedTuple):
    """The pass of one batch through a stage."""

    inputs: Tensor
    output: Tensor
    switches: Tensor | None

    def first(self, images: int) -> "Clean":
        switches = None if self.switches is None else self.switches[:images]
        return Clean(self.inputs[:images], self.output[:images], switches)


def train(stage: Stage, rule: Rule, clean: Clean, normals: Iterator[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """All iterations of one batch."""
    batch, fan_in, positions = len(clean.inputs), stage.weight[0].numel(), clean.output[0, 0].numel()
    echo, is_short = rule.second_noise == "echo", 2 * fan_in > batch * positions**2
    images, iterations = batch, rule.iterations
    if iterations is None and echo:
        images, iterations = min(batch, 8 * ceil(2 * fan_in / positions / 8)), 2
    elif iterations is None:
        iterations = max(4, ceil(fan_in / batch / positions))
    sigma = rule.sigma
    if sigma is None:
        sigma = 0.01 * max(LEAST_RMS, float((clean.inputs**2).mean()) ** 0.5)
    part = clean.first(images)
    decay = 2 * sigma**2 * (unit_decay(stage, rule, part) if echo else tap_decay(stage, rule, part))
    for iteration in range(iterations):
        if echo and is_short and iteration % 2 == 1:
            noise = sigma * basis(clean.inputs)
            damped = 2 * sigma**2 * clean.inputs[0].numel() * positions * crowding(stage, clean) / batch
            damped = torch.full_like(decay, damped)
        else:
            noise = sigma * next(normals).reshape(images, *clean.inputs.shape[1:])
            damped = decay + 2 * sigma**2 * fan_in * windows_over_a_position(stage) / images * (1 if echo else 10)
        loss = echo_loss(stage, rule, part, noise) if echo else expected_loss(stage, rule, part, noise, decay)
        (stage.feedback.grad,) = torch.autograd.grad(loss, (stage.feedback,))
        step(stage, rule, damped, optimizer)


@torch.no_grad()
def step(stage: Stage, rule: Rule, damped: Tensor, optimizer: torch.optim.Optimizer) -> None:
    if rule.rate is None:
        stage.feedback.sub_(stage.feedback.grad / damped)
    elif rule.normalized:
        stage.feedback.sub_(rule.rate * stage.feedback.grad / (damped + 0.03 * damped.mean()))
    else:
        optimizer.step()


def noisy_back(stage: Stage, rule: Rule, clean: Clean, noise: Tensor) -> Tensor:
    """``G(F(s + eps))``."""
    with torch.no_grad():
        output, switches = stage.forward(clean.inputs + noise)
    return stage.back(output, clean.switches if rule.clean_switches else switches, rule.form)


def echo_loss(stage: Stage, rule: Rule, clean: Clean, noise: Tensor) -> Tensor:
    """``-2 mean <eps, G(F(s + eps)) - G(s' + echo)>`` with ``echo = J_G^T eps``, which is constant."""
    output = clean.output.clone().requires_grad_()
    (echo,) = torch.autograd.grad((noise * stage.back(output, clean.switches, rule.form)).sum(), output)
    answered = stage.back(clean.output + echo, clean.switches, rule.form)
    return -2 * (noise * (noisy_back(stage, rule, clean, noise) - answered)).sum() / len(noise)


def expected_loss(stage: Stage, rule: Rule, clean: Clean, noise: Tensor, decay: Tensor) -> Tensor:
    """``-2 mean <eps, G(F(s + eps)) - G(s')> + sigma^2 |J_G|^2``, the last as half a decay times ``V^2``."""
    change = noisy_back(stage, rule, clean, noise) - stage.back(clean.output, clean.switches, rule.form)
    return 0.5 * (decay * stage.feedback**2).sum() - 2 * (noise * change).sum() / len(noise)


def squared_slopes(stage: Stage, rule: Rule, clean: Clean) -> Tensor:
    """The square of how each value of the map before pooling follows the output that is put there, summed there."""
    output = clean.output.clone().requires_grad_()
    (slope,) = torch.autograd.grad(stage.features(output, clean.switches, rule.form).sum(), output)
    return stage.put_back(slope**2, clean.switches)


def unit_decay(stage: Stage, rule: Rule, clean: Clean) -> Tensor:
    """``mean_batch sum_positions phi'^2`` of each unit."""
    squares = squared_slopes(stage, rule, clean)
    sums = squares.transpose(0, 1).flatten(1).sum(1) / len(squares)
    return sums.reshape(-1, *[1] * (stage.weight.dim() - 1))


def tap_decay(stage: Stage, rule: Rule, clean: Clean) -> Tensor:
    """The same, over the positions from which a tap of the kernel falls on the image."""
    if stage.weight.dim() == 2:
        return unit_decay(stage, rule, clean)
    squares, (stride, padding, _) = squared_slopes(stage, rule, clean).sum(0), stage.geometry
    decay = torch.zeros(len(squares), 1, *stage.weight.shape[2:], dtype=squares.dtype)
    (height, width), (rows, columns) = stage.input_shape[1:], squares.shape[1:]
    for up in range(decay.shape[2]):
        for left in range(decay.shape[3]):
            seen_rows = [row for row in range(rows) if 0 <= row * stride + up - padding < height]
            seen_columns = [each for each in range(columns) if 0 <= each * stride + left - padding < width]
            decay[:, 0, up, left] = squares[:, seen_rows][:, :, seen_columns].sum((1, 2))
    return decay / len(clean.output)


def windows_over_a_position(stage: Stage) -> float:
    _, _, pool = stage.geometry
    return 1.0 if pool is None else max(1.0, (pool[0] / pool[1]) ** 2)


def crowding(stage: Stage, clean: Clean) -> float:
    """Half the positions that a window chooses from."""
    before = stage.put_back(clean.output, clean.switches)[0].numel()
    return max(1.0, before / clean.output[0].numel() / 2)


def basis(inputs: Tensor) -> Tensor:
    """Rows that span the batch's activities, orthogonal and as long as white noise of size 1."""
    rows = inputs.flatten(1)
    products = rows @ rows.T
    ridge = 1e-5 * products.trace() * torch.eye(len(rows), dtype=rows.dtype)
    orthonormal = torch.linalg.inv(torch.linalg.cholesky(products + ridge)) @ rows
    return (orthonormal * rows.shape[1] ** 0.5).reshape(inputs.shape)
