"""The SimpleVGG of Ernoult et al. (ICML 2022)."""

from bioprop.functional.activations import ActivationName
from bioprop.functional.pooling import Pool
from bioprop.networks.network import ImageShape, Network, check_sizes, conv_chain
from bioprop.networks.stages import LinearStage


class SimpleVGG(Network):
    """Stages of conv 3x3 -> activation -> max-pool 2, then a linear output; no batch norm.

    The default sizes are those of Ernoult et al. (2022): 128, 128, 256, 256 and 512 channels, ELU. Every stage halves
    the image, so five stages need at least 32x32 pixels.

    Args:
        image_shape: (channels, height, width) of the images, in pixels.
        num_classes: number of classes, at least 2.
        channels: channels of each conv stage.
        activation: of every stage but the last.
        bias: whether the stages have biases.

    Raises:
        UserError: if the images are too small for the number of stages, or a size is not positive.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        activation: ActivationName = "elu",
        bias: bool = True,
    ) -> None:
        check_sizes("SimpleVGG", image_shape, num_classes, channels=channels)
        stages, shape = conv_chain("SimpleVGG", image_shape, channels, 3, Pool(2, 2), activation, bias)
        stages["fc"] = LinearStage(shape, num_classes, "identity", bias)
        super().__init__(stages)
