"""What the tests of image folders share."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bioprop.datamodules import ImageFolder
from bioprop.datamodules.base import Resident
from bioprop.errors import UserError


def pixels(path, mode="RGB") -> Tensor:
    """Returns an image as Pillow reads it, uint8 [channels, height, width]."""
    array = np.array(Image.open(path).convert(mode))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def make(stages=(), **kwargs) -> ImageFolder:
    """Returns a data module after the stages."""
    data = ImageFolder(**kwargs)
    for stage in stages:
        data.setup(stage)
    return data


def held(data, split) -> Resident:
    """Returns the images of a split as a tensor, wherever they are, with their labels and places."""
    images, labels, indices = data.resident[split]
    return Resident(images.index_select(0, torch.arange(len(images))), labels, indices)


def bad(match, *stages, **kwargs) -> str:
    """Returns the sentence that a data module is refused with."""
    with pytest.raises(UserError, match=match) as caught:
        make(stages, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
