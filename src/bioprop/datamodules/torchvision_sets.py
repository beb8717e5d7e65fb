"""The data sets that torchvision downloads and reads: MNIST and those in its format, CIFAR-10 and CIFAR-100, SVHN."""

from abc import abstractmethod
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets

from bioprop.datamodules.base import ImageDataModule, Split
from bioprop.datamodules.normalization import Normalization
from bioprop.errors import UserError

CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
#: CIFAR-100's fine labels, in the order of the files, which is that of the alphabet.
CIFAR100_NAMES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)


class TorchvisionSet(ImageDataModule):
    """A data set with official training and test images, downloaded and read by torchvision, which checks MD5 sums.

    A subclass names torchvision's class as `reader`, the `folder` below `data_dir` that its files lie in ("" for none),
    the address that they come from as `origin`, and the classes as `class_names`. Both of torchvision's protocols are
    read: `train=` or `split=`, `.targets` or `.labels`, channels last, first or absent.

    Args:
        data_dir: Folder that holds the set's own folder or files, or into which they are downloaded.
        download: Download the files if they are not there.
        shared: Arguments of `ImageDataModule`.

    Raises:
        UserError: An argument is out of range; the files are missing or damaged and are not, or cannot be, downloaded.
    """

    folder: ClassVar[str]
    origin: ClassVar[str]
    class_names: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def reader(self) -> Callable[..., Any]:
        """The class of torchvision that reads the set; a subclass names it as a plain attribute."""

    def __init__(self, data_dir: str = "data", download: bool = True, **shared: Any) -> None:
        super().__init__(classes=self.class_names, **shared)
        self.data_dir = Path(data_dir).expanduser()
        self.download = download
        self._by_split = "split" in signature(self.reader).parameters
        self._stored: dict[Split, Any] = {}

    def prepare_data(self) -> None:
        """Downloads the files if asked to; Lightning calls this once a machine, before `setup`."""
        if self.download:
            both: tuple[Split, ...] = ("train", "test")
            for split in both if self._by_split else both[:1]:  # the other protocol has one download for both
                self._open(split, download=True)

    def setup(self, stage: str) -> None:
        """Reads the splits that a stage needs and that are not in memory yet."""
        super().setup(stage)
        self._stored.clear()  # the images in use are resident by now

    def _labels(self, split: Split) -> Tensor:
        stored = self._load(split)
        return torch.as_tensor(stored.labels if hasattr(stored, "labels") else stored.targets)

    def _decode(self, split: Split, indices: Tensor) -> Tensor:
        images = torch.as_tensor(self._load(split).data)[indices]
        if images.dim() == 3:
            return images.unsqueeze(1)
        channels_first = images.shape[1:] == self.image_shape
        return (images if channels_first else images.permute(0, 3, 1, 2)).contiguous()

    def _load(self, split: Split) -> Any:
        return self._stored.get(split) or self._stored.setdefault(split, self._open(split, download=False))

    def _open(self, split: Split, download: bool) -> Any:
        which = {"split": split} if self._by_split else {"train": split == "train"}
        try:
            return self.reader(self.data_dir, **which, download=download)
        # No network is an OSError, torchvision's word for missing or damaged files is RuntimeError; its readers of cut
        # files raise EOFError, ValueError, AssertionError and others.
        except Exception as error:
            place, reason = self.data_dir / self.folder, " ".join(str(error).split())
            found = f"not in '{place}' and could not be downloaded there ({reason}): connect to the network"
            if not download:
                found = f"missing from '{place}', or damaged: set download to true"
            name = type(self).__name__
            raise UserError(f"{name} is {found}, or put the files of {self.origin} there.") from error


class MNIST(TorchvisionSet):
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, grey, [1, 28, 28] or [1, 32, 32].

    Source: Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-based learning applied to document recognition,
    Proceedings of the IEEE, 1998.

    Args:
        data_dir: Folder that holds the set's folder (`MNIST/raw/`, `FashionMNIST/raw/`, `KMNIST/raw/`), or into which
            it is downloaded; `.gz` files that are there are unpacked, not downloaded.
        image_size: Height and width in pixels: 28 for the images as they are, 32 for a border of 2 black pixels around
            them, for networks that need 32 (SimpleVGG). Nothing is resized.
        shared: Arguments of `TorchvisionSet`.
    """

    reader = datasets.MNIST
    folder = "MNIST/raw"
    origin = datasets.MNIST.mirrors[0]
    class_names: ClassVar[tuple[str, ...]] = tuple("0123456789")

    def __init__(self, data_dir: str = "data", *, image_size: Literal[28, 32] = 28, **shared: Any) -> None:
        super().__init__(data_dir=data_dir, image_shape=(1, image_size, image_size), **shared)

    def _decode(self, split: Split, indices: Tensor) -> Tensor:
        border = (self.image_shape[1] - 28) // 2
        return F.pad(super()._decode(split, indices), (border,) * 4)


class FashionMNIST(MNIST):
    """Fashion-MNIST: photographs of ten kinds of clothes in the format of MNIST, as many; the arguments are the same.

    Source: H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking machine learning
    algorithms, 2017.
    """

    reader = datasets.FashionMNIST
    folder = "FashionMNIST/raw"
    origin = datasets.FashionMNIST.mirrors[0]
    class_names = tuple(datasets.FashionMNIST.classes)


class KMNIST(MNIST):
    """Kuzushiji-MNIST: ten cursive Japanese letters in the format of MNIST, as many images; the arguments are the same.

    Source: T. Clanuwat et al., Deep learning for classical Japanese literature, 2018.
    """

    reader = datasets.KMNIST
    folder = "KMNIST/raw"
    origin = datasets.KMNIST.mirrors[0]
    class_names = tuple(datasets.KMNIST.classes)


class CIFAR10(TorchvisionSet):
    """CIFAR-10: 50,000 training and 10,000 test photographs of ten kinds of things, [3, 32, 32].

    The defaults are the published recipe: mirrored with probability 1/2, cropped at random out of the image padded by 4
    pixels of its edge, normalised with the published statistics.

    Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html.

    Args:
        data_dir: Folder that holds `cifar-10-batches-py/`, or into which it is downloaded (170 MB).
        normalization: "cifar10" for the published mean (0.4914, 0.4822, 0.4465) and standard deviation (0.2470, 0.2435,
            0.2616); the others as in `ImageDataModule`.
        shared: Arguments of `TorchvisionSet`.
    """

    reader = datasets.CIFAR10
    folder = datasets.CIFAR10.base_folder
    origin = datasets.CIFAR10.url
    class_names: ClassVar[tuple[str, ...]] = tuple(CIFAR10_NAMES.split())

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

    Augmented like CIFAR-10, and normalised with the statistics of its own training images. The source is the same.

    Args:
        data_dir: Folder that holds `cifar-100-python/`, or into which it is downloaded (169 MB).
        normalization: As in `ImageDataModule`.
        shared: Arguments of `CIFAR10`.
    """

    reader = datasets.CIFAR100
    folder = datasets.CIFAR100.base_folder
    origin = datasets.CIFAR100.url
    class_names = tuple(CIFAR100_NAMES.split())

    def __init__(self, data_dir: str = "data", *, normalization: Normalization = "train", **shared: Any) -> None:
        super().__init__(data_dir, normalization=normalization, **shared)


class SVHN(TorchvisionSet):
    """Street View House Numbers: 73,257 training and 26,032 test photographs of digits, cropped, [3, 32, 32].

    The digit in the middle is the label; the 531,131 easier images that are published as extra are not used.

    Source: Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu and A. Y. Ng, Reading digits in natural images with
    unsupervised feature learning, NIPS workshop on deep learning, 2011, http://ufldl.stanford.edu/housenumbers.

    Args:
        data_dir: Folder that holds `train_32x32.mat` and `test_32x32.mat`, or into which they are downloaded (246 MB).
        shared: Arguments of `TorchvisionSet`.
    """

    reader = datasets.SVHN
    folder = ""
    origin = datasets.SVHN.split_list["train"][0].rpartition("/")[0]
    class_names = tuple("0123456789")

    def __init__(self, data_dir: str = "data", **shared: Any) -> None:
        super().__init__(data_dir=data_dir, image_shape=(3, 32, 32), **shared)
