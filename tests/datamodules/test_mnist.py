"""What MNIST, Fashion-MNIST, KMNIST and CIFAR-100 have besides the contract."""

import gzip
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from bioprop.cli import main
from bioprop.datamodules import CIFAR100, KMNIST, MNIST, FashionMNIST
from bioprop.datamodules.torchvision_sets import CIFAR100_NAMES
from bioprop.errors import UserError
from bioprop.networks import MLP, InvertibleMLP, LeNet, ResNet18, SimpleVGG
from tests.datamodules.published_files import write_cifar, write_mnist

CONFIGS = Path(__file__).parents[2] / "lightning_configs"
KINDS = pytest.mark.parametrize("cls", [MNIST, FashionMNIST, KMNIST])


def ready(data, *stages):
    data.prepare_data()
    for stage in stages:
        data.setup(stage)
    return data


def stored(folder, cls, name):
    (path,) = (folder / cls.folder).glob(f"{name}*.gz")
    raw = gzip.decompress(path.read_bytes())
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 * (raw[3] + 1))


@KINDS
def test_images_and_labels_are_those_of_the_files(tmp_path, monkeypatch, cls):
    write_mnist(tmp_path, monkeypatch, cls.__name__)
    data = ready(cls(str(tmp_path)), "fit", "test")
    assert (data.image_shape, data.num_classes) == ((1, 28, 28), 10)
    assert [len(data.resident[split].labels) for split in ("train", "val", "test")] == [180, 20, 40]
    for split, name in (("train", "train"), ("test", "t10k")):
        images, labels, indices = data.resident[split]
        assert torch.equal(images, stored(tmp_path, cls, f"{name}-images").view(-1, 1, 28, 28)[indices])
        assert torch.equal(labels, stored(tmp_path, cls, f"{name}-labels").long()[indices])


def test_image_size_32_is_a_border_of_black_pixels(tmp_path, monkeypatch):
    write_mnist(tmp_path, monkeypatch)
    small, large = (ready(MNIST(str(tmp_path), image_size=size), "test").resident["test"].images for size in (28, 32))
    assert large.shape == (40, 1, 32, 32)
    assert torch.equal(large[:, :, 2:30, 2:30], small)
    assert large.sum() == small.sum()


def test_classes_are_torchvisions():
    assert MNIST().classes == tuple("0123456789")
    assert [name[0] for name in datasets.MNIST.classes] == list("0123456789")
    assert FashionMNIST().classes == tuple(datasets.FashionMNIST.classes)
    assert KMNIST().classes == tuple(datasets.KMNIST.classes)


@KINDS
@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("File not found or\ncorrupted.")])
def test_failing_download(tmp_path, monkeypatch, cls, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    with pytest.raises(
        UserError, match=r"is not in '.*/raw' and could not be downloaded there .*put the files of http"
    ) as caught:
        cls(str(tmp_path)).prepare_data()
    assert cls.__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


@KINDS
def test_missing_files(tmp_path, cls):
    with pytest.raises(UserError, match=rf"^{cls.__name__} is missing from '.*/raw', or damaged"):
        cls(str(tmp_path), download=False).setup("fit")


@pytest.mark.parametrize("length", [0, 3, 10, 5000])
def test_damaged_files(tmp_path, monkeypatch, length):
    write_mnist(tmp_path, monkeypatch)
    data = ready(MNIST(str(tmp_path)))
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="or damaged: set download to true, or put the files"):
        data.setup("fit")


def test_cifar100_has_the_fine_labels(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "CIFAR100", train=1000)
    data = ready(CIFAR100(str(tmp_path)), "fit", "test")
    assert data.classes == tuple(CIFAR100_NAMES.split()) == tuple(datasets.CIFAR100(tmp_path).classes)
    assert (data.image_shape, data.num_classes, data.normalization) == ((3, 32, 32), 100, "train")
    assert (data.horizontal_flip, data.crop_padding) == (True, 4)
    assert torch.bincount(data.resident["val"].labels).tolist() == [1] * 100
    content = pickle.loads((tmp_path / "cifar-100-python" / "test").read_bytes())
    images, labels, _ = data.resident["test"]
    assert torch.equal(images, torch.from_numpy(content["data"]).view(-1, 3, 32, 32))
    assert labels.tolist() == content["fine_labels"]


def test_cifar100_without_network(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(UserError, match=r"CIFAR100 is not in '.*cifar-100-python' .*cifar-100-python\.tar\.gz"):
        CIFAR100(str(tmp_path)).prepare_data()


@pytest.mark.parametrize("network", [MLP, LeNet, ResNet18])
@pytest.mark.parametrize("size", [28, 32])
def test_networks_take_images_of_these_shapes(network, size):
    data = MNIST(image_size=size)
    logits = network(image_shape=data.image_shape, num_classes=10)(torch.zeros(2, *data.image_shape))
    assert logits.shape == (2, 10)


def test_networks_that_do_not_take_28_pixels_say_so():
    with pytest.raises(UserError, match="SimpleVGG's conv5 does not fit its input of 1x1 pixels") as caught:
        SimpleVGG(image_shape=MNIST().image_shape, num_classes=10)
    assert "\n" not in str(caught.value)
    assert SimpleVGG(image_shape=MNIST(image_size=32).image_shape, num_classes=10)(torch.zeros(2, 1, 32, 32)).any()
    assert InvertibleMLP(image_shape=MNIST().image_shape, num_classes=10)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("ldrl_lenet_digits", "MNIST"),
        ("fa_lenet_cifar10", "FashionMNIST"),
        ("dtp_mlp_digits", "KMNIST"),
        ("ddtplinear_mlp_imagefolder", "MNIST"),
        ("gaitprop_invertiblemlp_digits", "MNIST"),
    ],
)
def test_any_config_runs_on_them_by_name(tmp_path, monkeypatch, config, kind):
    write_mnist(tmp_path / "data", monkeypatch, kind)
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", f"--config={CONFIGS / config}.yaml", f"--config={CONFIGS / 'smoke.yaml'}"]
    arguments += [f"--data={kind}", "--data.data_dir=data", "--trainer.enable_progress_bar=false"]
    cli = main(arguments)
    assert type(cli.datamodule).__name__ == kind
    assert cli.trainer.global_step == 2
    assert np.isfinite(float(cli.trainer.callback_metrics["train/loss"]))
