"""Decoded images that are kept in a file: the same as fresh ones, and never those of other files or another form."""

import errno
import logging
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from bioprop.datamodules import image_files, kept_images
from bioprop.datamodules.images import MappedImages
from bioprop.datamodules.kept_images import FOLDER
from tests.datamodules.folders import bad, held, make

ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    """The user's cache folder, in the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user"


@pytest.fixture
def odd_folder(folder):
    """A folder with images that are changed on the way, two of them at once, and with copies on both sides."""
    cat = folder / "train" / "cat"
    exif = Image.Exif()
    exif[ORIENTATION] = 2
    Image.open(cat / "003.png").save(cat / "003.png", exif=exif)
    Image.open(cat / "004.png").convert("L").save(cat / "004.png", exif=exif)
    Image.new("RGBA", (6, 5), (0, 90, 200, 100)).save(cat / "005.png")
    Image.new("LA", (6, 5), (9, 100)).save(folder / "test" / "ant" / "001.png")
    for number in range(4):
        shutil.copy(cat / f"00{number}.png", cat / f"00{number} (1).png")
    return folder


def files_in(folder, pattern="*.npy"):
    return sorted(path.name for path in (folder / FOLDER).glob(pattern))


def same(first, second, splits=("train", "val")):
    """Makes sure that two data modules hold the same images, labels and places in the same order."""
    for split in splits:
        for one, other in zip(held(first, split), held(second, split), strict=True):
            assert torch.equal(one, other)


def fresh(first, *stages, **kwargs):
    """Makes sure that a data module holds what it would hold if nothing had been kept."""
    splits = ("test",) if stages == ("predict",) else ("train", "val")
    same(first, make(stages or ["fit"], **kwargs, cache=False), splits)


def opened_files(monkeypatch):
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or open_image(path))
    return opened


@pytest.mark.parametrize("grey", [False, True])
def test_kept_images_are_the_fresh_ones(odd_folder, caplog, monkeypatch, grey):
    if grey:
        for path in odd_folder.rglob("*.png"):
            Image.open(path).convert("L").save(path)
        Image.new("RGB", (6, 5), "red").save(odd_folder / "test" / "ant" / "001.png")
    caplog.set_level(logging.INFO)
    opened, runs = opened_files(monkeypatch), []
    for cache in (False, True, True):
        caplog.clear()
        opened.clear()
        data = make(["fit", "predict"], data_dir=str(odd_folder), batch_size=8, crop_padding=1, cache=cache)
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
        runs.append((data, caplog.messages, len(opened), batches))
    (off, said, *_), (_, cold, *_), (_, warm, *_) = runs
    assert [line for line in said if not line.startswith("of the images read")] == warm
    made = [line for line in cold if line.startswith("decoding")]
    assert [line for line in cold if line not in made and not line.startswith("of the images read")] == warm
    assert len(cold) - len(made) == len(said) > len(warm)
    assert [line.split(", kept in")[0] for line in made] == [
        "decoding 34 images of train",
        "decoding 7 images of test",
    ]
    for data, _, _, batches in runs[1:]:
        same(off, data, ("train", "val", "test"))
        assert off.state_dict() == data.state_dict()
        for batch, other in zip(runs[0][3], batches, strict=True):
            assert torch.equal(batch[0], other[0])
            assert torch.equal(batch[1], other[1])
        for held_images, _, _ in data.resident.values():
            assert isinstance(held_images, MappedImages)
            assert not held_images.stored.flags.writeable
    assert runs[2][2] == 0


def rewrite(path, seed=1):
    """Writes another image of the same size in bytes, by BMP."""
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)).save(path, format="BMP")


def at(path, nanoseconds=10**18):
    os.utime(path, ns=(nanoseconds, nanoseconds))


def change_time(path):
    rewrite(path)
    at(path, 10**18 + 1)


def change_size(path):
    Image.fromarray(np.full((5, 6, 3), 7, dtype=np.uint8)).save(path)
    at(path)


def change_name(path):
    path.rename(path.with_name("zzz.png"))


def change_number(path):
    path.unlink()


@pytest.mark.parametrize("change", [change_time, change_size, change_name, change_number])
def test_a_changed_file_is_decoded_anew_and_the_old_images_go(folder, change):
    for number, path in enumerate(sorted((folder / "train").rglob("*.png"))):
        rewrite(path, number)
        at(path)
    make(["fit"], data_dir=str(folder))
    (before,) = files_in(folder)
    change(folder / "train" / "ant" / "002.png")
    data = make(["fit"], data_dir=str(folder))
    fresh(data, data_dir=str(folder))
    (after,) = files_in(folder)
    assert after != before


def test_each_form_has_a_file_of_its_own(odd_folder):
    forms = [{}, {"image_size": 5}, {"channels": 1}, {"background": "black"}]
    for _ in range(2):
        for form in forms:
            fresh(make(["fit"], data_dir=str(odd_folder), **form), data_dir=str(odd_folder), **form)
        assert len(files_in(odd_folder)) == len(forms)


def test_the_form_of_test_images_is_that_of_the_training_images(folder):
    make(["fit", "predict"], data_dir=str(folder))
    for path in (folder / "train").rglob("*.png"):
        Image.open(path).convert("L").save(path)
    data = make(["fit", "predict"], data_dir=str(folder))
    assert held(data, "test").images.shape == (7, 1, 5, 6)
    fresh(data, "predict", data_dir=str(folder))


def test_resizing_to_a_size_is_another_form_than_having_it(write_images):
    folder = write_images("train", {"a": 4, "b": 4}, size=(5, 5))
    make(["fit"], data_dir=str(folder), image_size=5)
    Image.new("RGB", (9, 9)).save(folder / "train" / "b" / "003.png")
    make(["fit"], data_dir=str(folder), image_size=5)
    bad("9x9 pixels, but the first image is 5x5", "fit", data_dir=str(folder))


@pytest.mark.parametrize(
    ("place", "name"), [("PIL.__version__", "0.0"), ("bioprop.datamodules.kept_images.VERSION", 0)]
)
def test_another_decoder_decodes_anew(folder, monkeypatch, place, name):
    make(["fit"], data_dir=str(folder))
    monkeypatch.setattr(place, name)
    opened = opened_files(monkeypatch)
    make(["fit"], data_dir=str(folder))
    assert len(opened) == 1 + 30


def test_the_folder_may_be_moved(folder, monkeypatch):
    make(["fit"], data_dir=str(folder))
    moved = folder.rename(folder.with_name("moved"))
    opened = opened_files(monkeypatch)
    data = make(["fit"], data_dir=str(moved))
    assert not opened
    fresh(data, data_dir=str(moved))


@pytest.mark.parametrize(
    "damage", [lambda raw: b"", lambda raw: raw[:100], lambda raw: raw[:-1], lambda raw: bytes(len(raw))]
)
def test_damaged_files_are_made_anew(odd_folder, damage):
    make(["fit"], data_dir=str(odd_folder))
    (name,) = files_in(odd_folder)
    path = odd_folder / FOLDER / name
    raw = path.read_bytes()
    path.write_bytes(damage(raw))
    fresh(make(["fit"], data_dir=str(odd_folder)), data_dir=str(odd_folder))
    assert path.read_bytes() == raw


def test_an_interruption_leaves_nothing_new(folder, monkeypatch):
    make(["fit"], data_dir=str(folder))
    before = files_in(folder)
    change_time(folder / "train" / "cat" / "011.png")
    load = image_files._load

    def interrupted(path, *rest):
        if path.name == "017.png":
            raise KeyboardInterrupt
        return load(path, *rest)

    monkeypatch.setattr(image_files, "_load", interrupted)
    monkeypatch.setattr(image_files, "FILES_PER_TASK", 4)
    with pytest.raises(KeyboardInterrupt):
        make(["fit"], data_dir=str(folder))
    assert files_in(folder, "train-*") == before
    monkeypatch.setattr(image_files, "_load", load)
    fresh(make(["fit"], data_dir=str(folder)), data_dir=str(folder))


def test_an_unusable_image_leaves_nothing(folder):
    path = folder / "train" / "cat" / "007.png"
    path.write_bytes(path.read_bytes()[:60])
    bad("cat/007.png' cannot be read", "fit", data_dir=str(folder))
    assert not files_in(folder, "train-*")


def test_what_a_killed_process_left_is_removed(folder):
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "train-0123-4567.npy.part").write_bytes(b"half")
    make(["fit"], data_dir=str(folder))
    assert len(files_in(folder, "train-*")) == 1


def test_of_two_at_once_one_decodes_and_the_other_waits(folder, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    began, may_go_on = threading.Event(), threading.Event()
    load, loaded = image_files._load, []

    def slow(path, *rest):
        loaded.append(path)
        began.set()
        assert may_go_on.wait(60)
        return load(path, *rest)

    monkeypatch.setattr(image_files, "_load", slow)
    done = []
    arguments = {"data_dir": str(folder), "normalization": "none"}
    first, second = (threading.Thread(target=lambda: done.append(make(["fit"], **arguments))) for _ in range(2))
    first.start()
    assert began.wait(60)
    second.start()
    waiting = f"Another process is decoding the images of '{folder / 'train'}': waiting for it."
    while waiting not in caplog.messages:
        assert second.is_alive()
        time.sleep(0.01)
    may_go_on.set()
    first.join(60)
    second.join(60)
    assert len(loaded) == 30
    same(*done)


def test_limits_neither_make_nor_pass_for_the_whole(folder, monkeypatch):
    few = {"data_dir": str(folder), "limit_train": 6, "limit_val": 2}
    limited = make(["fit"], **few)
    assert not (folder / FOLDER).exists()
    whole = make(["fit"], data_dir=str(folder))
    fresh(whole, data_dir=str(folder))
    opened = opened_files(monkeypatch)
    same(limited, make(["fit"], **few))
    assert not opened
    make(["fit"], **few, image_size=4)
    assert len(files_in(folder)) == 1


def test_a_limit_that_leaves_none_out_is_none(folder):
    make(["predict"], data_dir=str(folder), limit_test=7, normalization="none")
    assert len(files_in(folder)) == 1


def test_nothing_is_kept_where_that_is_not_wanted(folder, user_cache):
    data = make(["fit", "predict"], data_dir=str(folder), cache=False)
    assert not (folder / FOLDER).exists()
    assert not user_cache.exists()
    assert isinstance(data.resident["train"].images, torch.Tensor)


def test_a_folder_that_cannot_be_written_to_has_its_images_kept_for_the_user(folder, user_cache, caplog, monkeypatch):
    (folder / FOLDER).write_text("in the way, as on a read-only disk")
    data = make(["fit"], data_dir=str(folder))
    fresh(data, data_dir=str(folder))
    assert len([*user_cache.rglob("train-*.npy")]) == 1
    opened = opened_files(monkeypatch)
    same(data, make(["fit"], data_dir=str(folder)))
    assert not opened
    assert not caplog.records


def test_without_any_place_images_are_decoded_into_memory(folder, user_cache, caplog):
    for place in (folder / FOLDER, user_cache):
        place.write_text("in the way")
    data = make(["fit"], data_dir=str(folder))
    fresh(data, data_dir=str(folder))
    assert isinstance(data.resident["train"].images, torch.Tensor)
    (sentence,) = caplog.messages
    assert sentence.startswith(f"the decoded images of '{folder / 'train'}' cannot be kept (")
    assert sentence.endswith("): every run decodes them")


def test_a_full_disk_is_a_sentence(folder, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept_images.np, "ascontiguousarray", refuse)
    data = make(["fit"], data_dir=str(folder))
    fresh(data, data_dir=str(folder))
    (sentence,) = caplog.messages
    assert "No space left on device" in sentence
    assert not files_in(folder, "train-*")


def test_the_folder_of_kept_images_is_neither_split_nor_class(folder, caplog):
    make(["fit", "predict"], data_dir=str(folder))
    assert (folder / FOLDER).is_dir()
    with caplog.at_level(logging.INFO):
        make(data_dir=str(folder))
    assert caplog.messages == [f"images in '{folder}': train 30 of 2 classes; test 7 of 2 classes"]
