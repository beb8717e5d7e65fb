"""Time of a whole L-DRL step in several processes, by how they share feedback training.

    python -m benchmarks.processes

Every round times a step of one process with all threads, one with its share of them, then each way of sharing in
processes that are started once and wait in between, on the same batch of noise images.
"""

from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from benchmarks.learners import Learner, algorithm_learner
from benchmarks.settings import PUBLISHED
from bioprop.feedback.speed import DEFAULT_SPEED, Sharing

WAYS: tuple[Sharing, ...] = get_args(Sharing)


def measure(
    network: Literal["simplevgg", "lenet"] = "simplevgg", processes: int = 2, threads: int = 2, rounds: int = 3
) -> None:
    """Time and print the table.

    Args:
        network: name of the network, which has the published settings.
        processes: number of processes that share the work.
        threads: number of threads of all processes together.
        rounds: timed rounds.
    """
    alone = algorithm_learner(PUBLISHED[network].ldrl())
    batch = PUBLISHED[network].draw()
    algorithm_learner(PUBLISHED[network].short().ldrl()).step(*batch)
    counts = threads, threads // processes
    names = [f"one process, {count} thread(s)" for count in counts]
    names += [f"{processes} processes share {way}" for way in WAYS]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with TemporaryDirectory() as folder:
        connections = _start(network, processes, threads // processes, Path(folder) / "meeting")
        for _ in range(rounds):
            runs = iter(seconds.values())
            for count in counts:
                torch.set_num_threads(count)
                next(runs).append(_seconds(alone, *batch))
            for way in WAYS:
                for connection in connections:
                    connection.send(way)
                next(runs).append(max(connection.recv() for connection in connections))
        for connection in connections:
            connection.close()
    first = median(next(iter(seconds.values())))
    title = f"L-DRL on {network}, batch {PUBLISHED[network].batch}, {threads} threads, {rounds} rounds"
    table = Table("", "seconds a step", "share of one process", title=title)
    for name, times in seconds.items():
        table.add_row(name, f"{median(times):.2f}", f"{median(times) / first:.2f}")
    Console().print(table)


def _start(network: str, processes: int, threads: int, meeting: Path) -> list[Connection]:
    context = mp.get_context("spawn")
    pipes = [context.Pipe() for _ in range(processes)]
    for rank, (_, theirs) in enumerate(pipes):
        arguments = network, rank, processes, threads, str(meeting), theirs
        context.Process(target=_work, args=arguments, daemon=True).start()
    return [ours for ours, _ in pipes]


def _work(network: str, rank: int, processes: int, threads: int, meeting: str, connection: Connection) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    setting = PUBLISHED[network]
    images, labels = (tensor[rank::processes] for tensor in setting.draw())
    learners = {way: algorithm_learner(setting.ldrl(speed=replace(DEFAULT_SPEED, processes=way))) for way in WAYS}
    for way in WAYS:  # what is allocated once, in little time
        short = setting.short().ldrl(speed=replace(DEFAULT_SPEED, processes=way))
        algorithm_learner(short).step(images, labels)
    while True:
        try:
            way = connection.recv()
        except EOFError:
            return
        dist.barrier()
        connection.send(_seconds(learners[way], images, labels))


def _seconds(learner: Learner, images: torch.Tensor, labels: torch.Tensor) -> float:
    start = perf_counter()
    learner.step(images, labels)
    return perf_counter() - start


if __name__ == "__main__":
    auto_cli(measure)
