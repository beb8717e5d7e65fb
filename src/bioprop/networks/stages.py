"""Stages: the units of credit assignment that a network is a chain of."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.functional.activations import FLAT, ActivationName, forward_activation
from bioprop.functional.pooling import Pool, max_pool

#: What a pass hands to the mirror besides the output: max-pool switches (a tensor), for other kinds of stages a tuple
#: of whatever their mirror needs, or None. Only the stage's own mirror looks into it.
Switches = Any


class StageOutput(NamedTuple):
    """What a stage hands to the next one, and the switches of that very pass (None without pooling)."""

    output: Tensor
    switches: Switches


class StagePass(NamedTuple):
    """One pass through a stage, with all that learning on the same batch needs again.

    Attributes:
        inputs: ``s^{n-1}``, ``[batch, *input_shape]``.
        affine: what the activation and the pooling are applied to, for the stages that consist of one layer.
        output: ``s^n``, ``[batch, *output_shape]``; for other stages it carries the graph of this very pass.
        switches: those of this pass.
    """

    inputs: Tensor
    affine: Tensor | None
    output: Tensor
    switches: Switches


class Stage(nn.Module, ABC):
    """A stage ``s^n = F^n(s^{n-1})``, usable as a plain module.

    Attributes:
        input_shape: shape of one sample of ``s^{n-1}``, without the batch.
        output_shape: shape of one sample of ``s^n``, without the batch.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @abstractmethod
    def run(self, inputs: Tensor) -> StageOutput:
        """Compute ``F^n(inputs)`` together with the switches of this pass."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute ``F^n(inputs)`` for inputs ``[batch, *input_shape]``; returns ``[batch, *output_shape]``."""
        return self.run(inputs).output


class LayerStage(Stage):
    """A stage of one linear or convolutional layer and its activation: what a feedback mirror can be built for.

    Attributes:
        activation: name of the activation ``rho``.
        layer_name: name of the layer within the stage.
    """

    activation: str
    layer_name: str

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The forward weight that the feedback weight of this stage is the counterpart of."""

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """The bias of the same layer, if it has one."""

    @abstractmethod
    def affine(self, inputs: Tensor) -> Tensor:
        """Compute ``W x + b``, ``[batch, *input_shape]`` to what `activate` takes."""

    @abstractmethod
    def activate(self, affine: Tensor) -> StageOutput:
        """Apply activation and pooling (if any)."""

    def run(self, inputs: Tensor) -> StageOutput:
        """Compute ``F^n(inputs)`` together with the switches of this pass."""
        return self.activate(self.affine(inputs))


class LinearStage(LayerStage):
    """Flatten -> linear -> activation.

    Args:
        input_shape: shape of one input sample; flattened where it has more than one dimension.
        out_features: number of units.
        activation: ``identity`` for an output stage.
        bias: whether the linear layer has a bias.
    """

    layer_name = "linear"

    def __init__(
        self, input_shape: tuple[int, ...], out_features: int, activation: ActivationName, bias: bool = True
    ) -> None:
        super().__init__()
        self.input_shape, self.output_shape, self.activation = input_shape, (out_features,), activation
        self._rho = forward_activation(activation)
        self.linear = nn.Linear(prod(input_shape), out_features, bias=bias)

    @property
    def weight(self) -> Tensor:
        """``[out_features, in_features]``."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """``[out_features]``."""
        return self.linear.bias

    def affine(self, inputs: Tensor) -> Tensor:
        """Compute ``W x + b``, ``[batch, *input_shape]`` to ``[batch, out_features]``."""
        affine: Tensor = self.linear(inputs.flatten(1))
        return affine

    def activate(self, affine: Tensor) -> StageOutput:
        """Compute ``rho(affine)``; there are no switches."""
        return StageOutput(self._rho(affine), None)


class ConvStage(LayerStage):
    """Convolution -> activation -> max-pool (if any).

    Args:
        input_shape: (channels, height, width) of one input sample, in pixels.
        out_channels: number of channels computed.
        kernel_size: side of the square kernel, in pixels.
        stride: step of the convolution, in pixels.
        padding: zeros on every side, in pixels.
        activation: name of the activation.
        pool: max-pooling after the activation, or None.
        bias: whether the convolution has a bias.
        name: what to call the stage in error messages.

    Raises:
        UserError: if the kernel or the pooling does not fit the input.
    """

    layer_name = "conv"

    def __init__(
        self,
        input_shape: tuple[int, ...],
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        activation: ActivationName = "elu",
        pool: Pool | None = None,
        bias: bool = True,
        name: str = "convolution",
    ) -> None:
        super().__init__()
        channels, *size = input_shape
        conv = nn.Conv2d(channels, out_channels, kernel_size, stride, padding, bias=bias)
        # the layout that convolutions are fastest in, and that everything after them then has
        self.conv = conv.to(memory_format=torch.channels_last)
        self.pool = pool
        self._rho = forward_activation(activation)
        height, width = ((side + 2 * padding - kernel_size) // stride + 1 for side in size)
        self.map_size = (height, width)  # before pooling
        pooled = pool.output_size(height, width) if pool is not None and min(height, width) > 0 else (height, width)
        if min(pooled) < 1:
            raise UserError(
                f"{name} does not fit its input of {size[0]}x{size[1]} pixels, which would leave an empty map: "
                f"use larger images or a network with fewer pooled stages"
            )
        self.input_shape, self.output_shape = input_shape, (out_channels, *pooled)
        self.activation = activation

    @property
    def weight(self) -> Tensor:
        """``[out_channels, in_channels, kernel, kernel]``."""
        return self.conv.weight

    @property
    def bias(self) -> Tensor | None:
        """``[out_channels]``."""
        return self.conv.bias

    def affine(self, inputs: Tensor) -> Tensor:
        """Compute ``conv(x)``, ``[batch, *input_shape]`` to ``[batch, out_channels, *map_size]``."""
        affine: Tensor = self.conv(inputs)
        return affine

    def activate(self, affine: Tensor) -> StageOutput:
        """Compute ``pool(rho(affine))`` and its switches.

        The activations never decrease, so the maximum may be taken first, which leaves them fewer values to work on.
        """
        if self.pool is None:
            return StageOutput(self._rho(affine), None)
        # where the activation maps many values to one, the switch must be that of the first of its maxima
        pooled, switches = max_pool(self._rho(affine) if self.activation in FLAT else affine, self.pool)
        return StageOutput(self._rho(pooled), switches)


def conv_chain(
    network: str,
    image_shape: tuple[int, ...],
    channels: Sequence[int],
    kernel_size: int,
    pool: Pool,
    activation: ActivationName,
    bias: bool,
) -> tuple[dict[str, Stage], tuple[int, ...]]:
    """Conv stages ``conv1``, ``conv2``, ... of the same geometry, each "same"-padded and then pooled.

    Returns:
        The stages by name, and the shape of one output sample of the last.

    Raises:
        UserError: naming the network and the first stage that the image is too small for.
    """
    stages: dict[str, Stage] = {}
    shape = image_shape
    for number, width in enumerate(channels, start=1):
        name = f"conv{number}"
        stages[name] = ConvStage(
            shape,
            width,
            kernel_size,
            padding=kernel_size // 2,
            activation=activation,
            pool=pool,
            bias=bias,
            name=f"{network}'s {name}",
        )
        shape = stages[name].output_shape
    return stages, shape
