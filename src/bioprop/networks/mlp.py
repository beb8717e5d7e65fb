"""Multi-layer perceptron."""

from typing import Literal

from bioprop.errors import UserError
from bioprop.functional.activations import ActivationName
from bioprop.networks.network import ImageShape, Network, check_sizes
from bioprop.networks.stages import LinearStage, Stage
from bioprop.networks.standardized import StandardizedStage


class MLP(Network):
    """Flatten, then a chain of fully connected stages.

    Args:
        image_shape: (channels, height, width) of the images, in pixels; any size fits.
        num_classes: number of classes, at least 2.
        hidden: units of each hidden stage.
        activation: of the hidden stages.
        bias: whether the stages have biases.
        standardize: whether hidden stages standardise their activations over the batch (`StandardizedStage`); ``all``
            for the output stage too.

    Raises:
        UserError: if a size is not positive, or ``standardize`` is another word.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        hidden: tuple[int, ...] = (256, 256),
        activation: ActivationName = "elu",
        bias: bool = True,
        standardize: bool | Literal["all"] = False,
    ) -> None:
        check_sizes("MLP", image_shape, num_classes, hidden=hidden)
        if standardize not in (False, True, "all"):
            raise UserError(f"standardize is {standardize!r}: choose true (hidden stages), all or false")
        stages: dict[str, Stage] = {}
        shape: tuple[int, ...] = tuple(image_shape)
        for number, width in enumerate(hidden, start=1):
            layer = LinearStage(shape, width, activation, bias)
            stages[f"fc{number}"] = StandardizedStage(layer) if standardize else layer
            shape = (width,)
        output = LinearStage(shape, num_classes, "identity", bias)
        stages[f"fc{len(hidden) + 1}"] = StandardizedStage(output) if standardize == "all" else output
        super().__init__(stages)
