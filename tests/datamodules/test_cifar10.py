import pickle
from urllib.error import URLError

import pytest
import torch
from torchvision import datasets

from bioprop.datamodules import CIFAR10
from bioprop.datamodules.torchvision_sets import CIFAR10_NAMES
from bioprop.errors import UserError
from tests.datamodules.published_files import write_cifar


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A small CIFAR-10 in the real file format."""
    return write_cifar(tmp_path, monkeypatch)


def test_constants_and_published_defaults():
    data = CIFAR10()
    assert (data.image_shape, data.num_classes, data.classes) == ((3, 32, 32), 10, tuple(CIFAR10_NAMES.split()))
    assert (data.horizontal_flip, data.crop_padding, data.normalization, data.batch_size) == (True, 4, "cifar10", 128)
    mean, std = data.statistics(torch.device("cpu"))
    assert torch.equal(mean, torch.tensor([0.4914, 0.4822, 0.4465]))
    assert torch.equal(std, torch.tensor([0.2470, 0.2435, 0.2616]))


def test_classes_are_torchvisions(root):
    assert tuple(datasets.CIFAR10(root).classes) == tuple(CIFAR10_NAMES.split())


def test_images_and_labels_are_those_of_the_files(root):
    data = CIFAR10(str(root))
    data.prepare_data()  # nothing to download
    data.setup("fit")
    data.setup("test")
    assert [len(data.resident[split].labels) for split in ("train", "val", "test")] == [180, 20, 40]
    assert torch.bincount(data.resident["val"].labels).tolist() == [2] * 10
    content = pickle.loads((root / datasets.CIFAR10.base_folder / "test_batch").read_bytes())
    images, labels, _ = data.resident["test"]
    assert torch.equal(images, torch.from_numpy(content["data"]).view(-1, 3, 32, 32))
    assert labels.tolist() == content["labels"]
    stored = datasets.CIFAR10(root)
    images, labels, indices = data.resident["train"]
    assert torch.equal(images, torch.from_numpy(stored.data)[indices].permute(0, 3, 1, 2))
    assert torch.equal(labels, torch.tensor(stored.targets)[indices])
    assert data.prediction_names() == [str(index) for index in range(40)]


def test_training_batches_carry_draws_of_crop_and_flip(root):
    data = CIFAR10(str(root), batch_size=180)
    data.setup("fit")
    images, _, draws = next(iter(data.train_dataloader()))
    assert draws.amax(0).tolist() == [8, 8, 1]
    result, _ = data.on_after_batch_transfer((images, draws[:, 0], draws), 0)
    assert result.shape == images.shape
    assert result.dtype == torch.float32


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"missing from '.*cifar-10-batches-py'.*download") as caught:
        CIFAR10(str(tmp_path), download=False).setup("fit")
    assert "\n" not in str(caught.value)


def test_damaged_files(root):
    (root / datasets.CIFAR10.base_folder / "data_batch_3").write_bytes(b"cut")
    with pytest.raises(UserError, match="or damaged"):
        CIFAR10(str(root), download=False).setup("fit")


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("File not found or corrupted.")])
def test_failing_download(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(UserError, match=r"is not in '.*cifar-10-batches-py' and could not be downloaded") as caught:
        CIFAR10(str(tmp_path)).prepare_data()
    assert "\n" not in str(caught.value)


def test_no_download_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: pytest.fail("downloaded"))
    CIFAR10(str(tmp_path), download=False).prepare_data()
