import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models._meta import _IMAGENET_CATEGORIES

from bioprop.datamodules import ImageNet32, imagenet32_files
from bioprop.datamodules.imagenet32 import class_names
from bioprop.datamodules.imagenet32_files import ARCHIVES, COUNTS
from bioprop.datamodules.images import MappedImages, blocks, copy_to
from tests.datamodules.imagenet32_helpers import TEST, every, ready, refused, stored_images
from tests.datamodules.published_files import write_imagenet32


def test_the_official_table():
    assert sum(COUNTS["train"]) == 1_281_167
    assert COUNTS["train"] == (128_116,) * 9 + (128_123,)
    assert COUNTS["val"] == (50_000,)
    assert ARCHIVES["Imagenet32_train_npz.zip"] == (
        3_580_435_279,
        "94226337ecc1b0309d9fcd0167127aaadc931587035fbcb53925235edbaec4fc",
    )
    assert ARCHIVES["Imagenet32_val_npz.zip"] == (
        139_697_668,
        "013990e6dec1237dcd1f9beadbab81ead6604cc119af5cacbfb59ae28148377a",
    )


def test_classes_are_those_of_the_development_kit_in_its_order():
    names = class_names()
    assert names[:3] == ("kit_fox", "English_setter", "Siberian_husky")
    assert names[999] == "dumbbell"
    assert len(set(names)) == 1000
    lines = (Path(imagenet32_files.__file__).parent / "imagenet32_classes.txt").read_text()
    rows = [line.split() for line in lines.splitlines()]
    # sorted by WordNet number they are torchvision's, but for what tells the two maillots apart
    for (_, name), theirs in zip(sorted(rows), _IMAGENET_CATEGORIES, strict=True):
        name = name.replace("_", " ").removesuffix(" 1").removesuffix(" 2")
        assert name in (theirs, theirs.removesuffix(" tank suit"))
    # the first ten official validation images: labels of the development kit, and torchvision's of the same images
    kit = [490, 361, 171, 822, 297, 482, 13, 704, 599, 164]
    alphabetical = [65, 970, 230, 809, 516, 57, 334, 415, 674, 332]
    place = {number: index for index, (number, _) in enumerate(sorted(rows))}
    assert [place[rows[label - 1][0]] for label in kit] == alphabetical


def test_constants_and_published_defaults():
    data = ImageNet32()
    assert (data.image_shape, data.num_classes, data.classes) == ((3, 32, 32), 1000, class_names())
    assert (data.horizontal_flip, data.crop_padding, data.normalization) == (True, 4, "imagenet32")
    assert (data.batch_size, data.num_val_per_class) == (256, 50)


@pytest.mark.parametrize("form", ["npz.zip", "npz", "pickle.zip", "pickle"])
def test_images_and_labels_are_those_of_the_files(tmp_path, monkeypatch, form):
    arrays = write_imagenet32(tmp_path, monkeypatch, form, per_class=3)
    data = ready(tmp_path, "fit", "test")
    assert [len(data.resident[split].labels) for split in ("train", "val", "test")] == [2000, 1000, 1000]
    for split, stored in (("train", "train"), ("val", "train"), ("test", "val")):
        images, labels, indices = data.resident[split]
        assert torch.equal(every(images), stored_images(arrays[stored])[indices])
        expected = torch.tensor([label for part in arrays[stored] for label in part["labels"]])
        assert torch.equal(labels, expected[indices] - 1)
        assert labels.dtype == torch.int64
    assert torch.equal(data.resident["test"].indices, torch.arange(1000))


@pytest.mark.parametrize("pickled", ["python2", "protocol 2", "protocol 5"])
def test_pickles_of_any_python(tmp_path, monkeypatch, pickled):
    arrays = write_imagenet32(tmp_path, monkeypatch, "pickle", pickled=pickled, **TEST)
    images, labels, _ = ready(tmp_path, "test").resident["test"]
    assert torch.equal(every(images), stored_images(arrays["val"]))
    assert (labels + 1).tolist() == arrays["val"][0]["labels"]


def test_files_may_lie_in_the_archives_own_folders(tmp_path, monkeypatch):
    write_imagenet32(tmp_path / "Imagenet32_val_npz", monkeypatch, "npz", **TEST)
    assert len(ready(tmp_path, "test").resident["test"].labels) == 1000


def test_validation_images_are_the_same_number_of_each_class_chosen_by_seed(tmp_path, monkeypatch):
    write_imagenet32(tmp_path, monkeypatch, "npz", ("train",), per_class=5)
    chosen = {}
    for seed in (0, 0, 1):
        data = ready(tmp_path, "fit", num_val_per_class=2, seed=seed)
        train, val = data.resident["train"], data.resident["val"]
        assert torch.bincount(val.labels).tolist() == [2] * 1000
        assert torch.bincount(train.labels).tolist() == [3] * 1000
        assert sorted(torch.cat([train.indices, val.indices]).tolist()) == list(range(5000))
        again = chosen.setdefault(seed, val.indices)
        assert torch.equal(again, val.indices)
    assert set(chosen[0].tolist()) != set(chosen[1].tolist())


def test_a_class_must_keep_images_to_train_on(tmp_path, monkeypatch):
    write_imagenet32(tmp_path, monkeypatch, "npz", ("train",), per_class=2)
    refused(r"num_val_per_class is 2, but class 'kit_fox' has 2 training images", tmp_path, "fit", num_val_per_class=2)
    refused(r"num_val_per_class is 0, which is too small", tmp_path, num_val_per_class=0)


def test_only_the_set_that_is_needed_is_converted(tmp_path, monkeypatch):
    write_imagenet32(tmp_path, monkeypatch, **TEST)
    ready(tmp_path, "test")
    assert not (tmp_path / "imagenet32_train_images.npy").exists()
    refused(r"train images are not in '.*log in at image-net\.org.*Imagenet32_train_npz\.zip", tmp_path, "fit")


def test_the_converted_file_is_mapped_and_used_without_the_archives(tmp_path, monkeypatch):
    arrays = write_imagenet32(tmp_path, monkeypatch, **TEST)
    ready(tmp_path, "test")
    before = (tmp_path / "imagenet32_val_images.npy").stat()
    (tmp_path / "Imagenet32_val_npz.zip").unlink()
    images = ready(tmp_path, "test").resident["test"].images
    assert isinstance(images, MappedImages)
    assert isinstance(images.stored.base, np.memmap)
    assert not images.stored.flags.writeable
    assert torch.equal(every(images), stored_images(arrays["val"]))
    assert (tmp_path / "imagenet32_val_images.npy").stat().st_mtime_ns == before.st_mtime_ns
    assert np.load(tmp_path / "imagenet32_val_images.npy").shape == (1000, 3, 32, 32)


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    refused("val images are not in '.*/nowhere'", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_another_folder_for_the_converted_files(tmp_path, monkeypatch):
    write_imagenet32(tmp_path / "published", monkeypatch, **TEST)
    ready(tmp_path / "published", "test", converted_dir=str(tmp_path / "new" / "converted"))
    assert [path.name for path in (tmp_path / "published").iterdir()] == ["Imagenet32_val_npz.zip"]
    assert {path.name for path in (tmp_path / "new" / "converted").iterdir()} >= {
        "imagenet32_val_images.npy",
        "imagenet32_val_labels.npy",
        "imagenet32_val.json",
    }


@pytest.mark.parametrize("place", ["/proc/bioprop", "file/below"])
def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, place):
    write_imagenet32(tmp_path, monkeypatch, **TEST)
    (tmp_path / "file").write_text("")
    refused("cannot be converted into .*name a folder .* converted_dir", tmp_path, converted_dir=tmp_path / place)


def convert_in_a_process(folder, delay, results):
    """Converts with a pause in the middle, and says how often this process did so."""
    read, calls = imagenet32_files.read_part, []

    def slow(*args):
        calls.append(args)
        (folder / "started").touch()
        time.sleep(delay)
        return read(*args)

    imagenet32_files.read_part = slow
    data = ImageNet32(str(folder), verify=False)
    data.setup("test")
    results.put((len(calls), len(data.resident["test"].labels)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
class TestProcesses:
    @pytest.fixture
    def start(self, tmp_path, monkeypatch):
        write_imagenet32(tmp_path, monkeypatch, classes=20, **TEST)
        context = multiprocessing.get_context("fork")
        results, started = context.Queue(), []

        def begin(delay):
            process = context.Process(target=convert_in_a_process, args=(tmp_path, delay, results))
            process.start()
            started.append(process)
            return process

        yield begin, results
        for process in started:
            process.kill()
            process.join()

    @staticmethod
    def wait_for(path):
        end = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.02)

    def test_of_two_at_once_one_converts_and_the_other_waits(self, tmp_path, start, caplog, monkeypatch):
        begin, results = start
        process = begin(2.0)
        self.wait_for(tmp_path / "started")
        monkeypatch.setattr(imagenet32_files, "read_part", lambda *args: pytest.fail("converted twice"))
        with caplog.at_level(logging.INFO):
            assert len(ready(tmp_path, "test", verify=False).resident["test"].labels) == 20
        assert "Another process is converting the val images of ImageNet 32x32: waiting for it." in caplog.messages
        assert results.get(timeout=60) == (1, 20)
        process.join()

    def test_one_that_is_killed_neither_blocks_nor_leaves_half_a_file(self, tmp_path, start):
        begin, _ = start
        process = begin(60.0)
        self.wait_for(tmp_path / "started")
        assert (tmp_path / "imagenet32_val_images.npy.part").exists()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert (tmp_path / "imagenet32_val_images.npy.part").exists()
        assert len(ready(tmp_path, "test", verify=False).resident["test"].labels) == 20
        assert not list(tmp_path.glob("*.part"))


def test_what_an_earlier_version_converted_is_read(tmp_path):
    """The files and the record as version 0.1 wrote them."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (1000, 3, 32, 32), dtype=np.uint8), rng.permutation(1000)
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (1000, 3, 32, 32), }"
    (tmp_path / "imagenet32_val_images.npy").write_bytes(header.ljust(127) + b"\n" + images.tobytes())
    np.save(tmp_path / "imagenet32_val_labels.npy", labels)
    record = {"images": 1000, "verified": True, "source": {"Imagenet32_val_npz.zip": [3075691, 1795791274532527438]}}
    (tmp_path / "imagenet32_val.json").write_text(json.dumps(record, indent=2))
    data = ready(tmp_path, "test")
    assert torch.equal(every(data.resident["test"].images), torch.from_numpy(images))
    assert data.resident["test"].labels.tolist() == labels.tolist()


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    write_imagenet32(tmp_path, monkeypatch, "npz", ("train",))
    read = imagenet32_files.read_part

    def interrupted(part):
        if part.name.endswith("_5.npz"):
            raise KeyboardInterrupt
        return read(part)

    monkeypatch.setattr(imagenet32_files, "read_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ready(tmp_path, "fit")
    assert not list(tmp_path.glob("imagenet32_*"))
    monkeypatch.setattr(imagenet32_files, "read_part", read)
    ready(tmp_path, "fit")


def test_train_statistics_are_those_of_the_training_images(tmp_path, monkeypatch):
    arrays = write_imagenet32(tmp_path, monkeypatch, "npz", ("train",))
    monkeypatch.setattr("bioprop.datamodules.images.BLOCK", 300)
    data = ready(tmp_path, "fit", normalization="train")
    mean, std = data.statistics(torch.device("cpu"))
    images = stored_images(arrays["train"])[data.resident["train"].indices].double() / 255
    torch.testing.assert_close(mean.double(), images.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.double(), images.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)


def test_blocks_of_mapped_images_come_in_the_order_of_the_file():
    stored = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1)
    images = MappedImages(stored, torch.tensor([40, 3, 17, 5]))
    assert torch.cat([block for _, block in blocks(images)]).flatten().tolist() == [3, 5, 17, 40]
    assert images.index_select(0, torch.tensor([2, 0])).flatten().tolist() == [17, 40]


def test_images_copied_to_a_device_are_the_same_in_the_same_order(monkeypatch):
    monkeypatch.setattr("bioprop.datamodules.images.BLOCK", 7)
    stored = np.arange(100, dtype=np.uint8).reshape(50, 2, 1, 1)
    mapped = MappedImages(stored, torch.randperm(50)[:30])
    assert torch.equal(copy_to(torch.device("cpu"), mapped), every(mapped))
