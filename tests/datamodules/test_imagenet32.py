import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.models._meta import _IMAGENET_CATEGORIES

from bioprop.datamodules import ImageNet32, imagenet32_conversion
from bioprop.datamodules.imagenet32 import class_names
from bioprop.datamodules.imagenet32_files import ARCHIVES, COUNTS
from bioprop.datamodules.images import DeviceImages, MappedImages, blocks
from bioprop.errors import UserError
from tests.datamodules.published_files import imagenet32_arrays, npz, python2_pickle, write_imagenet32

TEST = {"stored": ("val",)}  # a set of one small part


def ready(folder, *stages, **kwargs):
    data = ImageNet32(str(folder), **{"num_val_per_class": 1, **kwargs})
    for stage in stages:
        data.setup(stage)
    return data


def refused(match, folder, *stages, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        ready(folder, *(stages or ("test",)), **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def every(images):
    return images.index_select(0, torch.arange(len(images)))


def stored_images(parts):
    return torch.from_numpy(np.concatenate([part["data"] for part in parts])).view(-1, 3, 32, 32)


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
    lines = (Path(imagenet32_conversion.__file__).parent / "imagenet32_classes.txt").read_text()
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


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    write_imagenet32(tmp_path, monkeypatch, **TEST)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    refused(r"needs 0\.0 GB in '.*', where 0\.0 GB are free: make room", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000_000))
    ready(tmp_path, "test")


class TestVerify:
    def test_size_and_checksum_are_compared_with_the_published(self, tmp_path, monkeypatch):
        write_imagenet32(tmp_path, monkeypatch, **TEST)
        archive = tmp_path / "Imagenet32_val_npz.zip"
        raw = archive.read_bytes()
        archive.write_bytes(raw + b"\0")
        refused(r"is [\d,]+ bytes long and the published one [\d,]+: download it again", tmp_path)
        archive.write_bytes(raw[:500] + bytes([raw[500] ^ 1]) + raw[501:])
        assert "verify to false" in refused("damaged or not the published one, by its sha256 checksum", tmp_path)
        assert not (tmp_path / "imagenet32_val_images.npy").exists()
        archive.write_bytes(raw)
        ready(tmp_path, "test")

    def test_checksums_are_computed_once(self, tmp_path, monkeypatch):
        write_imagenet32(tmp_path, monkeypatch, **TEST)
        ready(tmp_path, "test")
        monkeypatch.setattr(imagenet32_conversion, "verify", lambda *args: pytest.fail("verified again"))
        ready(tmp_path, "test")
        assert json.loads((tmp_path / "imagenet32_val.json").read_text())["verified"] is True

    def test_what_was_converted_unverified_is_verified_later_without_converting_again(self, tmp_path, monkeypatch):
        write_imagenet32(tmp_path, monkeypatch, **TEST)
        ready(tmp_path, "test", verify=False)
        before = (tmp_path / "imagenet32_val_images.npy").stat().st_mtime_ns
        ready(tmp_path, "test")
        assert (tmp_path / "imagenet32_val_images.npy").stat().st_mtime_ns == before
        assert json.loads((tmp_path / "imagenet32_val.json").read_text())["verified"] is True

    def test_other_files_are_converted_anew(self, tmp_path, monkeypatch):
        write_imagenet32(tmp_path, monkeypatch, classes=500, **TEST)
        assert len(ready(tmp_path, "test", verify=False).resident["test"].labels) == 500
        write_imagenet32(tmp_path, monkeypatch, **TEST)
        assert len(ready(tmp_path, "test", verify=False).resident["test"].labels) == 1000

    @pytest.mark.parametrize("form", ["npz", "pickle"])
    def test_unpacked_files_are_counted(self, tmp_path, monkeypatch, form):
        write_imagenet32(tmp_path, monkeypatch, form, **TEST)
        monkeypatch.setitem(COUNTS, "val", (1001,))
        refused("has 1,000 images and the published one 1,001: download it again, or set verify to false", tmp_path)
        assert len(ready(tmp_path, "test", verify=False).resident["test"].labels) == 1000


class TestDamage:
    def test_a_missing_part_is_named(self, tmp_path, monkeypatch):
        write_imagenet32(tmp_path, monkeypatch, "pickle", ("train",))
        (tmp_path / "train_data_batch_7").unlink()
        refused("train_data_batch_7' is missing, though other parts .* are there: put all 10", tmp_path, "fit")

    @pytest.mark.parametrize("form", ["npz", "pickle"])
    @pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 0.999])
    def test_cut_files(self, tmp_path, monkeypatch, form, share):
        write_imagenet32(tmp_path, monkeypatch, form, **TEST)
        (path,) = tmp_path.iterdir()
        raw = path.read_bytes()
        path.write_bytes(raw[: int(share * len(raw))])
        refused(f"'{path}' is (damaged|not a readable pickle) .*download it again", tmp_path)
        assert {file.name for file in tmp_path.iterdir()} <= {path.name, ".imagenet32_val.lock"}

    @pytest.mark.parametrize("form", ["npz.zip", "npz", "pickle.zip"])
    def test_changed_pixels_do_not_pass_the_archives_own_checksum(self, tmp_path, monkeypatch, form):
        arrays = write_imagenet32(tmp_path, monkeypatch, form, **TEST)
        (path,) = tmp_path.iterdir()
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        refused("download it again", tmp_path, verify=False)
        assert arrays

    def test_an_archive_that_is_none_or_lacks_a_part(self, tmp_path, monkeypatch):
        write_imagenet32(tmp_path, monkeypatch, **TEST)
        path = tmp_path / "Imagenet32_val_npz.zip"
        path.write_text("<html>please log in</html>")
        refused("is not a readable zip archive", tmp_path)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme", "")
        refused(r"has no 'val_data\.npz' in it", tmp_path)

    @pytest.mark.parametrize("write", [npz, pickle.dumps], ids=["npz", "pickle"])
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"data": np.zeros((1000, 12288), np.uint8)}, r"its images are uint8 \[1000, 12288\]"),
            ({"data": np.zeros((1000, 3072), np.float32)}, r"its images are float32"),
            ({"data": np.zeros((3072, 1000), np.uint8).T}, r"its images are uint8 \[1000, 3072\]"),
            ({"labels": list(range(1000))}, "its labels are from 0 to 999, not 1 to 1000"),
            ({"labels": [1] * 999}, r"it has 1000 images and labels of shape \(999,\)"),
            ({"labels": [1.5] * 1000}, "its labels are not whole numbers"),
        ],
    )
    def test_files_of_another_format(self, tmp_path, monkeypatch, write, change, reason):
        monkeypatch.setitem(COUNTS, "val", (1000,))
        (part,) = imagenet32_arrays("val")
        name = "val_data.npz" if write is npz else "val_data"
        (tmp_path / name).write_bytes(write({**part, **change}))
        message = refused(f"'.*{name}' is not a file of ImageNet 32x32, because {reason}", tmp_path, verify=False)
        assert "another size" in message

    def test_files_without_an_array(self, tmp_path):
        (tmp_path / "val_data.npz").write_bytes(npz({"labels": np.ones(3, np.int64)}))
        refused(r"damaged \(.*data\.npy", tmp_path)
        (tmp_path / "val_data.npz").unlink()
        (tmp_path / "val_data").write_bytes(pickle.dumps({"data": [1, 2]}))
        refused("it has no 'labels'", tmp_path)
        (tmp_path / "val_data").write_bytes(pickle.dumps({"data": [1, 2], "labels": [1]}))
        refused("its 'data' is no array", tmp_path)

    def test_a_converted_file_that_was_cut_is_converted_again(self, tmp_path, monkeypatch):
        arrays = write_imagenet32(tmp_path, monkeypatch, **TEST)
        ready(tmp_path, "test")
        path = tmp_path / "imagenet32_val_images.npy"
        path.write_bytes(path.read_bytes()[:-1])
        assert torch.equal(every(ready(tmp_path, "test").resident["test"].images), stored_images(arrays["val"]))

    @pytest.mark.parametrize("record", ["", "{}", '{"images": 1000}', "[]", '{"images": "a lot", "verified": true}'])
    def test_a_garbled_record_counts_as_none(self, tmp_path, monkeypatch, record):
        write_imagenet32(tmp_path, monkeypatch, **TEST)
        ready(tmp_path, "test")
        (tmp_path / "imagenet32_val.json").write_text(record)
        ready(tmp_path, "test")
        assert json.loads((tmp_path / "imagenet32_val.json").read_text())["verified"] is True


class TestPickles:
    class Malicious:
        def __init__(self, path):
            self.path = path

        def __reduce__(self):
            return os.system, (f"touch {self.path}",)

    @pytest.mark.parametrize("write", [pickle.dumps, lambda content: pickle.dumps(content, protocol=0)])
    def test_a_malicious_file_runs_nothing_and_is_refused_by_name(self, tmp_path, write):
        proof = tmp_path / "proof"
        (tmp_path / "val_data").write_bytes(write({"data": self.Malicious(proof), "labels": [1]}))
        message = refused(r"val_data' asks for (posix|os|nt)\.system, which no file of images needs", tmp_path)
        assert "nothing was run" in message
        assert not proof.exists()
        pickle.loads((tmp_path / "val_data").read_bytes())  # the plain unpickler does run it
        assert proof.exists()

    @pytest.mark.parametrize(
        ("raw", "name"),
        [
            (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
            (b"cnumpy\nload\n(S'x'\ntR.", "numpy.load"),
            (b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.", "numpy.core.multiarray.fromfile"),
            (b"c_codecs\ndecode\n(S'x'\ntR.", "_codecs.decode"),
            (b"c_codecs\nencode\n(V78\nVhex\ntR.", r"_codecs.encode\(..., 'hex'\)"),
            (b"cnumpy\ndtype\n(VO8\ntR.", r"numpy.dtype\('O8'\)"),
            (b"cnumpy\ndtype\n(VV8\ntR.", r"numpy.dtype\('V8'\)"),
        ],
    )
    def test_only_what_arrays_are_made_of_is_allowed(self, tmp_path, raw, name):
        (tmp_path / "val_data").write_bytes(raw)
        refused(f"asks for {name}, ", tmp_path)

    @pytest.mark.parametrize("raw", [b"\x80\x02]q\x00.", b"\x80\x02K\x01.", b".", b"no pickle"])
    def test_pickles_of_something_else(self, tmp_path, raw):
        (tmp_path / "val_data").write_bytes(raw)
        refused("a dictionary of images and labels is expected|is not a readable pickle", tmp_path)

    def test_numbers_of_numpy_and_either_byte_order(self, tmp_path, monkeypatch):
        monkeypatch.setitem(COUNTS, "val", (1000,))
        (part,) = imagenet32_arrays("val")
        for labels in ([np.int64(label) for label in part["labels"]], np.array(part["labels"], ">i4")):
            for write in (pickle.dumps, python2_pickle):
                (tmp_path / "val_data").write_bytes(write({**part, "labels": labels}))
                data = ready(tmp_path, "test", verify=False)
                assert (data.resident["test"].labels + 1).tolist() == part["labels"]

    def test_npz_files_are_not_unpickled(self, tmp_path):
        (part,) = imagenet32_arrays("val")
        content = {**part, "labels": np.array([self.Malicious(tmp_path / "proof")] * 1000, dtype=object)}
        (tmp_path / "val_data.npz").write_bytes(npz(content))
        refused("damaged .*allow_pickle", tmp_path)
        assert not (tmp_path / "proof").exists()


def convert_in_a_process(folder, delay, results):
    """Converts with a pause in the middle, and says how often this process did so."""
    read, calls = imagenet32_conversion.read_part, []

    def slow(*args):
        calls.append(args)
        (folder / "started").touch()
        time.sleep(delay)
        return read(*args)

    imagenet32_conversion.read_part = slow
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
        monkeypatch.setattr(imagenet32_conversion, "read_part", lambda *args: pytest.fail("converted twice"))
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


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    write_imagenet32(tmp_path, monkeypatch, "npz", ("train",))
    read = imagenet32_conversion.read_part

    def interrupted(source, part, *args):
        if part.endswith("_5.npz"):
            raise KeyboardInterrupt
        return read(source, part, *args)

    monkeypatch.setattr(imagenet32_conversion, "read_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ready(tmp_path, "fit")
    assert not list(tmp_path.glob("imagenet32_*"))
    monkeypatch.setattr(imagenet32_conversion, "read_part", read)
    ready(tmp_path, "fit")


def test_conversion_holds_no_whole_part_in_memory(tmp_path, monkeypatch):
    written = []
    read = imagenet32_conversion.read_part

    def record(source, part, scratch, write):
        return read(source, part, scratch, lambda data: written.append(len(data)) or write(data))

    monkeypatch.setattr(imagenet32_conversion, "read_part", record)
    monkeypatch.setattr("bioprop.datamodules.imagenet32_parts.CHUNK", 100_000)
    write_imagenet32(tmp_path, monkeypatch, "npz", **TEST)
    ready(tmp_path, "test")
    assert max(written) <= 100_000
    assert sum(written) == 3_072_000


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
    assert torch.cat(list(blocks(images))).flatten().tolist() == [3, 5, 17, 40]
    assert images.index_select(0, torch.tensor([2, 0])).flatten().tolist() == [17, 40]


def test_images_on_a_device_are_the_same_in_the_same_order(monkeypatch):
    monkeypatch.setattr("bioprop.datamodules.images.BLOCK", 7)
    stored = np.arange(100, dtype=np.uint8).reshape(50, 2, 1, 1)
    mapped = MappedImages(stored, torch.randperm(50)[:30])
    kept = mapped.on(torch.device("cpu"))
    assert isinstance(kept, DeviceImages)
    assert len(kept) == len(mapped) == 30
    assert kept.kept.shape == (30, 2, 1, 1)
    index = torch.randperm(30)
    assert torch.equal(kept.index_select(0, index), mapped.index_select(0, index))


class TestOnDevice:
    @staticmethod
    def on(device, folder, **kwargs):
        data = ImageNet32(str(folder), num_val_per_class=1, on_device=True, **kwargs)
        data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
        data.setup("test")
        return data.resident["test"].images

    def test_images_go_to_the_device_that_trains_and_to_no_cpu(self, tmp_path, monkeypatch):
        write_imagenet32(tmp_path, monkeypatch, **TEST)
        images = self.on("meta", tmp_path, limit_test=30)
        assert isinstance(images, DeviceImages)
        assert images.kept.shape == (30, 3, 32, 32)
        assert images.index_select(0, torch.arange(4)).device.type == "meta"
        assert isinstance(self.on("cpu", tmp_path), MappedImages)

    def test_too_small_a_device_is_a_sentence(self, tmp_path, monkeypatch):
        def fail(self, device):
            raise torch.OutOfMemoryError("CUDA out of memory")

        write_imagenet32(tmp_path, monkeypatch, **TEST)
        monkeypatch.setattr(MappedImages, "on", fail)
        with pytest.raises(UserError, match=r"on_device needs 0\.0 GB of free memory on meta: set it to false"):
            self.on("meta", tmp_path)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_batches_put_together_on_a_gpu_are_those_of_the_file(self, tmp_path, monkeypatch):
        write_imagenet32(tmp_path, monkeypatch, **TEST)
        kept = self.on("cuda", tmp_path)
        mapped = ready(tmp_path, "test").resident["test"].images
        index = torch.randperm(1000)
        assert torch.equal(kept.index_select(0, index).cpu(), mapped.index_select(0, index))
