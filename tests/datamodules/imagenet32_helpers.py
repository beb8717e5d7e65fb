"""Helpers of the tests of ImageNet 32x32."""

import numpy as np
import pytest
import torch

from bioprop.datamodules import ImageNet32
from bioprop.errors import UserError

TEST = {"stored": ("val",)}  # a set of one small part


def ready(folder, *stages, **kwargs):
    data = ImageNet32(str(folder), **{"num_val_per_class": 1, **kwargs})
    for stage in stages:
        data.setup(stage)
    return data


def refused(match, folder, *stages, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        ready(folder, *(stages or ("test",)), **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def every(images):
    return images.index_select(0, torch.arange(len(images)))


def stored_images(parts):
    return torch.from_numpy(np.concatenate([part["data"] for part in parts])).view(-1, 3, 32, 32)
