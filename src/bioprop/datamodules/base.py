"""The base of all image data modules: splits, limits, resident images, loaders, augmentation, normalisation."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from bioprop.datamodules.images import Images, blocks, copy_to, crop_and_flip
from bioprop.datamodules.loader import ResidentLoader
from bioprop.datamodules.normalization import PUBLISHED, ChannelStatistics, Normalization, channel_statistics, normalize
from bioprop.datamodules.sampling import complement, stratified_sample
from bioprop.errors import UserError

Split = Literal["train", "val", "test"]
STAGE_SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}
# one independent stream of random numbers for each choice, so that e.g. limit_val never changes the training images
VAL_STREAM = 0
LIMIT_STREAMS = {"train": 1, "val": 2, "test": 3}
#: Largest part of an accelerator's free memory that the images of a split may take.
DEVICE_SHARE = 0.25


class Resident(NamedTuple):
    """A split in use: uint8 [n, channels, height, width], int64 [n], and int64 [n] places in the stored split."""

    images: Images
    labels: Tensor
    indices: Tensor


class ImageDataModule(LightningDataModule, ABC):
    """Images in memory as bytes, with a stratified validation split and per-sample augmentation on the batch's device.

    Every batch reaches the algorithm as `(images, labels)`: float32 [batch, channels, height, width], normalised, and
    int64 [batch]. Which images are used is decided from the labels before any image is decoded. Images that take at
    most a quarter of an accelerator's free memory are copied there, and batches are put together there, the same ones.
    A subclass hands over `image_shape` and `classes`, says what the images are, by `_labels` and `_decode` (and
    `_has_val_images` if the data set has its own validation images), and passes all other arguments on. Every argument
    of every constructor is kept in checkpoints, paths as text, but for arrays.

    Args:
        image_shape: (channels, height, width).
        classes: Names of the classes, in the order of the labels.
        batch_size: Images in a batch, those of all processes together. In training, an epoch's images that do not fill
            its last batch wait for another epoch; evaluation has them all.
        val_fraction: Fraction of the training images set aside for validation, stratified by class.
        normalization: "train" for mean and standard deviation of each channel of the training images (those left by
            split and limit, not augmented), "cifar10" or "imagenet32" for the published ones of three channels, "none"
            for [0, 1] alone.
        horizontal_flip: Mirror each training image with probability 1/2 (mirrored digits and letters are none).
        crop_padding: Crop each training image at random out of itself padded by this many pixels of its edge.
        seed: Seed of the validation split, the limits, the order of the training images and their augmentation.
        limit_train: Use so many training images, stratified by class; None for all. The others are not decoded.
        limit_val: Use so many validation images, stratified by class; None for all.
        limit_test: Use so many test images, stratified by class; None for all.

    Raises:
        UserError: An argument is out of range, or the statistics have another number of channels than the images.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        classes: tuple[str, ...],
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
        super().__init__()
        limits: dict[Split, int | None] = {"train": limit_train, "val": limit_val, "test": limit_test}
        least = {"batch_size": (batch_size, 1), "crop_padding": (crop_padding, 0), "seed": (seed, 0)}
        for name, (value, smallest) in {**least, **{f"limit_{split}": (limits[split], 1) for split in limits}}.items():
            if value is not None and value < smallest:
                raise UserError(f"{name} is {value}, which is too small: choose {smallest} or more.")
        # a subclass that has a `_held_out` of its own passes None
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise UserError(f"val_fraction is {val_fraction}: choose a number between 0 and 1, such as 0.1.")
        if normalization not in (choices := get_args(Normalization)):
            raise UserError(f"normalization '{normalization}' is unknown: choose one of {', '.join(choices)}.")
        if normalization in PUBLISHED and image_shape[0] != 3:
            raise UserError(
                f"normalization '{normalization}' is for images of 3 channels, but these have {image_shape[0]}: choose "
                "'train' or 'none'."
            )
        #: (channels, height, width) of every image, and the names of the classes in the order of the labels.
        self.image_shape, self.classes = image_shape, classes
        self.num_classes = len(classes)
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.normalization = normalization
        self.horizontal_flip = horizontal_flip
        self.crop_padding = crop_padding
        self.seed = seed
        self.limits = limits
        self.resident: dict[Split, Resident] = {}
        self._on_device: dict[tuple[Split, torch.device], Tensor] = {}
        self._statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._loaded_statistics: ChannelStatistics | None = None
        ignored = ["image_shape", "classes", *(["val_fraction"] if val_fraction is None else [])]
        self.save_hyperparameters(ignore=ignored)  # the arguments of all constructors on the way here
        ignored += [key for key, value in self.hparams.items() if isinstance(value, Tensor | np.ndarray)]
        self.save_hyperparameters(ignore=ignored)
        # a Path would make the checkpoint unreadable under weights_only=True
        self.save_hyperparameters({key: str(value) for key, value in self.hparams.items() if isinstance(value, Path)})

    @abstractmethod
    def _labels(self, split: Split) -> Tensor:
        """Returns the labels, int64 [n], of all images of a split as it is stored, without decoding images."""

    @abstractmethod
    def _decode(self, split: Split, indices: Tensor) -> Images:
        """Returns the images at these places of a stored split, uint8 [len(indices), channels, height, width]."""

    def _has_val_images(self) -> bool:
        """Says if "val" is a stored split; otherwise validation images are taken out of the stored split "train"."""
        return False

    def _check_pixels(self, new: set[Split]) -> None:
        """Called after the splits `new` have been decoded, for checks that need the pixels."""

    def prediction_names(self) -> list[str]:
        """Returns a name for each test image, in the order of the test and predict loaders; here its index."""
        return [str(index) for index in self._select("test").tolist()]

    def setup(self, stage: str) -> None:
        """Decodes the splits that a stage, "fit", "validate", "test" or "predict", needs and that are not in memory."""
        needed = self._needed(stage)
        new = [split for split in get_args(Split) if split in needed and split not in self.resident]
        for split in new:
            indices = self._select(split)
            source = self._source(split)
            self.resident[split] = Resident(self._decode(source, indices), self._labels(source)[indices], indices)
        self._check_pixels(set(new))

    def _needed(self, stage: str) -> set[Split]:
        """Returns the splits that have to be in memory for a stage."""
        return {*STAGE_SPLITS[stage], *(("train",) if self.normalization == "train" else ())}

    def train_dataloader(self) -> ResidentLoader:
        """Returns the training batches in an order of their own every epoch, with the draws of the augmentation."""
        # Trainer(overfit_batches=...) means the same few batches again and again
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        return self._loader(
            "train",
            seed=self.seed,
            shuffle=not overfit,
            horizontal_flip=self.horizontal_flip,
            crop_padding=self.crop_padding,
            equal_shares=True,
        )

    def val_dataloader(self) -> ResidentLoader:
        """Returns the validation batches: every image once, in an order shuffled by the seed, the same every time."""
        return self._loader("val")

    def test_dataloader(self) -> ResidentLoader:
        """Returns the test batches: every image once, in the order in which they are stored."""
        return self._loader("test")

    def predict_dataloader(self) -> ResidentLoader:
        """Returns the test batches."""
        return self._loader("test")

    def _loader(self, split: Split, **how: Any) -> ResidentLoader:
        """Returns the batches of a split, which all processes share."""
        images, labels, _ = self.resident[split]
        share = (0, 1)
        if self.trainer is not None:
            share = self.trainer.global_rank, self.trainer.world_size
            device = self.trainer.strategy.root_device
            if (split, device) in self._on_device:
                images = self._on_device[split, device]
            elif len(images) * np.prod(self.image_shape) <= DEVICE_SHARE * free_memory(device):
                images = self._on_device[split, device] = copy_to(device, images)
        return ResidentLoader(images, labels, self.batch_size, share=share, **how)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments (a batch that carries draws) and normalises, on the device of the batch.

        Args:
            batch: `(images, labels)` or `(images, labels, draws)` from a `ResidentLoader`; a bare tensor (a module's
                `example_input_array`, which Lightning sends this way too) is returned as it is.
            dataloader_idx: Ignored.

        Returns:
            `(images, labels)`: float32 [batch, channels, height, width] and int64 [batch].
        """
        if isinstance(batch, Tensor):
            return batch
        images, labels, *draws = batch
        if draws:
            images = crop_and_flip(images, draws[0], self.crop_padding)
        return normalize(images, *self.statistics(images.device)), labels

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation, each float32 [channels], of images in [0, 1]; "train" needs `setup`."""
        if device not in self._statistics:
            if self._loaded_statistics is not None:
                mean, std = self._loaded_statistics
            elif self.normalization == "train":
                mean, std = channel_statistics(block for _, block in blocks(self.resident["train"].images))
            elif self.normalization == "none":
                mean, std = [0.0] * self.image_shape[0], [1.0] * self.image_shape[0]
            else:
                mean, std = PUBLISHED[self.normalization]
            self._statistics[device] = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        return self._statistics[device]

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps besides the arguments: classes, shape, statistics of normalisation."""
        mean, std = self.statistics(torch.device("cpu"))
        kept = {"classes": list(self.classes), "image_shape": tuple(self.image_shape)}
        return {**kept, "mean": mean.tolist(), "std": std.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the statistics of a checkpoint, whatever training images are here now.

        Raises:
            UserError: The classes are not those the weights were trained on.
        """
        if state_dict["classes"] != list(self.classes):
            raise UserError(
                f"the checkpoint was trained on the classes {_listing(state_dict['classes'])}, but these images have "
                f"{_listing(self.classes)}: give images of the same classes"
            )
        self._loaded_statistics = state_dict["mean"], state_dict["std"]
        self._statistics.clear()

    def _source(self, split: Split) -> Split:
        """The stored split that the images of a split come from."""
        return "train" if split == "val" and not self._has_val_images() else split

    def _select(self, split: Split) -> Tensor:
        """The places in the stored split of the images to use, in the order in which to keep them in memory."""
        labels = self._labels(self._source(split))
        pool = torch.arange(len(labels))
        if split != "test" and not self._has_val_images():
            held_out = self._held_out(labels)
            pool = held_out if split == "val" else complement(len(labels), held_out)
        limit = self.limits[split] or len(pool)
        chosen = pool[stratified_sample(labels[pool], limit, self._rng(LIMIT_STREAMS[split]))]
        return chosen.sort().values if split == "test" else chosen

    def _held_out(self, labels: Tensor) -> Tensor:
        """The training images to validate on: at least one of each class where the fraction allows, never all."""
        counts = torch.bincount(labels, minlength=self.num_classes)
        if counts.min() < 2:
            raise UserError(
                f"class '{self.classes[counts.argmin()]}' has {counts.min()} training image(s), too few to split into "
                "training and validation: give it 2 or more."
            )
        size = max(1, round(self.val_fraction * len(labels)))
        most = len(labels) - self.num_classes
        if size > most:
            raise UserError(
                f"val_fraction {self.val_fraction} of {len(labels)} training images leaves fewer than one per class "
                f"to train on: choose at most {most / len(labels):.3g}."
            )
        return stratified_sample(labels, size, self._rng(VAL_STREAM), leave=1)

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, stream))

    def __str__(self) -> str:
        # Lightning's version asks every loader for a `dataset`
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.hparams.items())})"


def trained_images(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `state_dict` of the data module that wrote a checkpoint, whichever it was.

    Raises:
        UserError: There is none.
    """
    network = (checkpoint.get("hyper_parameters", {}).get("network") or {}).get("init_args") or {}
    for state in checkpoint.values():
        if isinstance(state, dict) and {"classes", "mean", "std"} <= state.keys():
            shape = state.get("image_shape") or network.get("image_shape")  # older checkpoints have it there alone
            return {**state, "image_shape": shape and tuple(shape)}
    raise UserError("the checkpoint does not say which classes it was trained on: give images with a folder train")


def free_memory(device: torch.device) -> int:
    """Returns the bytes that are free on a GPU; none on a CPU, or where they cannot be told."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _listing(names: Sequence[str]) -> str:
    """Returns the names in a row, of many the first ones."""
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])} and so on ({len(names)} in all)"
