"""MNIST and the sets in its format, downloaded by torchvision."""

from typing import ClassVar, Literal

from torchvision import datasets

from bioprop.datamodules.normalization import Normalization
from bioprop.datamodules.torchvision_set import TorchvisionSet
from bioprop.errors import UserError

STORED_SIZE = 28


class MNIST(TorchvisionSet):
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, grey, [1, 28, 28] or [1, 32, 32].

    Source: Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-based learning applied to document recognition,
    Proceedings of the IEEE, 1998, read by the class of the same name in `torchvision.datasets`, which checks the MD5
    sums of what it downloads.

    Args:
        data_dir: Folder that holds the set's folder (`MNIST/raw/`, `FashionMNIST/raw/`, `KMNIST/raw/`), or into which
            it is downloaded.
        download: Download the files if they are not there; `.gz` files that are there are unpacked, not downloaded.
        image_size: Height and width in pixels: 28 for the images as they are, 32 for a border of 2 black pixels around
            them, for networks that need 32 (SimpleVGG). Nothing is resized.
        batch_size: Images in a batch. In training, an epoch's images that do not fill its last batch wait for another
            epoch; evaluation has them all.
        val_fraction: Fraction of the training images set aside for validation, stratified by class.
        normalization: "train" for mean and standard deviation of the training images, "none" for values in [0, 1].
            The published statistics ("cifar10", "imagenet32") are for three channels and refused.
        horizontal_flip: Mirror each training image with probability 1/2 (mirrored digits and letters are none).
        crop_padding: Crop each training image at random out of itself padded by this many pixels of its edge.
        seed: Seed of the validation split, the limits, the order of the training images and their augmentation.
        limit_train: Use so many training images, stratified by class; None for all.
        limit_val: Use so many validation images, stratified by class; None for all.
        limit_test: Use so many test images, stratified by class; None for all.

    Raises:
        UserError: An argument is out of range; the files are missing or damaged and are not, or cannot be, downloaded.
    """

    reader = datasets.MNIST
    title = "MNIST"
    folder = "MNIST/raw"
    origin = datasets.MNIST.mirrors[0]
    class_names: ClassVar[tuple[str, ...]] = tuple("0123456789")

    def __init__(
        self,
        data_dir: str = "data",
        download: bool = True,
        image_size: Literal[28, 32] = 28,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        normalization: Normalization = "train",
        horizontal_flip: bool = False,
        crop_padding: int = 0,
        seed: int = 0,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
    ) -> None:
        if image_size not in (STORED_SIZE, 32):
            raise UserError(
                f"image_size is {image_size}, but {self.title}'s images are 28 pixels high and wide, or 32 with a "
                "border: choose one of them."
            )
        super().__init__(
            image_shape=(1, image_size, image_size),
            classes=self.class_names,
            data_dir=data_dir,
            download=download,
            border=(image_size - STORED_SIZE) // 2,
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

    def _remedy(self) -> str:
        files = ", ".join(name for name, _ in self.reader.resources)
        return f"put {files} of {self.origin} into '{self.data_dir / self.folder}' and leave download at true"


class FashionMNIST(MNIST):
    """Fashion-MNIST: photographs of ten kinds of clothes in the format of MNIST, as many, [1, 28, 28] or [1, 32, 32].

    The arguments are those of `MNIST`.

    Source: H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking machine learning
    algorithms, 2017.
    """

    reader = datasets.FashionMNIST
    title = "Fashion-MNIST"
    folder = "FashionMNIST/raw"
    origin = datasets.FashionMNIST.mirrors[0]
    class_names = tuple(datasets.FashionMNIST.classes)


class KMNIST(MNIST):
    """Kuzushiji-MNIST: ten cursive Japanese letters in the format of MNIST, as many images, [1, 28, 28] or [1, 32, 32].

    The arguments are those of `MNIST`.

    Source: T. Clanuwat et al., Deep learning for classical Japanese literature, 2018.
    """

    reader = datasets.KMNIST
    title = "KMNIST"
    folder = "KMNIST/raw"
    origin = datasets.KMNIST.mirrors[0]
    class_names = tuple(datasets.KMNIST.classes)
