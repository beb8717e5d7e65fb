"""Stages: the units of credit assignment that a network is a chain of."""

from abc import ABC, abstractmethod
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.functional.activations import ACTIVATIONS, ActivationName, find_activation
from bioprop.functional.gradients import stage_gradients
from bioprop.functional.pooling import Pool, unpool_adding
from bioprop.networks.layers import ConvLayer, LinearLayer, blocks

#: What a pass hands to the mirror besides the output: max-pool switches (a tensor), for other kinds of stages a tuple
#: of whatever their mirror needs, or None. Only the stage's own mirror looks into it.
Switches = Any


class StageOutput(NamedTuple):
    """The output that a stage hands to the next one, and the switches of that very pass (None without pooling)."""

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

    def clean_pass(self, inputs: Tensor, closed_form: bool = True) -> StagePass:
        """Run the stage once for all that learns from a batch.

        Args:
            inputs: ``s^{n-1}``, ``[batch, *input_shape]``, cut off from the stage below.
            closed_form: form no graph where `local_gradients` needs none.
        """
        with torch.enable_grad():
            return StagePass(inputs, None, *self.run(inputs))

    def local_gradients(self, clean: StagePass, error: Tensor) -> dict[str, Tensor]:
        """Gradients of the stage's own parameters by name; frozen ones have none.

        Args:
            clean: by `clean_pass`.
            error: the derivative of the loss with respect to the stage's output, in its shape.
        """
        return stage_gradients(self, [clean.output], [error])

    def noise_shape(self, inputs: Tensor) -> tuple[int, ...]:
        """Shape in which noise at the stage's input is drawn: the same numbers however gradients are computed."""
        return tuple(inputs.shape)


class LayerStage(Stage):
    """A stage of one linear or convolutional layer and its activation: what a feedback mirror can be built for.

    Attributes:
        activation: name of the activation ``rho``.
        layer_name: name of the layer within the stage.
    """

    activation: str
    layer_name: str

    @property
    def layer(self) -> nn.Module:
        """The linear or convolutional layer."""
        return self.get_submodule(self.layer_name)

    @property
    def weight(self) -> Tensor:
        """The forward weight ``W``, ``[units, ...]``, that the feedback weight is the counterpart of."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the same layer, ``[units]``, if it has one."""
        return self.layer.bias  # type: ignore[return-value]

    @property
    def products(self) -> LinearLayer | ConvLayer | None:
        """The layer, where gradients may be formed of its products alone.

        None in subclasses, which may compute something else than their parent, and where the layer was replaced or
        given hooks.
        """
        layer = self.get_submodule(self.layer_name)
        hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
        if type(self) not in (LinearStage, ConvStage) or any(hooks) or type(layer) not in (LinearLayer, ConvLayer):
            return None
        return cast(LinearLayer | ConvLayer, layer)

    @abstractmethod
    def affine(self, inputs: Tensor) -> Tensor:
        """Compute ``W x + b``, ``[batch, *input_shape]`` to what `activate` takes."""

    @abstractmethod
    def activate(self, affine: Tensor) -> StageOutput:
        """Apply activation and pooling (if any)."""

    def unpool(self, pooled: Tensor, switches: Tensor | None) -> Tensor:
        """Lead values in the shape of the output back through the transposed pooling (if any)."""
        return pooled

    def run(self, inputs: Tensor) -> StageOutput:
        """Compute ``F^n(inputs)`` together with the switches of this pass."""
        return self.activate(self.affine(inputs))

    def clean_pass(self, inputs: Tensor, closed_form: bool = True) -> StagePass:
        """Run the stage once for all that learns from a batch; without a graph where there is a closed form."""
        if not closed_form or self.products is None:
            return super().clean_pass(inputs)
        with torch.no_grad():
            affine = self.affine(inputs)
            return StagePass(inputs, affine, *self.activate(affine))

    @torch.no_grad()
    def local_gradients(self, clean: StagePass, error: Tensor) -> dict[str, Tensor]:
        """``wgrad(x, P^T(rho'(a) error))`` with the slope read off the output, by the name of weight and bias."""
        if clean.affine is None:
            return super().local_gradients(clean, error)
        layer = cast(LinearLayer | ConvLayer, self.layer)
        axes = [axis for axis in range(error.dim()) if axis != 1]
        gradients: dict[str, Tensor] = {}
        # maps before pooling are made for a block of samples at a time, which stays in a processor's cache
        for samples in blocks(clean.affine, fewest=8):
            part = error[samples] * ACTIVATIONS[self.activation].slope(clean.output[samples])
            found: dict[str, Tensor] = {}
            if layer.weight.requires_grad:
                switches = None if clean.switches is None else clean.switches[samples]
                found["weight"] = layer.weight_gradient(clean.inputs[samples], self.unpool(part, switches))
            if layer.bias is not None and layer.bias.requires_grad:
                found["bias"] = part.sum(axes)
            gradients = {name: gradients[name].add_(new) if gradients else new for name, new in found.items()}
        return {f"{self.layer_name}.{name}": gradient for name, gradient in gradients.items()}


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
        self._rho = find_activation(activation).rho
        self.linear = LinearLayer(prod(input_shape), out_features, bias=bias)

    def noise_shape(self, inputs: Tensor) -> tuple[int, ...]:
        """``[batch, in_features]``."""
        return len(inputs), inputs[0].numel()

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
        conv = ConvLayer(channels, out_channels, kernel_size, stride, padding, bias=bias)
        # the layout that convolutions are fastest in, and that everything after them then has
        self.conv = conv.to(memory_format=torch.channels_last)
        self.pool = pool
        self._rho = find_activation(activation).rho
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

    def unpool(self, pooled: Tensor, switches: Tensor | None) -> Tensor:
        """Lead values back through the transposed pooling, ``[batch, out_channels, *map_size]``."""
        if self.pool is None or switches is None:
            return pooled
        return unpool_adding(pooled, switches, self.pool, self.map_size)

    def affine(self, inputs: Tensor) -> Tensor:
        """Compute ``conv(x)``, ``[batch, *input_shape]`` to ``[batch, out_channels, *map_size]``."""
        affine: Tensor = self.conv(inputs)
        return affine

    def activate(self, affine: Tensor) -> StageOutput:
        """Compute ``pool(rho(affine))`` and its switches."""
        return StageOutput(*((self._rho(affine), None) if self.pool is None else self.pool.activate(affine, self._rho)))
