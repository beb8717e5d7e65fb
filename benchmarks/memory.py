"""Peak memory of a whole step, in a process that does nothing else."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks.settings import Setting
from benchmarks.variants import VARIANTS
from bioprop.experiments.costs import PeakMemory


def peak_memory(setting: Setting, variant: str, threads: int) -> tuple[float, float]:
    """Measure a step with one feedback iteration a stage, in a fresh process.

    Returns:
        Peak memory in MiB, and how much of it came on top of the process with the network and the batch in memory.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_measure, setting.short(), variant, threads).result()


def _measure(setting: Setting, variant: str, threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    learner = VARIANTS[variant].make(setting)
    images, labels = setting.draw()
    memory = PeakMemory(torch.device("cpu"))
    before = memory.read()
    for _ in range(2):  # momentum is there from the second step on
        learner.step(images, labels)
    after = memory.read()
    return after, after - before
