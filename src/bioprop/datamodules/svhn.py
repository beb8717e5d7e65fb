"""SVHN, downloaded by torchvision."""

from typing import Any

from torchvision import datasets

from bioprop.datamodules.torchvision_set import TorchvisionSet


class SVHN(TorchvisionSet):
    """Street View House Numbers: 73,257 training and 26,032 test photographs of digits, cropped, [3, 32, 32].

    The digit in the middle is the label; the 531,131 easier images that are published as extra are not used.

    Source: Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu and A. Y. Ng, Reading digits in natural images with
    unsupervised feature learning, NIPS workshop on deep learning, 2011, http://ufldl.stanford.edu/housenumbers, read by
    `torchvision.datasets.SVHN`, which checks the files' MD5 sums.

    Args:
        data_dir: Folder that holds `train_32x32.mat` and `test_32x32.mat`, or into which they are downloaded (246 MB).
        shared: Arguments of `TorchvisionSet`.
    """

    reader = datasets.SVHN
    title = "SVHN"
    folder = ""
    origin = datasets.SVHN.split_list["train"][0].rpartition("/")[0]
    class_names = tuple("0123456789")

    def __init__(self, data_dir: str = "data", **shared: Any) -> None:
        super().__init__(data_dir=data_dir, image_shape=(3, 32, 32), **shared)

    def _remedy(self) -> str:
        return f"put train_32x32.mat and test_32x32.mat of {self.origin} into '{self.data_dir}'"
