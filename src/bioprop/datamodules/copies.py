"""Keeping the copies of an image on one side of a split.

Copies are recognised by the pixels that a network sees, once these are in memory: no file is read twice, and a copy in
another format, or with another EXIF record, is one, which its bytes would not show.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from bioprop.datamodules.images import BLOCK, Images


def digests(images: Images) -> list[bytes]:
    """Returns a fingerprint of the pixels of each image: equal for equal images, and else different."""
    return [
        hashlib.sha256(image.tobytes()).digest()
        for block in torch.split(torch.arange(len(images)), BLOCK)
        for image in images.index_select(0, block).numpy()
    ]


def copied(digests: Sequence[bytes]) -> list[list[int]]:
    """Returns the places of the images that are there more than once, the copies of one image together."""
    groups: dict[bytes, list[int]] = {}
    for place, digest in enumerate(digests):
        groups.setdefault(digest, []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def gather_copies(groups: Sequence[Sequence[int]], labels: Tensor, num_train: int) -> tuple[Tensor, Tensor]:
    """Moves the copies that straddle a split to one side of it.

    Validation gets as many images of each class as it had, as far as that can be done with whole groups, the small
    ones first; it also gets a group that is too large for that where it would have none of a class otherwise, and that
    group is at most half of the class. Training has the rest.

    Args:
        groups: Places of the images that are copies of each other, for each such image.
        labels: int64 [training images, then validation images].
        num_train: Number of training images among them.

    Returns:
        The places of both sides, training and validation, int64. Images that changed their side come last; the others
        are in their order.
    """
    is_val = torch.arange(len(labels)) >= num_train
    straddling = [torch.tensor(group) for group in groups if group[0] < num_train <= group[-1]]
    classes = int(labels.max()) + 1
    wanted, of_class = (torch.bincount(some, minlength=classes) for some in (labels[is_val], labels))
    into_val = is_val.clone()
    for group in straddling:
        into_val[group] = False
    kept = torch.bincount(labels[into_val], minlength=classes)
    for group in sorted(straddling, key=len):
        counts = torch.bincount(labels[group], minlength=classes)
        own = counts > 0
        fits = bool((kept + counts <= wanted)[own].all())
        lacking = bool(((kept == 0) & (wanted > 0) & own).any() and (2 * counts <= of_class)[own].all())
        if (fits or lacking) and bool((kept + counts < of_class)[own].all()):
            into_val[group] = True
            kept += counts
    # a stable sort of "was it moved", to keep the order of all others
    moved = into_val != is_val
    train, val = (side.nonzero().flatten() for side in (~into_val, into_val))
    return train[moved[train].int().argsort(stable=True)], val[moved[val].int().argsort(stable=True)]
