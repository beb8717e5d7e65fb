"""Residual networks for 32x32 images (He et al., 2016)."""

import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.functional.activations import ActivationName, forward_activation
from bioprop.networks.network import ImageShape, Network, check_sizes
from bioprop.networks.stages import Stage, StageOutput


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
        self._rho = forward_activation(activation)
        self.conv = nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=not batch_norm)
        self.norm = _norm(channels, batch_norm)

    def run(self, inputs: Tensor) -> StageOutput:
        """Compute ``rho(norm(conv(x)))``; there are no switches."""
        return StageOutput(self._rho(self.norm(self.conv(inputs))), None)


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
        self._rho = forward_activation(activation)
        bias = not batch_norm
        self.conv1 = nn.Conv2d(input_shape[0], channels, 3, stride, padding=1, bias=bias)
        self.norm1 = _norm(channels, batch_norm)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.norm2 = _norm(channels, batch_norm)
        self.shortcut: nn.Module = nn.Identity()
        if self.output_shape != tuple(input_shape):
            self.shortcut = nn.Sequential(
                nn.Conv2d(input_shape[0], channels, 1, stride, bias=bias), _norm(channels, batch_norm)
            )

    def run(self, inputs: Tensor) -> StageOutput:
        """Compute the block; there are no switches."""
        branch = self._rho(self.norm1(self.conv1(inputs)))
        branch = self.norm2(self.conv2(branch))
        return StageOutput(self._rho(self.shortcut(inputs) + branch), None)


class PooledLinearStage(Stage):
    """Mean over positions -> linear: the output of a residual network.

    Args:
        input_shape: (channels, height, width) of one input sample.
        out_features: number of logits.
    """

    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__()
        self.input_shape, self.output_shape = input_shape, (out_features,)
        self.linear = nn.Linear(input_shape[0], out_features)

    def run(self, inputs: Tensor) -> StageOutput:
        """Compute the logits; there are no switches."""
        return StageOutput(self.linear(F.adaptive_avg_pool2d(inputs, 1).flatten(1)), None)


class ResNet(Network):
    """Residual network of basic blocks for small images: a 3x3 stem, no first pooling (He et al., CVPR 2016).

    The number of weighted layers is ``2 * sum(blocks) + 2``. With widths 64, 128, 256, 512, blocks (2, 2, 2, 2) are
    ResNet-18 and (3, 4, 6, 3) ResNet-34; with widths 16, 32, 64, blocks (3, 3, 3) are ResNet-20 and (9, 9, 9)
    ResNet-56. Every group of blocks but the first halves the image. Target propagation has no mirror for its stages.

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
        super().__init__(
            stages,
            {
                "image_shape": list(image_shape),
                "num_classes": num_classes,
                "blocks": list(blocks),
                "widths": list(widths),
                "activation": activation,
                "batch_norm": batch_norm,
            },
        )


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
