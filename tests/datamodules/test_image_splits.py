"""What is found in a folder of images, what is passed over, and what is said of it."""

import logging
import os
import shutil

import pytest
import torch
from PIL import Image, features

from bioprop.datamodules import ImageFolder
from bioprop.errors import UserError
from tests.datamodules.folders import bad, held, make


@pytest.fixture
def said(caplog):
    """Gives all sentences so far."""
    caplog.set_level(logging.INFO)
    return lambda: caplog.messages


def test_counts_are_said_once(folder, said):
    data = make(["fit", "test", "predict", "fit"], data_dir=str(folder), batch_size=8, cache=False)
    assert said() == [
        f"images in '{folder}': train 30 of 2 classes; test 7 of 2 classes",
        "training on 27 images, validating on 3",
    ]
    assert data.classes == ("ant", "cat")


def test_other_processes_say_nothing(folder, said, monkeypatch):
    monkeypatch.setattr("pytorch_lightning.utilities.rank_zero_only.rank", 1)
    make(["fit", "test"], data_dir=str(folder))
    assert said() == []


def test_what_is_passed_over_is_counted_with_its_reason(folder, said, write_images):
    train = folder / "train"
    (train / ".cache").mkdir()
    (train / "cat" / ".hidden.png").write_bytes(b"")
    for name in ("notes.txt", "b.heic", "a.heic", "README"):
        (train / "cat" / name).write_text("no image")
    (train / "cat" / "again").symlink_to(train, target_is_directory=True)
    (folder / ".git").mkdir()
    (folder / "loop").symlink_to("loop")
    for name in ("loose.png", "loose2.png", "valid/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(train / "ant" / "000.png", train / name if "loose" in name else folder / name)
    data = make(["fit"], data_dir=str(folder), batch_size=8)
    assert sum(len(held(data, split).labels) for split in ("train", "val")) == 30
    assert said()[1] == (
        f"passed over in '{train}': 2 hidden ('.cache'), 1 linked to a folder above ('cat/again'), "
        "1 without a suffix ('cat/README'), 2 of suffix .heic, which is not read ('cat/a.heic'), "
        "1 of suffix .txt, which is not read ('cat/notes.txt'), 2 beside the class folders ('loose.png')"
    )
    assert said()[2] == f"passed over in '{folder}': 1 beside train, val and test ('valid')"


def test_sub_folders_are_read_after_all_else_unchanged(folder, write_images):
    before = make(["predict"], data_dir=str(folder)).prediction_names()
    deep = folder / "test" / "cat" / "2024" / "may"
    deep.mkdir(parents=True)
    Image.new("RGB", (6, 5), "red").save(deep / "x.png")
    (folder / "test" / "ant" / "elsewhere").symlink_to(deep, target_is_directory=True)
    (folder / "test" / "cat" / "y.png").symlink_to(deep / "x.png")
    names = make(["predict"], data_dir=str(folder)).prediction_names()
    assert [name for name in names if name in before] == before
    assert set(names) - set(before) == {"test/cat/2024/may/x.png", "test/ant/elsewhere/x.png", "test/cat/y.png"}


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPG", "gif", "avif", "jp2", "tga", "ppm"])
def test_whatever_pillow_reads_is_read(folder, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    form = "JPEG" if suffix in ("jfif", "jpe", "JPG") else None
    Image.new("RGB", (6, 5), "red").save(folder / "test" / "cat" / f"x.{suffix}", format=form)
    data = make(["test"], data_dir=str(folder))
    assert f"test/cat/x.{suffix}" in data.prediction_names()
    red = held(data, "test").images[-1].float().mean((1, 2))
    assert (red - torch.tensor([255.0, 0, 0])).abs().max() < 4


def test_a_class_that_is_a_link_to_nothing_is_refused(folder):
    for split in ("train", "val", "test"):
        (folder / split).mkdir(exist_ok=True)
        (folder / split / "dog").symlink_to("/nowhere/dog")
        bad(f"{split}/dog' is a link to '/nowhere/dog', which is not there", data_dir=str(folder))
        (folder / split / "dog").unlink()


def test_a_folder_that_may_not_be_read_stops_the_listing(folder, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    (folder / "train" / "cat" / "secret").mkdir()
    with pytest.raises(PermissionError, match="cat/secret"):
        make(data_dir=str(folder))


def test_missing_folders(tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    bad("/nowhere' is not a folder", data_dir=str(tmp_path / "nowhere"))
    for folder in (".", "empty"):
        bad(rf"{tmp_path / folder}' has no class folders in a folder train", data_dir=str(tmp_path / folder))


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class(folder, write_images, split):
    write_images("val", {"ant": 2, "cat": 2})
    shutil.rmtree(folder / split / "cat")
    (folder / split / "cat").mkdir()
    bad(f"{split}/cat' has no images", data_dir=str(folder))


def test_a_class_of_files_that_are_not_read_says_so(folder):
    (folder / "train" / "dog").mkdir()
    (folder / "train" / "dog" / "1.heic").write_bytes(b"?")
    bad(r"dog' has no images: .*1 of suffix \.heic, which is not read \('dog/1\.heic'\)", data_dir=str(folder))


def test_validation_images_are_of_all_classes_and_no_others(write_images):
    write_images("train", {"ant": 2, "cat": 2})
    folder = write_images("val", {"ant": 2})
    sentence = bad(r"val/cat' has no images.*or remove '.*val'", data_dir=str(folder))
    (folder / "val" / "cat").mkdir()  # which is no way out
    assert bad("has no images", data_dir=str(folder)) == sentence
    write_images("val", {"ant": 2, "cat": 2, "dog": 2})
    bad(r"class 'dog' of '.*val' is unknown", data_dir=str(folder))


def test_fit_needs_no_test_folder_but_test_does(write_images):
    folder = write_images("train", {"a": 5, "b": 5})
    data = make(["fit", "validate"], data_dir=str(folder))
    for stage in ("test", "predict"):
        bad("test' does not exist", stage, data_dir=str(folder))
    with pytest.raises(UserError, match="test' does not exist"):
        data.prediction_names()
    (folder / "test").mkdir()
    make(["fit"], data_dir=str(folder))
    for stage in ("test", "predict"):
        bad("test' has no images", stage, data_dir=str(folder))


@pytest.mark.parametrize("empty", [False, True])
def test_a_test_set_may_lack_classes(folder, said, empty):
    shutil.rmtree(folder / "test" / "ant")
    if empty:
        (folder / "test" / "ant").mkdir()
    data = make(["fit", "test", "predict"], data_dir=str(folder))
    assert f"images in '{folder}': train 30 of 2 classes; test 4 of 1 classes" in said()
    assert held(data, "test").labels.tolist() == [1] * 4
    assert data.prediction_names() == [f"test/cat/{number:03d}.png" for number in range(4)]


def test_unlabelled_images_are_predicted_and_not_tested_on(folder, said):
    shutil.rmtree(folder / "test")
    (folder / "test" / "more").mkdir(parents=True)
    for number in range(4):
        shutil.copy(folder / "train" / "ant" / f"00{number}.png", folder / "test" / ("more" if number > 2 else "."))
    data = make(["fit", "predict"], data_dir=str(folder), limit_test=3)
    assert f"images in '{folder}': train 30 of 2 classes; test 4 without a label" in said()
    assert len(held(data, "test").images) == len(data.prediction_names()) == 3
    assert set(data.prediction_names()) < {"test/more/003.png", *(f"test/00{number}.png" for number in range(3))}
    bad(r"^4 test image.* have no label to test on.*\(ant, cat\), such as '", "test", data_dir=str(folder))


def test_a_test_class_that_was_not_trained_on_is_predicted_and_not_tested_on(folder, said, write_images):
    write_images("test", {"dog": 2})
    data = make(["fit", "predict"], data_dir=str(folder))
    assert f"images in '{folder}': train 30 of 2 classes; test 7 of 2 classes and 2 without a label" in said()
    assert data.prediction_names()[-2:] == ["test/dog/000.png", "test/dog/001.png"]
    bad(r"^2 test image.* have no label.*test/dog/000.png'", "test", data_dir=str(folder))


def test_a_test_set_with_classes_passes_over_images_beside_them(folder, said):
    shutil.copy(folder / "train" / "ant" / "000.png", folder / "test" / "preview.png")
    data = make(["fit", "test"], data_dir=str(folder))
    assert len(held(data, "test").labels) == 7
    assert said()[1] == f"passed over in '{folder / 'test'}': 1 beside the class folders ('preview.png')"


def test_python_users_see_what_was_passed_over_but_not_of_hidden_files(folder, caplog):
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"")
    ImageFolder(str(folder))
    assert all(record.levelno < logging.WARNING for record in caplog.records)
    (folder / "train" / "cat" / "x.heic").write_bytes(b"")
    ImageFolder(str(folder))
    assert [record.levelno for record in caplog.records if record.levelno >= logging.WARNING] == [logging.WARNING]
