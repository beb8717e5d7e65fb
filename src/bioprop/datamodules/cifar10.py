"""CIFAR-10, downloaded by torchvision."""

from typing import ClassVar

from torchvision import datasets

from bioprop.datamodules.normalization import Normalization
from bioprop.datamodules.torchvision_set import TorchvisionSet

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class CIFAR10(TorchvisionSet):
    """CIFAR-10: 50,000 training and 10,000 test photographs of ten kinds of things, [3, 32, 32].

    The defaults are the published recipe: mirrored with probability 1/2, cropped at random out of the image padded by 4
    pixels of its edge, normalised with the published statistics.

    Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html, read by `torchvision.datasets.CIFAR10`, which checks the files' MD5
    sums.

    Args:
        data_dir: Folder that holds `cifar-10-batches-py/`, or into which it is downloaded (170 MB).
        download: Download the files if they are not there.
        batch_size: Images in a batch. In training, an epoch's images that do not fill its last batch wait for another
            epoch; evaluation has them all.
        val_fraction: Fraction of the training images set aside for validation, stratified by class.
        normalization: "cifar10" for the published mean (0.4914, 0.4822, 0.4465) and standard deviation (0.2470, 0.2435,
            0.2616), "imagenet32" for those of ImageNet, "train" for those of the training images, "none" for [0, 1].
        horizontal_flip: Mirror each training image with probability 1/2.
        crop_padding: Crop each training image at random out of itself padded by this many pixels of its edge.
        seed: Seed of the validation split, the limits, the order of the training images and their augmentation.
        limit_train: Use so many training images, stratified by class; None for all.
        limit_val: Use so many validation images, stratified by class; None for all.
        limit_test: Use so many test images, stratified by class; None for all.

    Raises:
        UserError: An argument is out of range; the files are missing or damaged and are not, or cannot be, downloaded.
    """

    reader = datasets.CIFAR10
    title = "CIFAR-10"
    folder = datasets.CIFAR10.base_folder
    origin = datasets.CIFAR10.url
    class_names: ClassVar[tuple[str, ...]] = CLASSES

    def __init__(
        self,
        data_dir: str = "data",
        download: bool = True,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        normalization: Normalization = "cifar10",
        horizontal_flip: bool = True,
        crop_padding: int = 4,
        seed: int = 0,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
    ) -> None:
        super().__init__(
            image_shape=(3, 32, 32),
            classes=self.class_names,
            data_dir=data_dir,
            download=download,
            batch_size=batch_size,
            val_fraction=val_fraction,
            normalization=normalization,
            horizontal_flip=horizontal_flip,
            crop_padding=crop_padding,
            seed=seed,
            limit_train=limit_train,
            limit_val=limit_val,
            limit_test=limit_test,
        )
