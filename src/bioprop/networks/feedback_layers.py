"""Layers of feedback operators on one batch: what closed forms of feedback training are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bioprop.functional.activations import identity
from bioprop.functional.pooling import Places
from bioprop.networks.layers import ConvLayer, LinearLayer
from bioprop.networks.stages import LayerStage, StageOutput, Switches

if TYPE_CHECKING:
    from bioprop.networks.mirrors import LayerMirror

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """The activations between a layer and its feedback layer within a stage of several; there is no pooling.

    It stands for both `LayerStage` and `LayerMirror` in a `FeedbackLayer`.

    Attributes:
        rho: activation of the forward layer.
        phi: activation before the feedback layer.
        slope: derivative of ``phi``.
        overlap: the mean number of pool windows that a position lies in.
    """

    rho: Function
    phi: Function
    slope: Function
    overlap: float = 1.0

    @property
    def is_linear(self) -> bool:
        """Return whether ``phi`` is the identity."""
        return self.phi is identity

    def activate(self, affine: Tensor) -> StageOutput:
        """Apply ``rho``."""
        return StageOutput(self.rho(affine), None)

    def locate(self, switches: Switches) -> None:
        """Return None: nothing was pooled."""

    def unpool(self, pooled: Tensor, places: Places | None) -> Tensor:
        """Return the values as they are."""
        return pooled

    def pick(self, maps: Tensor, places: Places | None) -> Tensor:
        """Return the values as they are."""
        return maps


class FeedbackLayer(NamedTuple):
    """One layer of a feedback operator, the forward layer that it is the counterpart of, and one batch of both.

    Attributes:
        name: of the feedback weight among the operator's parameters.
        stage: what follows the forward layer's products.
        mirror: what precedes the feedback layer's.
        layer: the forward layer, which knows the products.
        inputs: of the forward layer, in the shape of the noise that is added to them, ``[batch, ...]``.
        affine: what ``stage`` activates, ``W x + b``.
        output: what it makes of that, ``y``.
        places: where pooled values go back to in the pass that made ``y``.
        phi: ``phi(y)``.
        forward_weight: effective ``W``.
        weight: ``V``, ``[units, ...]``.
        scale: ``[units]``, where the effective feedback weights are ``scale_o V_o``; None for 1.
        share: what the layer's loss is multiplied by.
        input_noise: the number of the noise tensor that enters the forward layer.
        output_noise: the number of the one that enters the feedback layer.
    """

    name: str
    stage: "LayerStage | Activation"
    mirror: "LayerMirror | Activation"
    layer: LinearLayer | ConvLayer
    inputs: Tensor
    affine: Tensor
    output: Tensor
    places: Places | None
    phi: Tensor
    forward_weight: Tensor
    weight: Tensor
    scale: Tensor | None = None
    share: float = 1.0
    input_noise: int = 0
    output_noise: int = 1

    def block(self, samples: slice) -> "FeedbackLayer":
        """Return the part that belongs to some samples of the batch."""
        return self._replace(
            inputs=self.inputs[samples],
            affine=self.affine[samples],
            output=self.output[samples],
            places=None if self.places is None else self.places.block(samples),
            phi=self.phi[samples],
        )

    @property
    def effective(self) -> Tensor:
        """The effective ``V``."""
        return self.scaled(self.weight)

    def scaled(self, values: Tensor) -> Tensor:
        """Multiply values of each unit, ``[units, ...]``, by its scale."""
        return values if self.scale is None else values * self.scale.view(-1, *[1] * (values.dim() - 1))

    @property
    def size(self) -> torch.Size:
        """Height and width of the layer's input."""
        return self.inputs.shape[2:]

    @property
    def area(self) -> float:
        """The number of positions before pooling for each one after it."""
        return self.affine[0].numel() / self.output[0].numel()


class FeedbackLayers(NamedTuple):
    """All layers of a feedback operator, and the shapes of the noise tensors that they share, batch first."""

    layers: list[FeedbackLayer]
    noise_shapes: list[tuple[int, ...]]
