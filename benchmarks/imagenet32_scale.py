"""ImageNet 32x32 at its full size, without the images: conversion, memory of several processes, images a second.

Writes an archive of noise in the published format (3.7 GB), converts it (3.94 GB), measures, and deletes both:

    python -m benchmarks.imagenet32_scale --folder /where/there/are/12/GB
"""

import argparse
import os
import pickle
import shutil
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import IO

import numpy as np
import torch

from bioprop.datamodules import ImageNet32
from bioprop.datamodules.imagenet32_files import find_source, open_converted
from bioprop.experiments.environment import processor

BATCH = 256
PARTS = 10


def write_published(folder: Path, images: int, form: str) -> None:
    """Writes training files of noise: an archive of compressed npz files, or unpacked pickles.

    Args:
        folder: Where to.
        images: How many in all.
        form: "npz" or "pickle".
    """
    rng = np.random.default_rng(0)
    cuts = np.array_split(np.arange(images) % 1000 + 1, PARTS)
    for number, labels in enumerate(cuts, 1):
        # of 190 values, so that it can be compressed by about as much as the published images
        data = rng.integers(0, 190, (len(labels), 3072), dtype=np.uint8)
        content = {"data": data, "labels": rng.permutation(labels), "mean": data[:1000].mean(0)}
        name = f"train_data_batch_{number}"
        if form == "pickle":
            with (folder / name).open("wb") as file:
                pickle.dump({**content, "labels": content["labels"].tolist()}, file)
            continue
        with (
            zipfile.ZipFile(folder / "Imagenet32_train_npz.zip", "a") as outer,
            outer.open(f"{name}.npz", "w", force_zip64=True) as member,
        ):
            _write_npz(member, content)


def _write_npz(file: IO[bytes], content: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in content.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def memory(*fields: str) -> dict[str, float]:
    """Returns fields of this process's memory in MB: Rss counts shared pages in full, Pss a share of them."""
    text = Path("/proc/self/smaps_rollup").read_text() + Path("/proc/self/status").read_text()
    values = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if line.endswith(" kB")}
    return {field: int(values[field]) * 1024 / 1e6 for field in fields}


def seconds(run: Callable[[], object]) -> float:
    """Times one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ready(folder: Path, **arguments: object) -> ImageNet32:
    """Returns the data module with training and validation images set up."""
    data = ImageNet32(str(folder), verify=False, **arguments)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def batches(data: ImageNet32, augmented: bool) -> Iterator[object]:
    """Gives batches of an epoch in random order, as the loader makes them or as an algorithm gets them."""
    for batch in data.train_dataloader():
        yield data.on_after_batch_transfer(batch, 0) if augmented else batch


def rate(data: ImageNet32, augmented: bool, count: int) -> float:
    """Returns images a second of so many batches, after the first."""
    source = batches(data, augmented)
    next(source)
    return count * BATCH / seconds(lambda: deque(islice(source, count), maxlen=0))


def forget(path: Path) -> None:
    """Asks the operating system to drop a file from its cache."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def _work(folder: Path, count: int, rank: int, together: Barrier, results: object) -> None:
    torch.set_num_threads(1)
    before = memory("Rss", "Pss")
    data = ready(folder, seed=rank)
    images = rate(data, True, count)
    together.wait()
    results.put((before, memory("Rss", "Pss", "Pss_Anon", "Pss_File"), images))  # type: ignore[attr-defined]
    together.wait()


def processes(folder: Path, number: int, count: int) -> list[tuple[dict[str, float], dict[str, float], float]]:
    """Lets several processes loop over batches at once.

    Returns:
        For each, its memory before the images, after `count` batches, and its images a second.
    """
    context = get_context("spawn")
    together, results = context.Barrier(number), context.Queue()
    started = [context.Process(target=_work, args=(folder, count, rank, together, results)) for rank in range(number)]
    for process in started:
        process.start()
    measured = [results.get() for _ in started]
    for process in started:
        process.join()
    return measured


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument(
        "--published", type=Path, help="write the published files there, if they are not, and keep them"
    )
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--form", choices=("npz", "pickle"), default="npz")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--batches", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="imagenet32_", dir=options.folder))
    try:
        for line in report(folder, options):
            print(line, flush=True)  # noqa: T201
    finally:
        shutil.rmtree(folder)


def alone(function: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """Runs a function in a process of its own; returns its seconds and by how many MB it raised the peak of memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_alone, function, *arguments).result()


def _alone(function: Callable[..., object], *arguments: object) -> tuple[float, float]:
    before = memory("VmHWM")["VmHWM"]
    return seconds(lambda: function(*arguments)), memory("VmHWM")["VmHWM"] - before


def _statistics(folder: Path) -> None:
    ready(folder, normalization="train").statistics(torch.device("cpu"))


def report(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Gives the lines of the report as they are measured."""
    yield f"{options.images:,} images, {processor()}, torch {torch.__version__}, one thread a process"
    published = options.published or folder
    published.mkdir(parents=True, exist_ok=True)
    if not find_source(published, "train"):
        took, _ = alone(write_published, published, options.images, options.form)
        yield f"writing the published files: {took:.0f} s"
    took, peak = alone(open_converted, published, folder, "train", False)
    yield f"converting from {options.form}: {took:.1f} s, {peak:.0f} MB of memory"
    forget(folder / "imagenet32_train_images.npy")
    yield f"random order, file not in the cache: {rate(ready(folder), False, options.batches):,.0f} images a second"
    took, _ = alone(_statistics, folder)
    yield f"setup and statistics of the training images: {took:.0f} s"
    yield f"setup without them: {seconds(lambda: ready(folder)):.1f} s"
    for augmented in (False, True):
        kind = "cropped, flipped, normalised" if augmented else "as stored"
        yield f"random order, {kind}: {rate(ready(folder), augmented, options.batches):,.0f} images a second"
    for number in (1, options.processes):
        yield f"{number} process(es), MB each (before the images; with them: all, its share, of which not of the file):"
        for start, end, images in processes(folder, number, options.batches):
            yield (
                f"  {start['Rss']:.0f} RSS {start['Pss']:.0f} PSS; {end['Rss']:.0f} RSS, {end['Pss']:.0f} PSS, "
                f"{end['Pss_Anon']:.0f} anonymous; {images:,.0f} images a second"
            )


if __name__ == "__main__":
    main()
