"""CIFAR-100, downloaded by torchvision."""

from typing import Any

from torchvision import datasets

from bioprop.datamodules.cifar10 import CIFAR10
from bioprop.datamodules.normalization import Normalization

#: The hundred fine labels, in the order of the files, which is that of the alphabet.
NAMES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
CLASSES = tuple(NAMES.split())


class CIFAR100(CIFAR10):
    """CIFAR-100: photographs like CIFAR-10's, as many, of a hundred kinds of things (the fine labels), [3, 32, 32].

    The arguments are those of `CIFAR10`, and so is the augmentation; normalised with the statistics of its own training
    images.

    Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html, read by `torchvision.datasets.CIFAR100`, which checks the files' MD5
    sums.

    Args:
        data_dir: Folder that holds `cifar-100-python/`, or into which it is downloaded (169 MB).
        normalization: "train" for mean and standard deviation of the training images, "cifar10" or "imagenet32" for
            the published ones of those sets, "none" for [0, 1].
        arguments: Those of `CIFAR10`.

    Raises:
        UserError: An argument is out of range; the files are missing or damaged and are not, or cannot be, downloaded.
    """

    reader = datasets.CIFAR100
    title = "CIFAR-100"
    folder = datasets.CIFAR100.base_folder
    origin = datasets.CIFAR100.url
    class_names = CLASSES

    def __init__(self, data_dir: str = "data", normalization: Normalization = "train", **arguments: Any) -> None:
        super().__init__(data_dir, normalization=normalization, **arguments)
