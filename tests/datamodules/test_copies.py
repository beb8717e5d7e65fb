"""Copies of an image stay on one side of a split, and a split without copies is as it was."""

import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from bioprop.datamodules import ImageFolder, image_folder
from bioprop.datamodules.copies import copied, gather_copies
from tests.datamodules.folders import bad, held, make


def sides(data):
    return [{image.numpy().tobytes() for image in held(data, split).images} for split in ("train", "val")]


def double(folder, suffix="png"):
    """Puts a copy beside every training image, in another file format if so named."""
    for path in sorted((folder / "train").rglob("*.png")):
        copy = path.with_name(f"{path.stem} (1).{suffix}")
        if suffix == "png":
            shutil.copy(path, copy)
        else:
            Image.open(path).save(copy)


@pytest.mark.parametrize("suffix", ["png", "bmp"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copies_stay_on_one_side(folder, caplog, suffix, seed):
    double(folder, suffix)
    data = make(["fit"], data_dir=str(folder), val_fraction=0.2, seed=seed)
    train, val = sides(data)
    assert not train & val
    assert [len(held(data, split).labels) for split in ("train", "val")] == [48, 12]
    assert torch.bincount(held(data, "val").labels).tolist() == [4, 8]
    places = torch.cat([held(data, split).indices for split in ("train", "val")])
    assert sorted(places.tolist()) == list(range(60))
    for split in ("train", "val"):  # labels went along
        part = held(data, split)
        assert torch.equal(part.labels, data._labels("train")[part.indices])
    (sentence,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "30 of the 60 training and validation images are copies of others, pixel for pixel" in sentence
    data.setup("validate")
    assert len(caplog.records) == 1


def test_every_command_has_the_same_sides(folder):
    double(folder)
    arguments = {"data_dir": str(folder), "val_fraction": 0.2, "normalization": "none"}
    fit, validate = make(["fit"], **arguments), make(["validate"], **arguments)
    tested = make(["test", "fit"], **{**arguments, "normalization": "train"})
    for data in (validate, tested):
        for split in ("train", "val"):
            assert torch.equal(held(data, split).indices, held(fit, split).indices)
            assert torch.equal(held(data, split).images, held(fit, split).images)


def test_limits_hold_and_copies_beyond_them_do_not_matter(folder):
    double(folder)
    data = make(["fit"], data_dir=str(folder), val_fraction=0.3, limit_train=20, limit_val=8)
    train, val = sides(data)
    assert not train & val
    assert len(held(data, "train").labels) <= 20
    assert 4 <= len(held(data, "val").labels) <= 8


def test_a_split_without_copies_is_not_touched(folder, caplog, monkeypatch):
    monkeypatch.setattr(image_folder, "gather_copies", lambda *_: pytest.fail("there are no copies"))
    data = make(["fit"], data_dir=str(folder))
    assert held(data, "val").indices.tolist() == [26, 11, 2]  # as ever
    assert not caplog.records


def test_copies_on_one_side_change_no_split(folder):
    before = make(["fit"], data_dir=str(folder))
    first, second = sorted(held(before, "train").indices.tolist())[:2]
    files = sorted((folder / "train" / "ant").iterdir())
    shutil.copy(files[first], files[second])
    after = make(["fit"], data_dir=str(folder))
    for split in ("train", "val"):
        assert torch.equal(held(after, split).indices, held(before, split).indices)


def test_a_folder_of_one_image_cannot_be_split(write_images):
    folder = write_images("train", {"a": 1, "b": 1})
    for number in range(1, 8):
        for name in "ab":
            shutil.copy(folder / "train" / "a" / "000.png", folder / "train" / name / f"{number}.png")
    (folder / "train" / "b" / "000.png").unlink()
    bad("is left to validate on: all are copies of training images", "fit", data_dir=str(folder))


def test_a_class_without_validation_images_is_named(folder, caplog):
    for path in (folder / "train" / "ant").iterdir():
        if path.name != "000.png":
            shutil.copy(folder / "train" / "ant" / "000.png", path)
    data = make(["fit"], data_dir=str(folder))
    assert held(data, "val").labels.tolist() == [1, 1]
    assert "no image of class 'ant' is validated on: too many are copies of each other" in caplog.messages


@pytest.mark.parametrize("seed", range(20))
def test_any_groups_are_kept_together(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(10, 200))
    digests = [bytes([value]) for value in rng.integers(0, 256, count, dtype=np.uint8)]
    labels = torch.from_numpy(rng.integers(0, 3, count))
    num_train = int(rng.integers(count // 2, count - 1))
    train, val = gather_copies(copied(digests), labels, num_train)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(count))
    assert not {digests[place] for place in train.tolist()} & {digests[place] for place in val.tolist()}
    for side, own in ((train, train < num_train), (val, val >= num_train)):
        kept = side[own]
        assert torch.equal(side[: len(kept)], kept.sort().values)  # those that moved come last


def test_validation_images_that_are_training_images_are_counted_in_a_warning(folder, write_images, caplog):
    write_images("val", {"ant": 2, "cat": 2})
    Image.open(folder / "train" / "cat" / "011.png").save(folder / "val" / "ant" / "001.bmp")
    for stages in (["fit"], ["validate", "fit"]):  # whichever was decoded first
        caplog.clear()
        make(stages, data_dir=str(folder), normalization="none")
        assert caplog.messages == ["1 of the 5 images of val are also in train, pixel for pixel"]


def test_test_images_that_are_training_images_are_counted_in_a_warning(folder, caplog):
    for number in (1, 2):
        Image.open(folder / "train" / "cat" / f"01{number}.png").save(folder / "test" / "cat" / f"00{number}.png")
    data = ImageFolder(str(folder), val_fraction=0.04, limit_val=1)
    with caplog.at_level(logging.WARNING):
        data.setup("test")
        data.setup("predict")
    indices = held(data, "train").indices.tolist()
    expected = sum(10 + number in indices for number in (11, 12))  # the ten ants come first
    assert expected >= 1
    assert caplog.messages == [f"{expected} of the 7 images of test are also in train, pixel for pixel"]
