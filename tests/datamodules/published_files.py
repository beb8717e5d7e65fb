"""Writes small files in the exact formats that the published data sets have."""

import gzip
import hashlib
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import scipy.io
from torchvision import datasets

from bioprop import datamodules
from bioprop.datamodules import CIFAR10, CIFAR100, imagenet32_files


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, name: str = "CIFAR10", train: int = 200) -> Path:
    """Writes CIFAR-10 or CIFAR-100 as pickled batches, with `train` training images, 40 or 200 test images."""
    cls = getattr(datasets, name)
    classes, key = (CIFAR10.class_names, "labels") if name == "CIFAR10" else (CIFAR100.class_names, "fine_labels")
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(file: str, content: dict) -> list[str]:
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    def batch(file: str, count: int) -> list[str]:
        rows = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [number % len(classes) for number in range(count)]
        extra = {} if name == "CIFAR10" else {"coarse_labels": [0] * count}
        return write(file, {"data": rows, key: labels, "batch_label": file, "filenames": [], **extra})

    parts = [file for file, _ in cls.train_list]
    test = 4 * len(classes) if name == "CIFAR10" else 2 * len(classes)
    monkeypatch.setattr(cls, "train_list", [batch(file, train // len(parts)) for file in parts])
    monkeypatch.setattr(cls, "test_list", [batch(file, test) for file, _ in cls.test_list])
    names = "label_names" if name == "CIFAR10" else "fine_label_names"
    file, md5 = write(cls.meta["filename"], {names: list(classes)})
    monkeypatch.setattr(cls, "meta", {"filename": file, "key": names, "md5": md5})
    return root


def write_idx(path: Path, array: np.ndarray) -> str:
    """Writes bytes in the idx format, compressed, and returns the MD5 sum of the file."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_mnist(root: Path, monkeypatch: pytest.MonkeyPatch, name: str = "MNIST", train: int = 200) -> Path:
    """Writes MNIST, FashionMNIST or KMNIST as compressed idx files, with `train` training and 40 test images."""
    cls = getattr(datasets, name)
    folder = root / getattr(datamodules, name).folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    resources = []
    for file, _ in cls.resources:
        count = train if file.startswith("train") else 40
        labels = np.arange(count, dtype=np.uint8) % 10
        array = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8) if "images" in file else labels
        resources.append((file, write_idx(folder / file, array)))
    monkeypatch.setattr(cls, "resources", resources)
    return root


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch, train: int = 200) -> Path:
    """Writes SVHN as MATLAB files (version 5), in which the digit 0 has the label 10, with 40 test images."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    files = {}
    for split, count in (("train", train), ("test", 40)):
        url, file, _ = datasets.SVHN.split_list[split]
        pixels = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None]
        scipy.io.savemat(root / file, {"X": pixels, "y": labels}, do_compression=True)
        files[split] = [url, file, hashlib.md5((root / file).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", files)
    return root


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes what Python 2 and the numpy of its day wrote: byte strings, and `numpy.core`."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, text: str | bytes) -> None:
        raw = text.encode("latin1") if isinstance(text, str) else text
        short = len(raw) < 256
        self.write((b"U" + bytes([len(raw)]) if short else b"T" + struct.pack("<i", len(raw))) + raw)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, obj: object, name: str | None = None) -> None:
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{name or obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch[type(write_idx)] = dispatch[type(len)] = dispatch[type] = save_global


def python2_pickle(content: object) -> bytes:
    """Returns the bytes that Python 2 would have written."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


PICKLES = {
    "python2": python2_pickle,
    "python3": pickle.dumps,
    "protocol 2": lambda content: pickle.dumps(content, protocol=2),
    "protocol 5": lambda content: pickle.dumps(content, protocol=5),
}


def npz(content: dict) -> bytes:
    """Returns the bytes of a compressed npz file."""
    file = io.BytesIO()
    np.savez_compressed(file, **content)
    return file.getvalue()


def imagenet32_arrays(stored: str, classes: int = 1000, per_class: int = 2) -> list[dict]:
    """Draws the parts of ImageNet 32x32: ten with a mean for training, one without for validation."""
    rng = np.random.default_rng(len(stored))
    count = classes * (per_class if stored == "train" else 1)
    labels = rng.permutation(np.arange(count) % classes) + 1
    data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    cuts = np.array_split(np.arange(count), 10 if stored == "train" else 1)
    mean = {"mean": data.mean(0)} if stored == "train" else {}
    return [{"data": data[cut], "labels": labels[cut].tolist(), **mean} for cut in cuts]


def write_imagenet32(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str = "npz.zip",
    stored: tuple[str, ...] = ("train", "val"),
    pickled: str = "python3",
    **sizes: int,
) -> dict[str, list[dict]]:
    """Writes ImageNet 32x32 in one of its forms, "npz.zip", "npz", "pickle.zip" or "pickle", and makes it the official.

    Returns:
        The arrays of each part of each set.
    """
    root.mkdir(parents=True, exist_ok=True)
    arrays = {name: imagenet32_arrays(name, **sizes) for name in stored}
    for name, parts in arrays.items():
        kind = form.removesuffix(".zip")
        write = npz if kind == "npz" else PICKLES[pickled]
        stems = [f"train_data_batch_{n}" for n in range(1, 11)] if name == "train" else ["val_data"]
        files = {stem + (".npz" if kind == "npz" else ""): write(part) for stem, part in zip(stems, parts, strict=True)}
        if form.endswith(".zip"):
            archive = root / f"Imagenet32_{name}{'_npz' if kind == 'npz' else ''}.zip"
            with zipfile.ZipFile(archive, "w") as opened:
                for file, raw in files.items():
                    opened.writestr(f"{archive.stem}/{file}", raw)
            digest = hashlib.sha256(archive.read_bytes()).hexdigest()
            if kind == "npz":
                monkeypatch.setitem(imagenet32_files.ARCHIVES, archive.name, (archive.stat().st_size, digest))
        else:
            for file, raw in files.items():
                (root / file).write_bytes(raw)
        monkeypatch.setitem(imagenet32_files.COUNTS, name, tuple(len(part["data"]) for part in parts))
    return arrays
