"""What SVHN has besides the contract, and torchvision's other protocol with it."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets

from bioprop.cli import main
from bioprop.datamodules import SVHN, TorchvisionSet
from bioprop.errors import UserError
from tests.datamodules.published_files import write_svhn


def test_images_and_labels_are_those_of_the_files(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    data = SVHN(str(tmp_path))
    data.prepare_data()  # nothing to download
    data.setup("fit")
    data.setup("test")
    assert [len(data.resident[split].labels) for split in ("train", "val", "test")] == [180, 20, 40]
    for split in ("train", "val", "test"):
        content = scipy.io.loadmat(tmp_path / f"{'test' if split == 'test' else 'train'}_32x32.mat")
        images, labels, indices = data.resident[split]
        assert images.is_contiguous()
        for image, label, index in zip(images, labels, indices, strict=True):
            assert np.array_equal(image.permute(1, 2, 0), content["X"][..., index])
            assert label == content["y"][index, 0] % 10
    assert torch.bincount(data.resident["test"].labels).tolist() == [4] * 10


def test_constants():
    data = SVHN()
    assert (data.image_shape, data.classes) == ((3, 32, 32), tuple("0123456789"))
    assert (data.normalization, data.horizontal_flip, data.crop_padding) == ("train", False, 0)
    assert data.origin == "http://ufldl.stanford.edu/housenumbers"


def test_both_files_are_downloaded_and_no_more(tmp_path, monkeypatch):
    write_svhn(tmp_path / "elsewhere", monkeypatch)
    fetched = []

    def fetch(url, root, filename, md5):
        fetched.append(url)
        (Path(root) / filename).write_bytes((tmp_path / "elsewhere" / filename).read_bytes())

    monkeypatch.setattr("torchvision.datasets.svhn.download_url", fetch)
    (tmp_path / "data").mkdir()
    data = SVHN(str(tmp_path / "data"))
    data.prepare_data()
    assert fetched == [f"{SVHN.origin}/{name}_32x32.mat" for name in ("train", "test")]
    data.setup("test")


def test_failing_download(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.svhn.download_url", fail)
    with pytest.raises(UserError, match=r"SVHN is not in .* could not be downloaded .*put the files of http") as caught:
        SVHN(str(tmp_path)).prepare_data()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"cut"])
def test_missing_and_damaged_files(tmp_path, monkeypatch, content):
    write_svhn(tmp_path, monkeypatch)
    path = tmp_path / "train_32x32.mat"
    path.unlink() if content is None else path.write_bytes(content)
    data = SVHN(str(tmp_path), download=False)
    with pytest.raises(UserError, match=r"SVHN is missing from .*, or damaged: set download to true, or put"):
        data.setup("fit")


def test_another_set_of_that_protocol_needs_its_names_alone(tmp_path, monkeypatch):
    class Other(TorchvisionSet):
        reader = datasets.SVHN
        folder, origin = "", "nowhere"
        class_names = tuple("0123456789")

        def __init__(self, **shared):
            super().__init__(image_shape=(3, 32, 32), **shared)

    write_svhn(tmp_path, monkeypatch)
    other, svhn = Other(data_dir=tmp_path), SVHN(tmp_path)
    for data in (other, svhn):
        data.setup("test")
    assert torch.equal(other.resident["test"].images, svhn.resident["test"].images)


def test_the_base_is_no_choice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--model=Backprop", "--model.network=MLP", "--data=TorchvisionSet"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "choose one of" in said or "did you mean" in said
    assert said.count("TorchvisionSet") == 1
