"""Data modules: images in memory, split, augmented and normalised in one way for every data set."""

from bioprop.datamodules.base import ImageDataModule
from bioprop.datamodules.cifar10 import CIFAR10
from bioprop.datamodules.digits import Digits
from bioprop.datamodules.image_folder import ImageFolder

__all__ = ["CIFAR10", "Digits", "ImageDataModule", "ImageFolder"]
