"""Residual networks for 32x32 images (He et al., CVPR 2016).

In training mode batch norm makes a stage a function of the whole batch. Target propagation holds for it in that sense:
see `bioprop.networks.residual_mirrors`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.functional.activations import ACTIVATIONS, ActivationName, find_activation
from bioprop.functional.batch_norm import NormPass, norm_pass
from bioprop.networks.layers import ConvLayer, LinearLayer
from bioprop.networks.network import ImageShape, Network, check_sizes
from bioprop.networks.stages import Stage, StageOutput

Normalize = Callable[[nn.Module, Tensor], Tensor]


class StemPass(NamedTuple):
    """The values that a pass through a `StemStage` hands to its mirror, without a graph.

    Attributes:
        affine: what the activation was applied to, ``[batch, channels, height, width]``.
        norm: of the batch norm, if there is one.
    """

    affine: Tensor
    norm: NormPass | None


class BlockPass(NamedTuple):
    """The values that a pass through a `BasicBlockStage` hands to its mirror, without a graph.

    Attributes:
        affine: what the inner activation was applied to, ``[batch, channels, height, width]``.
        slope: derivative of the inner activation there, in the same shape.
        norm1: of the batch norm after the first convolution, if there is one.
        norm2: of that after the second.
        norm_shortcut: of that of the shortcut.
    """

    affine: Tensor
    slope: Tensor
    norm1: NormPass | None
    norm2: NormPass | None
    norm_shortcut: NormPass | None


class StemStage(Stage):
    """Convolution 3x3 -> batch norm (if any) -> activation, at full resolution.

    Args:
        input_shape: (channels, height, width) of one image, in pixels.
        channels: channels computed.
        activation: name of the activation.
        batch_norm: whether to normalise; without it the convolution has a bias.
    """

    def __init__(
        self, input_shape: tuple[int, ...], channels: int, activation: ActivationName, batch_norm: bool
    ) -> None:
        super().__init__()
        self.input_shape, self.output_shape = input_shape, (channels, *input_shape[1:])
        self.activation = activation
        self._rho = find_activation(activation).rho
        self.conv = ConvLayer(input_shape[0], channels, 3, padding=1, bias=not batch_norm)
        self.norm = _norm(channels, batch_norm)
        self.to(memory_format=torch.channels_last)

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute ``rho(norm(conv(x)))``."""
        return self._rho(self.norm(self.conv(inputs)))

    def run(self, inputs: Tensor) -> StageOutput:
        """Compute it together with the `StemPass`."""
        norms = _Norms()
        affine = norms(self.norm, self.conv(inputs))
        return StageOutput(self._rho(affine), StemPass(affine.detach(), norms.passes[0]))


class BasicBlockStage(Stage):
    """``rho(x' + norm(conv(rho(norm(conv(x))))))`` with 3x3 convolutions; the unit of credit assignment is the block.

    ``x'`` is ``x``, or a 1x1 convolution of it where the shape changes.

    Args:
        input_shape: (channels, height, width) of one input sample.
        channels: channels computed.
        stride: 2 halves the resolution.
        activation: name of the activation.
        batch_norm: whether to normalise; without it the convolutions have biases.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        channels: int,
        stride: int,
        activation: ActivationName,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.output_shape = (channels, *((side - 1) // stride + 1 for side in input_shape[1:]))
        self.activation = activation
        self._rho = find_activation(activation).rho
        bias = not batch_norm
        self.conv1 = ConvLayer(input_shape[0], channels, 3, stride, padding=1, bias=bias)
        self.norm1 = _norm(channels, batch_norm)
        self.conv2 = ConvLayer(channels, channels, 3, padding=1, bias=bias)
        self.norm2 = _norm(channels, batch_norm)
        self.shortcut: nn.Module = nn.Identity()
        if self.output_shape != tuple(input_shape):
            self.shortcut = nn.Sequential(
                ConvLayer(input_shape[0], channels, 1, stride, bias=bias), _norm(channels, batch_norm)
            )
        self.to(memory_format=torch.channels_last)

    @property
    def shortcut_conv(self) -> nn.Conv2d | None:
        """The convolution on the shortcut, if the shape changes."""
        if not isinstance(self.shortcut, nn.Sequential):
            return None
        conv = self.shortcut[0]
        return conv if isinstance(conv, nn.Conv2d) else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute the block."""
        return self._compute(inputs, lambda norm, maps: norm(maps))[1]

    def run(self, inputs: Tensor) -> StageOutput:
        """Compute the block together with the `BlockPass`."""
        norms = _Norms()
        affine, output = self._compute(inputs, norms)
        with torch.no_grad():
            slope = ACTIVATIONS[self.activation].slope(self._rho(affine))
        norm1, norm2, norm_shortcut = (*norms.passes, None)[:3]
        return StageOutput(output, BlockPass(affine.detach(), slope, norm1, norm2, norm_shortcut))

    def _compute(self, inputs: Tensor, normalize: Normalize) -> tuple[Tensor, Tensor]:
        """Return what the inner activation is applied to, and the output."""
        affine = normalize(self.norm1, self.conv1(inputs))
        branch = normalize(self.norm2, self.conv2(self._rho(affine)))
        across = inputs
        if isinstance(self.shortcut, nn.Sequential):
            across = normalize(self.shortcut[1], self.shortcut[0](inputs))
        return affine, self._rho(across + branch)


class PooledLinearStage(Stage):
    """Mean over positions -> linear: the output of a residual network.

    The same as a 1x1 convolution whose maps are averaged, the output of an all-convolutional network.

    Args:
        input_shape: (channels, height, width) of one input sample.
        out_features: number of logits.
    """

    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__()
        self.input_shape, self.output_shape = input_shape, (out_features,)
        self.linear = LinearLayer(input_shape[0], out_features)

    def run(self, inputs: Tensor) -> StageOutput:
        """Compute the logits; there are no switches."""
        return StageOutput(self.linear(F.adaptive_avg_pool2d(inputs, 1).flatten(1)), None)


class ResNet(Network):
    """Residual network of basic blocks for small images: a 3x3 stem, no first pooling (He et al., CVPR 2016).

    The number of weighted layers is ``2 * sum(blocks) + 2``. With widths 64, 128, 256, 512, blocks (2, 2, 2, 2) are
    ResNet-18 and (3, 4, 6, 3) ResNet-34; with widths 16, 32, 64, blocks (3, 3, 3) are ResNet-20 and (9, 9, 9)
    ResNet-56. Every group of blocks but the first halves the image.

    Args:
        image_shape: (channels, height, width) of the images, in pixels.
        num_classes: number of classes, at least 2.
        blocks: number of blocks in each group.
        widths: channels of each group.
        activation: of every stage but the last.
        batch_norm: whether to normalise after each convolution.

    Raises:
        UserError: if blocks and widths differ in number, or a size is not positive.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        blocks: tuple[int, ...] = (3, 3, 3),
        widths: tuple[int, ...] = (16, 32, 64),
        activation: ActivationName = "relu",
        batch_norm: bool = True,
    ) -> None:
        check_sizes("ResNet", image_shape, num_classes, blocks=blocks, widths=widths)
        if len(blocks) != len(widths) or not blocks:
            raise UserError(
                f"ResNet: blocks {tuple(blocks)} and widths {tuple(widths)} must be of the same length: one number of "
                "blocks and one of channels for each group"
            )
        stages: dict[str, Stage] = {"stem": StemStage(tuple(image_shape), widths[0], activation, batch_norm)}
        shape = stages["stem"].output_shape
        for group, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            for block in range(1, count + 1):
                stride = 2 if group > 1 and block == 1 else 1
                stage = BasicBlockStage(shape, width, stride, activation, batch_norm)
                stages[f"block{group}_{block}"], shape = stage, stage.output_shape
        stages["fc"] = PooledLinearStage(shape, num_classes)
        super().__init__(stages)


class ResNet18(ResNet):
    """`ResNet` of 64, 128, 256 and 512 channels in 2, 2, 2 and 2 blocks: 11.2 million weights for 10 classes.

    Args:
        image_shape: (channels, height, width) of the images, in pixels.
        num_classes: number of classes, at least 2.
        activation: of every stage but the last; ``elu`` suits feedback learning better than ``relu``.
        batch_norm: whether to normalise after each convolution.

    Raises:
        UserError: if a size is not positive.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)

    def __init__(
        self, image_shape: ImageShape, num_classes: int, activation: ActivationName = "relu", batch_norm: bool = True
    ) -> None:
        super().__init__(image_shape, num_classes, self.blocks, (64, 128, 256, 512), activation, batch_norm)


class ResNet34(ResNet18):
    """`ResNet18` with 3, 4, 6 and 3 blocks: 21.3 million weights for 10 classes."""

    blocks = (3, 4, 6, 3)


class _Norms:
    """Applies norms, and keeps the pass of each; None for those that do nothing."""

    def __init__(self) -> None:
        self.passes: list[NormPass | None] = []

    def __call__(self, norm: nn.Module, maps: Tensor) -> Tensor:
        self.passes.append(norm_pass(norm, maps.detach()) if isinstance(norm, nn.BatchNorm2d) else None)
        normalized: Tensor = norm(maps)
        return normalized


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
