"""What ImageNet32 does with published files that are damaged, incomplete, others or malicious."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from bioprop.datamodules import imagenet32_files
from bioprop.datamodules.imagenet32_files import COUNTS
from tests.datamodules.imagenet32_helpers import TEST, every, ready, refused, stored_images
from tests.datamodules.published_files import imagenet32_arrays, npz, python2_pickle, write_imagenet32


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
        monkeypatch.setattr(imagenet32_files, "verify", lambda *args: pytest.fail("verified again"))
        ready(tmp_path, "test")
        assert json.loads((tmp_path / "imagenet32_val.json").read_text())["verified"] is True

    def test_what_was_converted_unverified_is_verified_later(self, tmp_path, monkeypatch):
        write_imagenet32(tmp_path, monkeypatch, **TEST)
        ready(tmp_path, "test", verify=False)
        assert json.loads((tmp_path / "imagenet32_val.json").read_text())["verified"] is False
        ready(tmp_path, "test")
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
        refused(f"'{path}' is (damaged|no pickled dictionary of arrays) .*download it again", tmp_path)
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
            ({"data": np.zeros((1000, 12288), np.uint8)}, r"data, uint8 \[1000, 12288\], and labels, int64 \[1000\]"),
            ({"data": np.zeros((1000, 3072), np.float32)}, r"data, float32"),
            ({"labels": list(range(1000))}, r"whole numbers from 1 to 1000 \[images\], but"),
            ({"labels": [1] * 999}, r"data, uint8 \[1000, 3072\], and labels, int64 \[999\]"),
            ({"labels": [1.5] * 1000}, r"labels, float64 "),
        ],
    )
    def test_files_of_another_format(self, tmp_path, monkeypatch, write, change, reason):
        monkeypatch.setitem(COUNTS, "val", (1000,))
        (part,) = imagenet32_arrays("val")
        name = "val_data.npz" if write is npz else "val_data"
        (tmp_path / name).write_bytes(write({**part, **change}))
        message = refused(f"'.*{name}' is not a file of ImageNet 32x32, which holds .*{reason}", tmp_path, verify=False)
        assert "another size" in message

    @pytest.mark.parametrize("write", [npz, pickle.dumps], ids=["npz", "pickle"])
    def test_images_stored_column_by_column(self, tmp_path, monkeypatch, write):
        monkeypatch.setitem(COUNTS, "val", (1000,))
        (part,) = imagenet32_arrays("val")
        name = "val_data.npz" if write is npz else "val_data"
        (tmp_path / name).write_bytes(write({**part, "data": np.asfortranarray(part["data"])}))
        images = ready(tmp_path, "test", verify=False).resident["test"].images
        assert torch.equal(every(images), stored_images([part]))

    def test_files_without_an_array(self, tmp_path):
        (tmp_path / "val_data.npz").write_bytes(npz({"labels": np.ones(3, np.int64)}))
        refused(r"damaged \(.*data\.npy", tmp_path)
        (tmp_path / "val_data.npz").unlink()
        (tmp_path / "val_data").write_bytes(pickle.dumps({"data": [1, 2]}))
        refused(r"but data, int64 \[2\], and labels, object \[\]", tmp_path)

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
        message = refused(r"val_data' .*asks for (posix|os|nt)\.system, which no file of images needs", tmp_path)
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
            (b"cnumpy\ndtype\n(VO8\ntR.", r"numpy.dtype\('O8'\)"),
            (b"cnumpy\ndtype\n(VV8\ntR.", r"numpy.dtype\('V8'\)"),
        ],
    )
    def test_only_what_arrays_are_made_of_is_allowed(self, tmp_path, raw, name):
        (tmp_path / "val_data").write_bytes(raw)
        refused(f"asks for {name}, ", tmp_path)

    @pytest.mark.parametrize(
        "raw", [b"\x80\x02]q\x00.", b"\x80\x02K\x01.", b".", b"no pickle", b"c_codecs\nencode\n(V78\nVhex\ntR."]
    )
    def test_pickles_of_something_else(self, tmp_path, raw):
        (tmp_path / "val_data").write_bytes(raw)
        refused("is no pickled dictionary of arrays", tmp_path)

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
