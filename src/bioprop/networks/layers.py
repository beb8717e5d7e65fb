"""Linear and convolutional layers that know their products, and layers of feedback operators on one batch.

A layer computes ``W x``; feedback in the layout of the same weight computes ``V^T d``; and the gradient of ``<d, W x>``
with respect to ``W`` is the weight gradient. All three are bilinear in a weight and what flows through the layer, and
everything that a closed form of feedback training costs is one of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from bioprop.functional.activations import Activation
from bioprop.functional.pooling import Places, Pool, locate, pick, unpool
from bioprop.functional.precision import products

#: Bytes of one map that a block of samples may have: several maps of that size fit into a processor's last cache.
BLOCK_BYTES = 6 * 2**20
#: Positions of a map from which on torch forms the weight gradient of a convolution faster in bfloat16 than in float32.
REDUCED_POSITIONS = 64


class LinearLayer(nn.Linear):
    """``nn.Linear`` on samples of any shape, with its products; weights are ``[out, in]``."""

    def product(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Compute ``W x`` without the bias, ``[batch, ...]`` to ``[batch, out]``."""
        return F.linear(inputs.flatten(1), weight)

    def transposed_product(self, outputs: Tensor, weight: Tensor, size: Sequence[int] = ()) -> Tensor:
        """Compute ``V^T d``, ``[batch, out]`` to ``[batch, in]``."""
        return F.linear(outputs, weight.t())

    def weight_gradient(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Gradient of ``<d, W x>`` with respect to ``W``, summed over the batch."""
        return F.linear(outputs.t(), inputs.flatten(1).t())

    def tap_sums(self, outputs: Tensor, size: Sequence[int] = ()) -> Tensor:
        """Sum over the batch, ``[out, 1]``."""
        return outputs.sum(0)[:, None]


class ConvLayer(nn.Conv2d):
    """``nn.Conv2d`` with its products; weights are ``[out, in, kernel, kernel]``."""

    def product(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Compute ``W x`` without the bias, ``[batch, in, height, width]`` to ``[batch, out, height, width]``."""
        return F.conv2d(inputs, weight, None, self.stride, self.padding)

    def transposed_product(self, outputs: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
        """Compute ``V^T d``.

        Args:
            outputs: ``d``, in the shape of the layer's output.
            weight: ``V``.
            size: height and width of the layer's input.
        """
        unread = unread_border(self, size, outputs.shape[2:])
        return F.conv_transpose2d(outputs, weight, None, self.stride, self.padding, unread)  # type: ignore[arg-type]

    def weight_gradient(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Gradient of ``<d, W x>`` with respect to ``W``, summed over the batch."""
        if reduced := products.reduced and outputs.shape[2] * outputs.shape[3] >= REDUCED_POSITIONS:
            inputs, outputs = inputs.to(torch.bfloat16), outputs.to(torch.bfloat16)
        gradient: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            inputs, list(self.weight.shape), outputs, self.stride, self.padding
        )
        return gradient.float() if reduced else gradient

    def tap_sums(self, outputs: Tensor, size: Sequence[int]) -> Tensor:
        """Sum over the batch and the positions from which a tap of the kernel falls on the image, for each tap.

        Args:
            outputs: in the shape of the layer's output.
            size: height and width of the layer's input.

        Returns:
            ``[out, 1, kernel, kernel]``.
        """
        sums: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            outputs.new_ones(1, 1, *size),
            [outputs.shape[1], 1, *self.weight.shape[2:]],
            outputs.sum(0, keepdim=True),
            self.stride,
            self.padding,
        )
        return sums


def unit_square_sums(values: Tensor) -> Tensor:
    """Mean over the batch of the sum over positions of the squares: ``[batch, units, ...] -> [units]``."""
    return values.flatten(2).square().sum(2).mean(0) if values.dim() > 2 else values.square().mean(0)


def unread_border(conv: nn.Conv2d, input_size: Sequence[int], output_size: Sequence[int]) -> tuple[int, int]:
    """Return how many rows and columns at the far border a strided convolution never reads."""
    (stride, _), (padding, _) = conv.stride, (int(side) for side in conv.padding)
    rows, columns = (
        side - ((out - 1) * stride - 2 * padding + kernel)
        for side, out, kernel in zip(input_size, output_size, conv.weight.shape[2:], strict=True)
    )
    return rows, columns


def blocks(maps: Tensor, fewest: int = 32) -> list[slice]:
    """Cut a batch on a CPU into blocks of samples whose maps stay in its cache.

    Args:
        maps: of the batch, the largest that are formed.
        fewest: samples that a block is not cut to less than.
    """
    batch, size = len(maps), maps[0].numel() * maps.element_size()
    samples = batch
    while maps.device.type == "cpu" and samples * size > BLOCK_BYTES and samples > fewest:
        samples = (samples + 1) // 2
    return [slice(start, min(start + samples, batch)) for start in range(0, batch, samples)]


class FeedbackLayer(NamedTuple):
    """One layer of a feedback operator, the forward layer that it is the counterpart of, and one batch of both.

    Attributes:
        name: of the feedback weight among the operator's parameters.
        layer: the forward layer, which knows the products.
        activation: ``rho`` after the forward layer, ``phi`` before the feedback layer.
        inputs: of the forward layer, in the shape of the noise that is added to them, ``[batch, ...]``.
        affine: what ``rho`` is applied to, ``W x + b``.
        output: ``y``, after ``rho`` and pooling (if any).
        forward_weight: effective ``W``.
        weight: ``V``, ``[units, ...]``.
        phi: ``phi(y)``.
        slope: ``phi'(y)``, zero where unpooling drops the value.
        pool: of the maps, or None.
        places: where pooled values go back to in the pass that made ``y``.
        overwriting: whether unpooling overwrites where windows overlap, see `locate`.
        scale: ``[units]``, where the effective feedback weights are ``scale_o V_o``; None for 1.
        share: what the layer's loss is multiplied by.
        input_noise: the number of the noise tensor that enters the forward layer.
        output_noise: the number of the one that enters the feedback layer.
    """

    name: str
    layer: LinearLayer | ConvLayer
    activation: Activation
    inputs: Tensor
    affine: Tensor
    output: Tensor
    forward_weight: Tensor
    weight: Tensor
    phi: Tensor
    slope: Tensor
    pool: Pool | None = None
    places: Places | None = None
    overwriting: bool = False
    scale: Tensor | None = None
    share: float = 1.0
    input_noise: int = 0
    output_noise: int = 1

    def blocks(self, images: int | None = None) -> list["Block"]:
        """Cut the batch, or its first images, into blocks of samples (`blocks`)."""
        return [Block(samples, self.block(samples)) for samples in blocks(self.affine[:images])]

    def block(self, samples: slice) -> "FeedbackLayer":
        """Return the part that belongs to some samples of the batch."""
        if len(range(*samples.indices(len(self.affine)))) == len(self.affine):
            return self
        kept = self.places and self.places.kept
        return self._replace(
            inputs=self.inputs[samples],
            affine=self.affine[samples],
            output=self.output[samples],
            phi=self.phi[samples],
            slope=self.slope[samples],
            places=self.places and Places(self.places.switches[samples], None if kept is None else kept[samples]),
        )

    @property
    def effective(self) -> Tensor:
        """The effective ``V``."""
        return self.scaled(self.weight)

    def scaled(self, values: Tensor) -> Tensor:
        """Multiply values of each unit, ``[units, ...]``, by its scale."""
        return values if self.scale is None else values * self.scale.view(-1, *[1] * (values.dim() - 1))

    def respond(self, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return ``y`` for ``x + noise``, and the switches of that pass."""
        affine = self.affine + self.layer.product(noise, self.forward_weight)
        return (
            (self.activation.rho(affine), None)
            if self.pool is None
            else self.pool.activate(affine, self.activation.rho)
        )

    def probe(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Send noise at the inputs up through both weights: ``P V noise`` at the places of ``y``, and the new ``y``."""
        maps = self.layer.product(noise, self.effective)
        return maps if self.places is None else pick(maps, self.places), self.respond(noise)[0]

    def unpool(self, values: Tensor, switches: Tensor | None = None) -> Tensor:
        """Return values to their places: those of ``y``, or those that the switches of another pass point to."""
        if self.pool is None or self.places is None:
            return values
        places = self.places if switches is None else locate(switches, self.pool, self.overwriting)
        return unpool(values, places, self.pool, self.affine.shape[2:])

    def weight_gradient(self, inputs: Tensor, values: Tensor) -> Tensor:
        """Gradient of ``<inputs, V^T U values>`` with respect to ``V``, with the unpooling ``U`` of ``y``'s pass."""
        return self.layer.weight_gradient(inputs, self.unpool(values))

    def project(self, features: Tensor) -> Tensor:
        """Return ``V^T features``."""
        return self.layer.transposed_product(features, self.effective, self.inputs.shape[2:])

    def tap_sums(self, features: Tensor) -> Tensor:
        """Sum features over the batch, and over the positions from which each tap of the kernel falls on the image."""
        return self.layer.tap_sums(features, self.inputs.shape[2:])


class Block(NamedTuple):
    """Some samples of a batch, and the part of a layer that belongs to them."""

    samples: slice
    layer: FeedbackLayer


class FeedbackLayers(NamedTuple):
    """All layers of a feedback operator, and the shapes of the noise tensors that they share, batch first."""

    layers: list[FeedbackLayer]
    noise_shapes: list[tuple[int, ...]]
