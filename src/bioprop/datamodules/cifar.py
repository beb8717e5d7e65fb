"""CIFAR-10 and CIFAR-100, downloaded by torchvision."""

from typing import Any

from torchvision import datasets

from bioprop.datamodules.normalization import Normalization
from bioprop.datamodules.torchvision_set import TorchvisionSet

CIFAR10_CLASSES: tuple[str, ...] = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
#: The hundred fine labels, in the order of the files, which is that of the alphabet.
CIFAR100_NAMES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
CIFAR100_CLASSES = tuple(CIFAR100_NAMES.split())


class CIFAR10(TorchvisionSet):
    """CIFAR-10: 50,000 training and 10,000 test photographs of ten kinds of things, [3, 32, 32].

    The defaults are the published recipe: mirrored with probability 1/2, cropped at random out of the image padded by 4
    pixels of its edge, normalised with the published statistics.

    Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html, read by `torchvision.datasets.CIFAR10`, which checks the files' MD5
    sums.

    Args:
        data_dir: Folder that holds `cifar-10-batches-py/`, or into which it is downloaded (170 MB).
        normalization: "cifar10" for the published mean (0.4914, 0.4822, 0.4465) and standard deviation (0.2470, 0.2435,
            0.2616), "imagenet32" for those of ImageNet, "train" for those of the training images, "none" for [0, 1].
        shared: Arguments of `TorchvisionSet`.
    """

    reader = datasets.CIFAR10
    title = "CIFAR-10"
    folder = datasets.CIFAR10.base_folder
    origin = datasets.CIFAR10.url
    class_names = CIFAR10_CLASSES

    def __init__(
        self,
        data_dir: str = "data",
        *,
        normalization: Normalization = "cifar10",
        horizontal_flip: bool = True,
        crop_padding: int = 4,
        **shared: Any,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            image_shape=(3, 32, 32),
            normalization=normalization,
            horizontal_flip=horizontal_flip,
            crop_padding=crop_padding,
            **shared,
        )


class CIFAR100(CIFAR10):
    """CIFAR-100: photographs like CIFAR-10's, as many, of a hundred kinds of things (the fine labels), [3, 32, 32].

    Augmented like CIFAR-10, and normalised with the statistics of its own training images.

    Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html, read by `torchvision.datasets.CIFAR100`, which checks the files' MD5
    sums.

    Args:
        data_dir: Folder that holds `cifar-100-python/`, or into which it is downloaded (169 MB).
        normalization: "train" for mean and standard deviation of the training images, "cifar10" or "imagenet32" for
            the published ones of those sets, "none" for [0, 1].
        shared: Arguments of `CIFAR10`.
    """

    reader = datasets.CIFAR100
    title = "CIFAR-100"
    folder = datasets.CIFAR100.base_folder
    origin = datasets.CIFAR100.url
    class_names = CIFAR100_CLASSES

    def __init__(self, data_dir: str = "data", *, normalization: Normalization = "train", **shared: Any) -> None:
        super().__init__(data_dir, normalization=normalization, **shared)
