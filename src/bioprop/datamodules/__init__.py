"""Data modules: images in memory, split, augmented and normalised in one way for every data set."""

from bioprop.datamodules.base import ImageDataModule
from bioprop.datamodules.digits import Digits
from bioprop.datamodules.image_folder import ImageFolder
from bioprop.datamodules.imagenet32 import ImageNet32
from bioprop.datamodules.torchvision_sets import (
    CIFAR10,
    CIFAR100,
    KMNIST,
    MNIST,
    SVHN,
    FashionMNIST,
    TorchvisionSet,
)

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "KMNIST",
    "MNIST",
    "SVHN",
    "Digits",
    "FashionMNIST",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet32",
    "TorchvisionSet",
]
