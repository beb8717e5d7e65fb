"""Data modules: images in memory, split, augmented and normalised in one way for every data set."""

from bioprop.datamodules.base import ImageDataModule
from bioprop.datamodules.cifar import CIFAR10, CIFAR100
from bioprop.datamodules.digits import Digits
from bioprop.datamodules.image_folder import ImageFolder
from bioprop.datamodules.imagenet32 import ImageNet32
from bioprop.datamodules.mnist import KMNIST, MNIST, FashionMNIST
from bioprop.datamodules.svhn import SVHN
from bioprop.datamodules.torchvision_set import TorchvisionSet

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
