"""Images in an accelerator's memory: the same batches, put together there without waiting for it.

No accelerator is needed: the CPU stands in for one where figures are compared, and torch's device "meta", whose tensors
have no values that could be read, where nothing may be waited for.
"""

from types import SimpleNamespace

import pytest
import torch

from bioprop.catalogue import unknown_argument, unknown_option
from bioprop.datamodules import Digits, ImageFolder, base
from bioprop.datamodules.images import MappedImages

ARGUMENTS = {"batch_size": 8, "horizontal_flip": True, "crop_padding": 2, "limit_test": 20}


def trained_on(device, data, share=(0, 1)):
    """Gives a data module a trainer that trains on a device, as one of some processes."""
    strategy = SimpleNamespace(root_device=torch.device(device))
    rank, processes = share
    data.trainer = SimpleNamespace(strategy=strategy, global_rank=rank, world_size=processes, overfit_batches=0)
    for stage in ("fit", "test"):
        data.setup(stage)
    return data


def batches(data, epoch=1):
    """Returns all batches of an epoch and of evaluation as the algorithm gets them."""
    train = data.train_dataloader()
    train.sampler.set_epoch(epoch)
    loaders = (train, data.val_dataloader(), data.test_dataloader())
    return [data.on_after_batch_transfer(batch, 0) for loader in loaders for batch in loader]


def free(monkeypatch, count):
    monkeypatch.setattr(base, "free_memory", lambda device: count)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("share", [(0, 1), (1, 2)])
def test_batches_are_the_same_bit_for_bit(folder, monkeypatch, cache, share):
    make = lambda: ImageFolder(str(folder), cache=cache, **ARGUMENTS)  # noqa: E731
    plain = trained_on("cpu", make(), share)
    assert isinstance(plain.train_dataloader().images, MappedImages) == cache
    expected = batches(plain)
    free(monkeypatch, 10**9)
    data = trained_on("cpu", make(), share)
    loader = data.train_dataloader()
    assert isinstance(loader.images, torch.Tensor)
    assert loader.images.data_ptr() == data.train_dataloader().images.data_ptr()  # copied once
    for batch, other in zip(batches(data), expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, other, strict=True))


def test_nothing_is_waited_for(monkeypatch):
    free(monkeypatch, 10**9)
    data = trained_on("meta", Digits(**ARGUMENTS))
    found = batches(data)
    assert len(found) == len(data.train_dataloader()) + 18 + 3
    assert {tensor.device.type for batch in found for tensor in batch} == {"meta"}
    assert found[0][0].shape == (8, 1, 16, 16)


def test_images_that_take_more_than_their_share_stay(monkeypatch):
    data = Digits(**ARGUMENTS)
    size = 1294 * 16 * 16
    free(monkeypatch, 4 * size)
    assert trained_on("meta", data).train_dataloader().images.device.type == "meta"
    data = Digits(**ARGUMENTS)
    free(monkeypatch, 4 * size - 1)
    assert trained_on("meta", data).train_dataloader().images.device.type == "cpu"
    assert data.val_dataloader().images.device.type == "meta"  # each split by itself


def test_a_cpu_has_no_memory_of_its_own():
    assert base.free_memory(torch.device("cpu")) == 0


def test_the_option_that_said_so_is_gone():
    assert unknown_option("data.on_device") == unknown_argument("on_device")
    assert "live on the GPU by themselves: leave it out" in unknown_argument("on_device")
