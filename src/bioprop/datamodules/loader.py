"""Batches out of images in memory or mapped into it, in an order that is a function of seed and epoch alone."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from bioprop.datamodules.images import Images
from bioprop.errors import UserError

ORDER_STREAM, DRAWS_STREAM = 0, 1


def epoch_generator(seed: int, epoch: int, stream: int) -> torch.Generator:
    """Returns a CPU generator for one purpose in one epoch; streams are independent of each other."""
    (state,) = np.random.SeedSequence((seed, epoch, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)


class ResidentLoader:
    """Yields batches of resident images: every image in the stored order, full batches alone when shuffled.

    In training, the images that do not fill the epoch's last batch wait for another epoch, where they fall elsewhere:
    on a batch of 14 instead of 64, feedback training is so noisy that it undid the epoch's work (the angle between the
    weights of a linear stage went from 36 to 61 degrees on digits). Fewer images than a batch are one batch.

    Each batch is `(images, labels)`: uint8 [batch, channels, height, width] and int64 [batch], on the device of the
    images. With augmentation (`crop_padding` > 0 or `horizontal_flip`) it is `(images, labels, draws)`, where `draws`,
    int64 [batch, 3], are the arguments of `bioprop.datamodules.images.crop_and_flip`. Order and draws of an epoch come
    from (seed, epoch) alone, drawn on the CPU and moved once, and Lightning's checkpoints have the position, so neither
    device nor interruption changes what a run sees.

    Args:
        images: uint8 [images, channels, height, width], a tensor or what hands out images as one does.
        labels: int64 [images].
        batch_size: Images in a batch.
        seed: Seed of order and draws.
        shuffle: A new order every epoch; otherwise the stored order.
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
        self.labels = labels.to(images.device)
        self.batch_size = batch_size
        self.seed = seed
        self.horizontal_flip = horizontal_flip
        self.crop_padding = crop_padding
        self.shuffle = shuffle
        if shuffle:  # Lightning tells the epoch to what it finds under this name, and advises against it in evaluation
            self.sampler = self
        self.epoch = 0
        self._position = {"epoch": 0, "batch": 0}
        self._resuming = False

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size)
        return full if self.shuffle and full else full + (self._shared(rest) > self.rank)

    def _shared(self, rows: int) -> int:
        """Returns the number of rows of a batch that are shared out."""
        return rows // self.processes * self.processes if self.equal_shares else rows

    def set_epoch(self, epoch: int) -> None:
        """Takes the number of the epoch, from 0, which decides order and draws; Lightning calls this before each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        # A generator, because Lightning makes the iterator of the first epoch before it calls set_epoch or restores
        # the position: nothing here runs until the first batch is asked for.
        epoch = self.epoch
        # a position saved at the end of an epoch says nothing about the next one
        start = self._position["batch"] if self._resuming and self._position["epoch"] == epoch else 0
        self._resuming = False
        order = self._order(epoch).to(self.labels.device)
        draws = self._draws(epoch).to(self.labels.device) if self.horizontal_flip or self.crop_padding else None
        for number in range(start, len(self)):
            first = number * self.batch_size
            rows = self._shared(min(self.batch_size, len(order) - first))
            own = slice(first + self.rank, first + rows, self.processes)
            self._position = {"epoch": epoch, "batch": number + 1}
            # index_select is much faster than images[chosen]
            batch = (self.images.index_select(0, order[own]), self.labels.index_select(0, order[own]))
            yield batch if draws is None else (*batch, draws[own])

    def _order(self, epoch: int) -> Tensor:
        """Returns the order of the images in an epoch, int64 [images]."""
        if not self.shuffle:
            return torch.arange(len(self.labels))
        return torch.randperm(len(self.labels), generator=epoch_generator(self.seed, epoch, ORDER_STREAM))

    def _draws(self, epoch: int) -> Tensor:
        """Draws [images, 3] of an epoch: vertical offset, horizontal offset, flip, in the order of the epoch."""
        generator = epoch_generator(self.seed, epoch, DRAWS_STREAM)
        offsets = torch.randint(2 * self.crop_padding + 1, (len(self.labels), 2), generator=generator)
        flips = torch.randint(1 + self.horizontal_flip, (len(self.labels), 1), generator=generator)
        return torch.cat([offsets, flips], dim=1)

    def state_dict(self) -> dict[str, int]:
        """Returns the position, which Lightning saves in its checkpoints: batches of an epoch that were handed out."""
        return self._position

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next pass go on where the saved one was, if it is a pass through the same epoch."""
        self._position = state
        self._resuming = True
