"""Stratified samples, chosen from the labels alone so that no image is decoded for nothing.

scikit-learn's stratified splitters refuse samples smaller than the number of classes and may leave a rare class out of
a larger one; here a class is left out only if the sample is smaller than the number of classes.
"""

import numpy as np
import torch
from torch import Tensor


def allocate(counts: np.ndarray, size: int, capacity: np.ndarray) -> np.ndarray:
    """Divides a sample of `size` among classes of `counts` images in proportion, rounding by largest remainder.

    No class gives more than its `capacity`, and each that has any gives 1 or more where `size`, at most the sum of
    them, allows that. All of it is int64 [classes].
    """
    share: np.ndarray = counts * (size / counts.sum())
    least = np.minimum(1, capacity) if size >= np.count_nonzero(capacity) else np.zeros_like(capacity)
    allocated: np.ndarray = np.clip(np.floor(share).astype(np.int64), least, capacity)
    while allocated.sum() > size:
        allocated[np.argmax(np.where(allocated > least, allocated - share, -np.inf))] -= 1
    while allocated.sum() < size:
        allocated[np.argmax(np.where(allocated < capacity, share - allocated, -np.inf))] += 1
    return allocated


def stratified_sample(labels: Tensor, size: int, rng: np.random.Generator, leave: int = 0) -> Tensor:
    """Chooses `size` images at random, or all if there are fewer, with the classes in the proportions of the whole.

    Of each class, `leave` images are not chosen. Returns indices into `labels`, int64 [images], in random order.
    """
    counts = np.bincount(labels.numpy())
    capacity = np.maximum(counts - leave, 0)
    return _draw(labels, allocate(counts, min(size, int(capacity.sum())), capacity), rng)


def equal_sample(labels: Tensor, per_class: int, rng: np.random.Generator) -> Tensor:
    """Chooses at random the same number of images of every class, or all of a class that has fewer.

    Returns indices into `labels`, int64 [images], in random order.
    """
    return _draw(labels, np.minimum(np.bincount(labels.numpy()), per_class), rng)


def _draw(labels: Tensor, numbers: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Draws `numbers[c]` images of each class c, in random order."""
    order = rng.permutation(len(labels))
    sorted_by_class = order[np.argsort(labels.numpy()[order], kind="stable")]
    counts = np.bincount(labels.numpy())
    starts = np.cumsum(counts) - counts
    chosen = [sorted_by_class[start : start + number] for start, number in zip(starts, numbers, strict=True)]
    return torch.from_numpy(rng.permutation(np.concatenate(chosen)))


def complement(size: int, indices: Tensor) -> Tensor:
    """Returns the indices below `size` that are not in `indices`, ascending."""
    kept = torch.ones(size, dtype=torch.bool)
    kept[indices] = False
    return kept.nonzero().flatten()
