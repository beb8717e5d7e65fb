"""A pool of two processes that train together over gloo, started once for all tests that need one."""

import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COUNT = 2
SECONDS = 120


class ProcessPool:
    """Runs a function in every process at once.

    Args:
        folder: an empty folder, where the processes find each other.
    """

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(COUNT)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_work, args=(rank, str(folder / "meeting"), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call an importable function with the same arguments in every process; return the results by rank."""
        for connection in self._connections:
            connection.send((function, arguments))
        results = []
        for rank, connection in enumerate(self._connections):
            assert connection.poll(SECONDS), f"process {rank} does not answer"
            succeeded, result = connection.recv()
            assert succeeded, f"in process {rank}: {result}"
            results.append(result)
        return results

    def close(self) -> None:
        """End the processes."""
        for connection, process in zip(self._connections, self._processes, strict=True):
            connection.close()
            process.join(10)
            process.kill()


def _work(rank: int, meeting: str, connection: Connection) -> None:
    # Lightning takes these as a sign that it need not start any processes
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(COUNT)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=COUNT)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


_POOL = pytest.StashKey[ProcessPool]()


def shared_pool(request: pytest.FixtureRequest) -> ProcessPool:
    """Return the pool of this test run, which is started once and ends with the run."""
    stash = request.config.stash
    if _POOL not in stash:
        folders: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
        stash[_POOL] = ProcessPool(folders.mktemp("processes"))
        request.config.add_cleanup(stash[_POOL].close)
    return stash[_POOL]
