"""Batches out of images in memory or mapped into it, in an order that is a function of seed and epoch alone."""

from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler, SequentialSampler

from bioprop.datamodules.images import BLOCK, Images
from bioprop.errors import UserError

ORDER_STREAM, DRAWS_STREAM = 0, 1


def epoch_generator(seed: int, epoch: int, stream: int) -> torch.Generator:
    """Returns a CPU generator for one purpose in one epoch; streams are independent of each other."""
    (state,) = np.random.SeedSequence((seed, epoch, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)


class EpochSampler(Sampler[int]):
    """A permutation of 0..size-1, a function of seed and epoch; Lightning calls `set_epoch` before each epoch."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the given epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size, generator=epoch_generator(self.seed, self.epoch, ORDER_STREAM))
        for block in torch.split(order, BLOCK):  # a million numbers as Python objects take 40 MB
            yield from block.tolist()


class LoaderState(TypedDict):
    """The position of a loader: `batch` batches of epoch `epoch` have been handed out."""

    epoch: int
    batch: int


class ResidentLoader:
    """Yields batches of resident images: every image in the stored order, full batches alone when shuffled.

    In training, the images that do not fill the epoch's last batch wait for another epoch, where they fall elsewhere:
    on a batch of 14 instead of 64, feedback training is so noisy that it undid the epoch's work (the angle between the
    weights of a linear stage went from 36 to 61 degrees on digits). Fewer images than a batch are one batch.

    Each batch is `(images, labels)`: uint8 [batch, channels, height, width] and int64 [batch]. With augmentation
    (`crop_padding` > 0 or `horizontal_flip`) it is `(images, labels, draws)`, where `draws`, int64 [batch, 3], are the
    arguments of `bioprop.datamodules.augmentation.crop_and_flip`, to be applied on the batch's device. They come
    from (seed, epoch) alone, and the loader saves its position in Lightning's checkpoints, so neither device nor
    interruption changes what a run sees.

    Args:
        images: uint8 [images, channels, height, width], a tensor or what hands out images as one does.
        labels: int64 [images].
        batch_size: Images in a batch.
        seed: Seed of order and draws.
        shuffle: A new order every epoch; otherwise the stored order, and epoch 0's draws, every time.
        horizontal_flip: Mirror each image with probability 1/2.
        crop_padding: Offsets of the crop are uniform in 0..2 * crop_padding pixels.
        share: Number of this process among those that share every batch, and how many these are. Each has
            `rows[rank::processes]` of every batch; of the last one some may have a row less, or none, in which case
            they have a batch less.
        equal_shares: Leave out the rows of a batch that some processes would have more than others: in training, where
            they take every step together.

    Raises:
        UserError: The images, or a training batch, cannot be shared among so many processes.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        horizontal_flip: bool = False,
        crop_padding: int = 0,
        share: tuple[int, int] = (0, 1),
        equal_shares: bool = False,
    ) -> None:
        self.rank, self.processes = share
        if len(labels) < self.processes:
            raise UserError(
                f"{len(labels)} image(s) cannot be shared among {self.processes} processes: use --trainer.devices="
                f"{len(labels)} or fewer."
            )
        if batch_size % self.processes and (equal_shares or batch_size < self.processes):
            raise UserError(
                f"batch_size {batch_size} cannot be shared equally among {self.processes} processes: it is the number "
                f"of images of all processes together, so make it a multiple of {self.processes}."
            )
        self.equal_shares = equal_shares
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        self.horizontal_flip = horizontal_flip
        self.crop_padding = crop_padding
        self.sampler: Sampler[int] = (
            EpochSampler(len(labels), seed) if shuffle else SequentialSampler(range(len(labels)))
        )
        self.batch_sampler = BatchSampler(self.sampler, batch_size, drop_last=shuffle and len(labels) >= batch_size)
        self._position = LoaderState(epoch=0, batch=0)
        self._resuming = False

    def __len__(self) -> int:
        batches = len(self.batch_sampler)
        last = len(self.labels) - (batches - 1) * self.batch_size
        return batches - (self._shared(last) <= self.rank)

    def _shared(self, rows: int) -> int:
        """Returns the number of rows of a batch that are shared out."""
        return rows // self.processes * self.processes if self.equal_shares else rows

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        # A generator, because Lightning makes the iterator of the first epoch before it calls set_epoch or restores
        # the position: nothing here runs until the first batch is asked for.
        epoch = self.sampler.epoch if isinstance(self.sampler, EpochSampler) else 0
        # a position saved at the end of an epoch says nothing about the next one
        start = self._position["batch"] if self._resuming and self._position["epoch"] == epoch else 0
        self._resuming = False
        draws = self._draws(epoch) if self.horizontal_flip or self.crop_padding else None
        for number, indices in enumerate(self.batch_sampler):
            if number < start:
                continue
            own = slice(self.rank, self._shared(len(indices)), self.processes)
            chosen = torch.tensor(indices[own])
            if not len(chosen):
                return  # the other processes have the last images
            self._position = LoaderState(epoch=epoch, batch=number + 1)
            # index_select is much faster than images[chosen]
            batch = (self.images.index_select(0, chosen), self.labels.index_select(0, chosen))
            first = number * self.batch_size
            yield batch if draws is None else (*batch, draws[first : first + len(indices)][own])

    def state_dict(self) -> LoaderState:
        """Returns the position, which Lightning saves in its checkpoints."""
        return self._position

    def load_state_dict(self, state: LoaderState) -> None:
        """Makes the next pass go on where the saved one was, if it is a pass through the same epoch."""
        self._position = state
        self._resuming = True

    def _draws(self, epoch: int) -> Tensor:
        """Draws [images, 3] of an epoch: vertical offset, horizontal offset, flip, in the order of the epoch."""
        generator = epoch_generator(self.seed, epoch, DRAWS_STREAM)
        offsets = torch.randint(2 * self.crop_padding + 1, (len(self.labels), 2), generator=generator)
        flips = torch.randint(1 + self.horizontal_flip, (len(self.labels), 1), generator=generator)
        return torch.cat([offsets, flips], dim=1)
