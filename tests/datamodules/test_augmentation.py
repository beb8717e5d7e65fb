import pytest
import torch
import torch.nn.functional as F

from bioprop.datamodules.images import crop_and_flip
from bioprop.datamodules.normalization import channel_statistics, normalize


def naive(image, dy, dx, flip, padding):
    padded = F.pad(image[None].double(), (padding,) * 4, mode="replicate")[0].to(image.dtype)
    crop = padded[:, dy : dy + image.shape[1], dx : dx + image.shape[2]]
    return crop.flip(2) if flip else crop


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_and_flip_is_the_naive_loop(padding, shape, dtype):
    generator = torch.Generator().manual_seed(padding)
    images = torch.randint(256, (40, *shape), generator=generator).to(dtype)
    offsets = torch.randint(2 * padding + 1, (40, 2), generator=generator)
    draws = torch.cat([offsets, torch.randint(2, (40, 1), generator=generator)], dim=1)
    expected = torch.stack([naive(image, *draw, padding) for image, draw in zip(images, draws.tolist(), strict=True)])
    result = crop_and_flip(images, draws, padding)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


def test_neutral_draws_change_nothing():
    images = torch.randint(256, (4, 3, 6, 6), dtype=torch.uint8)
    assert torch.equal(crop_and_flip(images, torch.tensor([[4, 4, 0]]).expand(4, 3), 4), images)


def test_normalize():
    images = torch.randint(256, (4, 3, 6, 6), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 4.0])
    result = normalize(images, mean, std)
    assert result.dtype == torch.float32
    for channel in range(3):
        expected = (images[:, channel] / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(result[:, channel], expected)


def test_channel_statistics_are_those_of_float64():
    images = torch.randint(256, (50, 3, 7, 5), dtype=torch.uint8)
    values = images.double().div(255).transpose(0, 1).flatten(1)
    mean, std = channel_statistics(images.split(20))
    torch.testing.assert_close(torch.tensor(mean).double(), values.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(std).double(), values.std(1, correction=0), rtol=1e-6, atol=0)


def test_a_constant_channel_has_a_std_of_one():
    images = torch.cat([torch.full((2, 1, 4, 4), 77), torch.arange(32).view(2, 1, 4, 4)], 1).to(torch.uint8)
    _, std = channel_statistics([images])
    assert std[0] == 1
    assert 0 < std[1] < 1
