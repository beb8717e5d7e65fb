"""The LeNet of Ernoult et al. (ICML 2022)."""

from bioprop.functional.activations import ActivationName
from bioprop.functional.pooling import Pool
from bioprop.networks.network import ImageShape, Network, check_sizes, conv_chain
from bioprop.networks.stages import LinearStage


class LeNet(Network):
    """Stages of conv 5x5 -> activation -> max-pool 3, stride 2, then one hidden linear stage and the output.

    The default sizes are those of Ernoult et al. (2022): 32 and 64 channels, 512 units, ELU.

    Args:
        image_shape: (channels, height, width) of the images, in pixels.
        num_classes: number of classes, at least 2.
        channels: channels of each conv stage.
        hidden: units of the hidden linear stage.
        activation: of every stage but the last.
        bias: whether the stages have biases.

    Raises:
        UserError: if a size is not positive.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        channels: tuple[int, ...] = (32, 64),
        hidden: int = 512,
        activation: ActivationName = "elu",
        bias: bool = True,
    ) -> None:
        check_sizes("LeNet", image_shape, num_classes, channels=channels, hidden=(hidden,))
        stages, shape = conv_chain("LeNet", image_shape, channels, 5, Pool(3, 2, 1), activation, bias)
        stages["fc1"] = LinearStage(shape, hidden, activation, bias)
        stages["fc2"] = LinearStage((hidden,), num_classes, "identity", bias)
        super().__init__(stages)
