"""What the data sets that torchvision downloads and reads have in common."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision import datasets

from bioprop.datamodules.base import ImageDataModule, Split
from bioprop.errors import UserError


class TorchvisionSet(ImageDataModule):
    """A data set with official training and test images, downloaded and read by torchvision, which checks MD5 sums.

    A subclass says which class of torchvision's reads it, what it is called, in which folder below `data_dir` its files
    lie and where they come from; and offers, as its own arguments, what a user may choose.

    Args:
        data_dir: Folder that holds the set's own folder, or into which it is downloaded.
        download: Download the files if they are not there.
        shared: Arguments of `ImageDataModule`.

    Raises:
        UserError: An argument is out of range; the files are missing or damaged and are not, or cannot be, downloaded.
    """

    reader: ClassVar[type[datasets.CIFAR10] | type[datasets.MNIST]]
    title: ClassVar[str]
    folder: ClassVar[str]
    origin: ClassVar[str]
    class_names: ClassVar[tuple[str, ...]]

    def __init__(self, data_dir: str = "data", download: bool = True, **shared: Any) -> None:
        super().__init__(classes=self.class_names, **shared)
        self.data_dir = Path(data_dir).expanduser()
        self.download = download
        self._stored: dict[Split, datasets.CIFAR10 | datasets.MNIST] = {}

    def prepare_data(self) -> None:
        """Downloads the files if asked to; Lightning calls this once a machine, before `setup`."""
        if self.download:
            self._open("train", download=True)

    def setup(self, stage: str) -> None:
        """Reads the splits that a stage needs and that are not in memory yet.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        super().setup(stage)
        self._stored.clear()  # what is used of them is resident by now

    def _labels(self, split: Split) -> Tensor:
        return torch.as_tensor(self._load(split).targets)

    def _decode(self, split: Split, indices: Tensor) -> Tensor:
        # uint8 [images, height, width, channels] of the CIFAR sets, [images, height, width] of the MNIST ones
        images = torch.as_tensor(self._load(split).data)[indices]
        return (images.permute(0, 3, 1, 2) if images.dim() == 4 else images.unsqueeze(1)).contiguous()

    def _load(self, split: Split) -> datasets.CIFAR10 | datasets.MNIST:
        if split not in self._stored:
            self._stored[split] = self._open(split, download=False)
        return self._stored[split]

    def _open(self, split: Split, download: bool) -> datasets.CIFAR10 | datasets.MNIST:
        try:
            return self.reader(self.data_dir, train=split == "train", download=download)
        # No network is an OSError, torchvision's word for missing or damaged files is RuntimeError; its readers of cut
        # files raise EOFError, ValueError, AssertionError and others.
        except Exception as error:
            place = self.data_dir / self.folder
            if download:
                raise UserError(
                    f"{self.title} is not in '{place}' and could not be downloaded there "
                    f"({' '.join(str(error).split())}): connect to the network or {self._remedy()}."
                ) from error
            raise UserError(
                f"the files of {self.title} are missing from '{place}', or damaged: set download to true or "
                f"{self._remedy()}."
            ) from error

    def _remedy(self) -> str:
        """How to put the files in their place by hand."""
        return f"unpack {self.origin} into '{self.data_dir}'"
