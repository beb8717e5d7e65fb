"""Every data module keeps the contract."""

import inspect

import numpy as np
from PIL import Image

from bioprop import datamodules
from bioprop.datamodules import (
    CIFAR10,
    CIFAR100,
    KMNIST,
    MNIST,
    SVHN,
    Digits,
    FashionMNIST,
    ImageFolder,
    ImageNet32,
)
from bioprop.testing import DataModuleContract
from tests.datamodules.published_files import write_cifar, write_imagenet32, write_mnist, write_svhn


class TestDigits(DataModuleContract):
    cls = Digits

    def write(self, folder, monkeypatch):
        return {}


class TestImageFolder(DataModuleContract):
    cls = ImageFolder

    def write(self, folder, monkeypatch):
        rng = np.random.default_rng(0)
        for split, count in (("train", 30), ("test", 8)):
            for name in ("cat", "dog"):
                place = folder / "images" / split / name
                place.mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(place / f"{number}.png")
        return {"data_dir": str(folder / "images"), "val_fraction": 0.2}


class TestCIFAR10(DataModuleContract):
    cls = CIFAR10

    def write(self, folder, monkeypatch):
        return {"data_dir": str(write_cifar(folder, monkeypatch, self.cls.__name__))}


class TestCIFAR100(TestCIFAR10):
    cls = CIFAR100

    def write(self, folder, monkeypatch):
        return {"data_dir": str(write_cifar(folder, monkeypatch, "CIFAR100", train=1000))}


class TestMNIST(DataModuleContract):
    cls = MNIST

    def write(self, folder, monkeypatch):
        return {"data_dir": str(write_mnist(folder, monkeypatch, self.cls.__name__))}


class TestFashionMNIST(TestMNIST):
    cls = FashionMNIST


class TestKMNIST(TestMNIST):
    cls = KMNIST


class TestSVHN(DataModuleContract):
    cls = SVHN

    def write(self, folder, monkeypatch):
        return {"data_dir": str(write_svhn(folder, monkeypatch))}


class TestImageNet32(DataModuleContract):
    cls = ImageNet32

    def write(self, folder, monkeypatch):
        write_imagenet32(folder, monkeypatch, "npz")
        return {"data_dir": str(folder), "num_val_per_class": 1}


def test_no_data_module_is_left_out():
    exported = {getattr(datamodules, name) for name in datamodules.__all__}
    named = {cls for cls in exported if not inspect.isabstract(cls)}
    checked = {suite.cls for suite in globals().values() if inspect.isclass(suite) and hasattr(suite, "cls")}
    assert checked == named
