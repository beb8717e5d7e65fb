"""The page `examples/ldrl_published.py` with the weights of a published L-DRL, and the proof that both train alike."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.learners import algorithm_learner
from benchmarks.settings import FEEDBACK_MOMENTUM, Setting
from bioprop.algorithms import LDRL
from bioprop.errors import UserError
from bioprop.feedback.noise import NoiseStream
from bioprop.feedback.speed import Speed
from bioprop.networks.mirrors import Mirror
from bioprop.networks.stages import ConvStage, LinearStage, Stage
from examples.ldrl_published import PublishedLDRL
from examples.ldrl_published import Stage as PlainStage

#: How far weights may be apart after `STEPS` whole steps in float64, as a share of their norm.
TOLERANCE = 1e-12
STEPS = 2
#: Images, and iterations a stage, of the comparison: enough for momentum to matter.
COMPARED_BATCH, COMPARED_ITERATIONS = 4, 3

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"elu": F.elu, "identity": lambda values: values}


def plain_twin(setting: Setting, algorithm: LDRL, released: bool = False) -> PublishedLDRL:
    """Build the plain implementation of a published L-DRL, with copies of its weights in torch's own layers.

    Args:
        setting: the hyperparameters.
        algorithm: the L-DRL that it makes, `Setting.ldrl`.
        released: see `PublishedLDRL`.

    Raises:
        UserError: if a stage is of a kind that the plain implementation does not have.
    """
    mirrors = [None, *(mirror for _, _, mirror in algorithm.mirrored_stages())]
    stages = [
        _plain_stage(stage, mirror) for (_, stage), mirror in zip(algorithm.network.stages(), mirrors, strict=True)
    ]
    return PublishedLDRL(
        stages,
        setting.beta,
        setting.noise,
        setting.feedback_lr,
        setting.iterations,
        FEEDBACK_MOMENTUM,
        lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-4),
        released=released,
    )


def _plain_stage(stage: Stage, mirror: Mirror | None) -> PlainStage:
    if not isinstance(stage, ConvStage | LinearStage) or stage.activation not in ACTIVATIONS:
        raise UserError(f"the plain twin has no stage like this: {stage}")
    layer, feedback = _plain_layers(stage)
    layer = layer.to(stage.weight.dtype)
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(getattr(stage, name))
    if mirror is not None:
        feedback = feedback.to(stage.weight.dtype)
        for name, parameter in feedback.named_parameters():
            parameter.data.copy_(as_plain(getattr(mirror, name)))
    pool = nn.MaxPool2d(*stage.pool, return_indices=True) if isinstance(stage, ConvStage) and stage.pool else None
    return PlainStage(layer, None if mirror is None else feedback, pool, ACTIVATIONS[stage.activation])


def _plain_layers(stage: ConvStage | LinearStage) -> tuple[nn.Module, nn.Module]:
    weight, bias = stage.weight, stage.bias is not None
    if isinstance(stage, LinearStage):
        return nn.Linear(weight.shape[1], weight.shape[0], bias), nn.Linear(weight.shape[0], weight.shape[1], bias)
    kernel, padding = weight.shape[2], stage.conv.padding
    if stage.conv.stride != (1, 1) or tuple(stage.input_shape[1:]) != tuple(stage.map_size):
        raise UserError("the plain twin has no convolution that changes the size of the map")
    return (
        nn.Conv2d(weight.shape[1], weight.shape[0], kernel, padding=padding, bias=bias),
        nn.ConvTranspose2d(weight.shape[0], weight.shape[1], kernel, padding=padding, bias=bias),
    )


def as_plain(feedback: Tensor) -> Tensor:
    """Bring a feedback weight into torch's own layout: that of linear layers is the transpose of the mirrors'."""
    return feedback.t() if feedback.dim() == 2 else feedback


@contextmanager
def recorded_noise() -> Iterator[list[Tensor]]:
    """Keep all noise that algorithms draw within the context, in order."""
    draws: list[Tensor] = []
    draw = NoiseStream.draw

    def record(self: NoiseStream, *given: Any) -> list[Tensor]:
        drawn = draw(self, *given)
        draws.extend(tensor.clone() for tensor in drawn)
        return drawn

    with patch.object(NoiseStream, "draw", record):
        yield draws


def assert_equal(setting: Setting, change: Callable[[PublishedLDRL], None] = lambda plain: None) -> None:
    """Check that plain, closed form and autograd through our own call train alike, on a few images in float64.

    Args:
        setting: the network, with as many iterations as it has but `COMPARED_ITERATIONS` at most.
        change: made to the plain twin first; to see that a mistake is noticed.

    Raises:
        UserError: naming the weights that differ.
    """
    setting = replace(setting, iterations=tuple(min(count, COMPARED_ITERATIONS) for count in setting.iterations))
    images, labels = setting.draw(COMPARED_BATCH)
    images = images.double()
    for name, speed in {"closed form": Speed(), "autograd": Speed(closed_form=False)}.items():
        algorithm = setting.ldrl(speed=speed).double()
        plain = plain_twin(setting, algorithm)
        change(plain)
        with recorded_noise() as draws:
            step = algorithm_learner(algorithm).step
            for _ in range(STEPS):
                step(images, labels)
        noise = iter(draws)
        # linear stages' noise is drawn flat
        plain.draw = lambda like, sigma, noise=noise: next(noise).reshape(like.shape)  # type: ignore[misc]
        for _ in range(STEPS):
            plain.step(images, labels)
        apart = {weight: far for weight, far in differences(algorithm, plain).items() if not far <= TOLERANCE}
        if apart:
            named = ", ".join(f"{weight} by {far:.1e}" for weight, far in apart.items())
            raise UserError(
                f"{name} and plain are not the same method: after {STEPS} steps in float64 weights differ by more than "
                f"{TOLERANCE} of their norm ({named}); nothing was timed"
            )


@torch.no_grad()
def differences(algorithm: LDRL, plain: PublishedLDRL) -> dict[str, float]:
    """Return the distance of every forward and feedback weight to its twin, as a share of the twin's norm."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for (name, stage), twin in zip(algorithm.network.stages(), plain.stages, strict=True):
        assert isinstance(stage, ConvStage | LinearStage)
        for parameter, expected in twin.layer.named_parameters():
            pairs[f"{name}'s {parameter}"] = getattr(stage, parameter), expected
    for (name, _, mirror), twin in zip(algorithm.mirrored_stages(), plain.stages[1:], strict=True):
        assert twin.feedback is not None
        for parameter, expected in twin.feedback.named_parameters():
            pairs[f"{name}'s feedback {parameter}"] = as_plain(getattr(mirror, parameter)), expected
    return {name: float((found - wanted).norm() / wanted.norm()) for name, (found, wanted) in pairs.items()}
