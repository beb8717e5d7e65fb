"""The data sets that torchvision downloads and reads."""

from abc import abstractmethod
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bioprop.datamodules.base import ImageDataModule, Split
from bioprop.errors import UserError


class TorchvisionSet(ImageDataModule):
    """A data set with official training and test images, downloaded and read by torchvision, which checks MD5 sums.

    A subclass names torchvision's class as `reader`, the set's `title`, the `folder` below `data_dir` that its files
    lie in ("" for none), the address that they come from as `origin`, and the classes as `class_names`. Both of
    torchvision's protocols are read: `train=` or `split=`, `.targets` or `.labels`, channels last, first or absent.

    Args:
        data_dir: Folder that holds the set's own folder, or into which it is downloaded.
        download: Download the files if they are not there.
        shared: Arguments of `ImageDataModule`.

    Raises:
        UserError: An argument is out of range; the files are missing or damaged and are not, or cannot be, downloaded.
    """

    title: ClassVar[str]
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
        self._stored: dict[Split, Any] = {}

    def prepare_data(self) -> None:
        """Downloads the files if asked to; Lightning calls this once a machine, before `setup`."""
        if self.download:
            both: tuple[Split, ...] = ("train", "test")
            for split in both if self._by_split() else both[:1]:  # the other protocol has one download for both
                self._open(split, download=True)

    def setup(self, stage: str) -> None:
        """Reads the splits that a stage needs and that are not in memory yet.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
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

    def _by_split(self) -> bool:
        return "split" in signature(self.reader).parameters

    def _load(self, split: Split) -> Any:
        if split not in self._stored:
            self._stored[split] = self._open(split, download=False)
        return self._stored[split]

    def _open(self, split: Split, download: bool) -> Any:
        which = {"split": split} if self._by_split() else {"train": split == "train"}
        try:
            return self.reader(self.data_dir, **which, download=download)
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
        """Describes the way to put the files in their place by hand."""
        return f"unpack {self.origin} into '{self.data_dir}'"
