"""The data module of image folders: shapes, resizing, limits, arguments."""

import time

import pytest
import torch
from PIL import Image

from bioprop.datamodules import ImageFolder
from tests.datamodules.folders import bad, held, make, pixels


def test_shape_classes_and_pixels(folder):
    data = ImageFolder(str(folder))
    assert data.image_shape == (3, 5, 6)  # not square
    assert (data.classes, data.num_classes) == (("ant", "cat"), 2)
    data.setup("fit")
    data.setup("predict")
    assert [len(held(data, split).labels) for split in ("train", "val", "test")] == [27, 3, 7]
    assert torch.bincount(held(data, "val").labels).tolist() == [1, 2]
    names = data.prediction_names()
    assert names == [f"test/ant/{n:03d}.png" for n in range(3)] + [f"test/cat/{n:03d}.png" for n in range(4)]
    for image, label, name in zip(*held(data, "test")[:2], names, strict=True):
        assert torch.equal(image, pixels(folder / name))
        assert data.classes[label] in name


def test_train_and_derived_validation_images_are_disjoint(folder):
    data = ImageFolder(str(folder))
    data.setup("fit")
    indices = torch.cat([held(data, "train").indices, held(data, "val").indices])
    assert sorted(indices.tolist()) == list(range(30))


def test_prediction_names_follow_the_limit(folder):
    data = ImageFolder(str(folder), limit_test=4)
    data.setup("predict")
    images, labels, _ = held(data, "test")
    for image, label, name in zip(images, labels, data.prediction_names(), strict=True):
        assert torch.equal(image, pixels(folder / name))
        assert data.classes[label] in name


def test_a_val_folder_replaces_the_split(folder, write_images):
    write_images("val", {"ant": 2, "cat": 2})
    data = ImageFolder(str(folder), val_fraction=0.5)
    data.setup("fit")
    assert len(held(data, "train").labels) == 30
    assert torch.bincount(held(data, "val").labels).tolist() == [2, 2]
    expected = {pixels(path).numpy().tobytes() for path in (folder / "val").rglob("*.png")}
    assert {image.tobytes() for image in held(data, "val").images.numpy()} == expected


@pytest.mark.parametrize(("mode", "extension", "channels"), [("L", "png", 1), ("L", "jpg", 1), ("RGB", "JPEG", 3)])
def test_channels_come_from_the_images(write_images, mode, extension, channels):
    folder = write_images("train", {"a": 4, "b": 4}, mode=mode, extension=extension)
    data = ImageFolder(str(folder))
    assert data.image_shape == (channels, 5, 6)
    data.setup("fit")
    first = pixels(folder / "train" / "a" / f"000.{extension}", mode)
    images, _, indices = held(data, "train")
    assert torch.equal(images[indices == 0][0] if (indices == 0).any() else held(data, "val").images[0], first)


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 1)])
def test_channels_convert(write_images, mode, channels):
    folder = write_images("train", {"a": 4, "b": 4}, mode=mode)
    data = ImageFolder(str(folder), channels=channels)
    data.setup("fit")
    assert held(data, "train").images.shape[1:] == data.image_shape == (channels, 5, 6)


def test_image_size_resizes_mixed_sizes_with_antialiasing(write_images):
    write_images("train", {"a": 3}, size=(64, 40))
    folder = write_images("train", {"b": 3}, size=(9, 9))
    data = ImageFolder(str(folder), image_size=8)
    assert data.image_shape == (3, 8, 8)
    data.setup("fit")
    images, labels, indices = held(data, "train")
    large = labels == 0
    source = torch.stack([pixels(folder / "train" / "a" / f"{index:03d}.png") for index in indices[large].tolist()])
    expected = torch.nn.functional.interpolate(source.float(), (8, 8), mode="bilinear", antialias=True)
    assert (images[large] - expected).abs().max() <= 1.01


def test_files_are_decoded_in_order_by_several_threads(write_images, monkeypatch):
    monkeypatch.setattr("bioprop.datamodules.image_files._usable_cpus", lambda: 4)
    folder = write_images("train", {"a": 200, "b": 100})
    data = ImageFolder(str(folder), normalization="none")
    data.setup("fit")
    files = [path for name in "ab" for path in sorted((folder / "train" / name).iterdir())]
    for split in ("train", "val"):
        images, _, indices = held(data, split)
        assert all(torch.equal(image, pixels(files[index])) for image, index in zip(images, indices, strict=True))


def test_limits_choose_before_decoding(write_images, monkeypatch):
    folder = write_images("train", {"a": 60, "b": 60})
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or open_image(path))
    ImageFolder(str(folder), limit_train=6, limit_val=4).setup("fit")
    assert len(opened) == 1 + 6 + 4  # one to find the shape


def test_a_limit_of_a_large_folder_is_fast(tmp_path, write_images):
    folder = write_images("train", {"a": 1, "b": 1}, size=(2, 2))
    for name in ("a", "b"):
        for number in range(1, 10_000):
            header, pixels = b"P6 2 2 255\n", number.to_bytes(2, "big") + name.encode() * 10
            (folder / "train" / name / f"x{number}.ppm").write_bytes(header + pixels)

    def seconds(train: int, val: int) -> float:  # of the processor, whatever else it does
        start = time.process_time()
        ImageFolder(str(folder), limit_train=train, limit_val=val).setup("fit")
        return time.process_time() - start

    # the best of a few: a collection of garbage in this process would be counted, too
    whole, limited = seconds(12_000, 4_000), min(seconds(64, 16) for _ in range(3))
    assert limited < whole / 2


def test_progress_is_quiet_without_a_terminal(folder, capfd):
    ImageFolder(str(folder)).setup("fit")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_named_statistics_are_used(folder):
    data = ImageFolder(str(folder), normalization="imagenet32")
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    result, _ = data.on_after_batch_transfer((images, labels), 0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(result, (images / 255 - mean[:, None, None]) / std[:, None, None])


def test_unreadable_images_are_named(folder):
    path = folder / "train" / "cat" / "007.png"
    path.write_bytes(path.read_bytes()[:60])
    bad("cat/007.png' cannot be read", "fit", data_dir=str(folder))
    path.write_bytes(b"")
    bad("cat/007.png' cannot be read", "fit", data_dir=str(folder))
    (folder / "train" / "ant" / "000.png").write_text("no image")
    bad("ant/000.png' cannot be read", data_dir=str(folder))


def test_mixed_sizes_name_file_sizes_and_remedy(folder, write_images):
    write_images("test", {"cat": 1}, size=(7, 9))
    message = bad("image_size", "test", data_dir=str(folder))
    assert "test/cat/000.png" in message
    assert "7x9" in message
    assert "6x5" in message


def test_a_class_too_small_to_split_is_named(write_images):
    folder = write_images("train", {"ant": 5, "cat": 1})
    bad(r"class 'cat' has 1 training image", "fit", data_dir=str(folder))


@pytest.mark.parametrize(("argument", "value"), [("channels", 2), ("image_size", 0), ("batch_size", 0)])
def test_bad_arguments(folder, argument, value):
    bad(rf"{argument} is {value}", data_dir=str(folder), **{argument: value})


def test_named_statistics_refuse_grey_images(folder):
    bad("'cifar10' is for images of 3 channels", data_dir=str(folder), channels=1, normalization="cifar10")


def test_train_and_validation_images_are_not_stored_class_by_class(write_images):
    data = make(["fit"], data_dir=str(write_images("train", {"a": 40, "b": 40})), val_fraction=0.5)
    for split in ("train", "val"):
        assert 5 < held(data, split).labels.diff().count_nonzero() < 40
    write_images("val", {"a": 20, "b": 20})
    folder_val = make(["fit"], data_dir=data.hparams["data_dir"]).resident["val"]
    assert folder_val.labels.diff().count_nonzero() > 5


def test_the_split_leaves_every_class_something_to_train_on(write_images):
    data = make(["fit"], data_dir=str(write_images("train", {"a": 2, "b": 30})), val_fraction=0.9)
    assert torch.bincount(held(data, "train").labels).tolist() == [1, 2]
    assert torch.bincount(held(data, "val").labels).tolist() == [1, 28]
