"""MNIST and the sets in its format, downloaded by torchvision."""

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets

from bioprop.datamodules.base import Split
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
            it is downloaded; `.gz` files that are there are unpacked, not downloaded.
        image_size: Height and width in pixels: 28 for the images as they are, 32 for a border of 2 black pixels around
            them, for networks that need 32 (SimpleVGG). Nothing is resized.
        shared: Arguments of `TorchvisionSet`.
    """

    reader = datasets.MNIST
    title = "MNIST"
    folder = "MNIST/raw"
    origin = datasets.MNIST.mirrors[0]
    class_names: ClassVar[tuple[str, ...]] = tuple("0123456789")

    def __init__(self, data_dir: str = "data", *, image_size: Literal[28, 32] = 28, **shared: Any) -> None:
        if image_size not in (STORED_SIZE, 32):
            raise UserError(
                f"image_size is {image_size}, but {self.title}'s images are 28 pixels high and wide, or 32 with a "
                "border: choose one of them."
            )
        super().__init__(data_dir=data_dir, image_shape=(1, image_size, image_size), **shared)

    def _decode(self, split: Split, indices: Tensor) -> Tensor:
        border = (self.image_shape[1] - STORED_SIZE) // 2
        return F.pad(super()._decode(split, indices), (border,) * 4)

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
