"""Multi-layer perceptron of invertible stages (Ahmad et al., NeurIPS 2020)."""

from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.networks.network import ImageShape, Network, check_sizes
from bioprop.networks.stages import Stage, StageOutput


class InvertibleStage(Stage):
    """``y = f(W x + b)`` with square ``W`` and leaky ReLU ``f``: ``x`` can be had back from ``y``.

    Where the stage is narrower than its input, ``W`` reads as many units as it is wide, the first ones; the others are
    spare: they are carried aside, and on the way back they are what they were.

    Args:
        input_shape: shape of one input sample; flattened where it has more than one dimension.
        width: number of units, at most that of the input's.
        outputs: how many units the stage hands out, the first ones; all by default.
        negative_slope: of ``f``, above 0.
        orthogonal: draw ``W`` as an orthogonal matrix, or else from ``N(0, 1 / width)``.
        bias: whether there is a bias; it starts at 0.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        width: int,
        outputs: int | None = None,
        negative_slope: float = 0.1,
        orthogonal: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.input_shape, self.output_shape = input_shape, (width if outputs is None else outputs,)
        self.spare = prod(input_shape) - width
        self.negative_slope = negative_slope
        self.linear = nn.Linear(width, width, bias=bias)
        if orthogonal:
            nn.init.orthogonal_(self.linear.weight)
        else:
            nn.init.normal_(self.linear.weight, std=width**-0.5)
        if bias:
            nn.init.zeros_(self.linear.bias)

    @property
    def weight(self) -> Tensor:
        """``[width, width]``."""
        return self.linear.weight

    def run(self, inputs: Tensor) -> StageOutput:
        """Compute ``f(W x + b)``, ``[batch, *input_shape]`` to ``[batch, outputs]``; there are no switches."""
        read = inputs.flatten(1)[:, : len(self.weight)]
        outputs = F.leaky_relu(self.linear(read), self.negative_slope)
        return StageOutput(outputs[:, : self.output_shape[0]], None)


class InvertibleMLP(Network):
    """Flatten, then a chain of `InvertibleStage`; the logits are the first units of the last.

    By default all stages are as wide as the image has values. Like the published network it has leaky ReLU in the last
    stage too, and orthogonal weights to start from.

    Args:
        image_shape: (channels, height, width) of the images, in pixels.
        num_classes: number of classes, at least 2.
        widths: units of each stage, from the input to the output, none wider than the one below and the last at least
            as many as classes; or the number of stages, all as wide as the image.
        negative_slope: of the leaky ReLU, in (0, 1]; with 1 the network is linear.
        orthogonal: draw orthogonal weights, or else Gaussian ones.
        bias: whether the stages have biases.

    Raises:
        UserError: if a size is not positive, or a stage is wider than the one below.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        widths: int | tuple[int, ...] = 5,
        negative_slope: float = 0.1,
        orthogonal: bool = True,
        bias: bool = True,
    ) -> None:
        check_sizes("InvertibleMLP", image_shape, num_classes, widths=[widths] if isinstance(widths, int) else widths)
        if not isinstance(widths, int) and not widths:
            raise UserError("InvertibleMLP: widths is empty, but a network needs at least one stage")
        if not 0.0 < negative_slope <= 1.0:
            raise UserError(f"InvertibleMLP: negative_slope is {negative_slope}, but it must lie in (0, 1]")
        units = prod(image_shape)
        chain = [units] * widths if isinstance(widths, int) else list(widths)
        for wide, narrow in zip([units, *chain], [*chain, num_classes], strict=True):
            if narrow > wide:
                raise UserError(
                    f"InvertibleMLP: {narrow} units cannot follow {wide}, since an invertible stage has no more units "
                    f"than it reads: let widths {chain} fall from the image's {units} values to the classes"
                )
        stages: dict[str, Stage] = {}
        shape: tuple[int, ...] = tuple(image_shape)
        for number, width in enumerate(chain, start=1):
            outputs = num_classes if number == len(chain) else None
            stages[f"fc{number}"] = InvertibleStage(shape, width, outputs, negative_slope, orthogonal, bias)
            shape = stages[f"fc{number}"].output_shape
        super().__init__(stages)
