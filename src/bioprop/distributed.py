"""Training in several processes: what they exchange, and the strategy that starts them.

Every process holds the whole model and sees its rows of every batch. Algorithms average gradients themselves, not by
hooks of autograd: they form many gradients a batch, most of them in closed form.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from bioprop.errors import UserError
from bioprop.launching import WatchfulLauncher

#: Longest time that a process waits for the others: the longest that one of them may be busy alone (converting a data
#: set, say). A process that died is noticed at once where it closed its connections, within seconds on one machine.
PATIENCE = timedelta(minutes=30)
#: Seconds between two looks at whether the process that started this one still lives.
WATCH_SECONDS = 2.0
#: Seconds that a process other than the first waits before it says what went wrong: the first says it for all, unless
#: it was not the same for all.
AFTER_THE_FIRST = 3.0
#: What the libraries underneath say where another process is gone.
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "Timed out")
#: Environment variable that tells processes which one started them.
LAUNCHER = "BIOPROP_LAUNCHER"


def process_count() -> int:
    """Number of processes that train together, 1 unless a process group was set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Number of this process among them, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


@torch.no_grad()
def mean_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Average tensors over all processes, in one exchange; every process gets the same bits.

    Args:
        tensors: of the same shapes and order in every process.

    Returns:
        The means in the memory layout of the tensors; with one process the tensors themselves.
    """
    count = process_count()
    if count == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    return _unflatten(flat.div_(count), tensors)


@torch.no_grad()
def from_process(source: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return one process's tensors in all processes, in one exchange.

    Args:
        source: rank of that process.
        tensors: there the values to send; elsewhere tensors of the same shapes and order.
    """
    if process_count() == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.broadcast(flat, source)
    return _unflatten(flat, tensors)


def _unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [torch.empty_like(each).copy_(part.view(each.shape)) for each, part in zip(like, parts, strict=True)]


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Put together a batch of which each process has ``rows[rank::processes]``, as `ResidentLoader` hands them out.

    Args:
        rows: ``[own rows, ...]``; the last rows of a batch may be missing in some processes.

    Returns:
        ``[all rows, ...]`` in the order of the batch, in every process.
    """
    count = process_count()
    if count == 1:
        return rows
    lengths = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(count)]
    dist.all_gather(lengths, torch.tensor([len(rows)], device=rows.device))
    most = int(max(lengths))
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[: int(sum(lengths))]


class LostProcessError(UserError):
    """Another process has ended, or hangs."""


def is_lost_process(error: BaseException) -> bool:
    """Whether an exchange failed because another process is gone."""
    return isinstance(error, RuntimeError) and process_count() > 1 and any(sign in str(error) for sign in GONE)


def wait_for_the_first() -> None:
    """Leave the first process time to say what went wrong, and to end this one."""
    if process_rank():
        time.sleep(AFTER_THE_FIRST)


class GradientAveraging(DDPStrategy):
    """One process a device; algorithms average their gradients themselves (`mean_over_processes`).

    Lightning's own DDP hooks into autograd's backward pass, and algorithms here have none or many a batch: processes
    would drift apart silently. This strategy brings all to the same initial state and leaves the rest to the algorithm.
    ``--trainer.devices N`` chooses it by itself; in Python, give ``Trainer(strategy=GradientAveraging())``.

    Args:
        settings: of Lightning's `DDPStrategy`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**({"timeout": PATIENCE} | settings))

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if self.cluster_environment is not None and not self.cluster_environment.creates_processes_externally:
            self._launcher = WatchfulLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
            os.environ[LAUNCHER] = str(os.getpid())

    def setup_distributed(self) -> None:
        """Join the other processes; one that the first process started ends when that does."""
        if os.environ.get(LAUNCHER) == str(os.getppid()):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # as in `conduct`, for scripts
            _end_with_parent()
        super().setup_distributed()
        if isinstance(self._launcher, WatchfulLauncher):
            self._launcher.have_met = True
        atexit.register(_leave)  # gloo's threads must not outlive the interpreter, which would abort

    def configure_ddp(self) -> None:
        """Give every process the weights and buffers of the first, in place of wrapping the model."""
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            if tensor.device.type == self.root_device.type:
                dist.broadcast(tensor, 0)
            else:  # counters that stay on the CPU, which NCCL does not reach
                tensor.copy_(self.broadcast(tensor))

    def on_exception(self, exception: BaseException) -> None:
        """End the processes that this one started: they would wait for it, unless all were told to stop."""
        super().on_exception(exception)
        if isinstance(exception, SIGTERMException):
            return
        if isinstance(self._launcher, WatchfulLauncher):
            for process in self._launcher.procs:
                process.kill()


def _leave() -> None:
    if process_count() > 1:
        dist.destroy_process_group()


def _end_with_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        pause = threading.Event()
        while os.getppid() == parent:
            pause.wait(WATCH_SECONDS)
        # no clean-up: the main thread may wait in an exchange that never comes
        sys.stderr.write("bioprop: error: this process ends, since the one that started it has ended\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def refuse_strangers(world_size: int) -> None:
    """Compare the number of processes that a trainer counts on with what torchrun has started.

    Raises:
        UserError: if they differ: each process would train alone.
    """
    started = int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else world_size
    if started != world_size:
        raise UserError(
            f"torchrun started {started} processes, but the trainer counts on {world_size}: give --trainer.devices "
            "(for each node) and --trainer.num_nodes as torchrun has them"
        )


@contextmanager
def averaging_for_several_devices() -> Iterator[None]:
    """Make `GradientAveraging` what a trainer built within the context takes for more than one device."""
    name = "ddp"
    lightnings = dict(StrategyRegistry[name])
    StrategyRegistry.register(name, GradientAveraging, override=True, start_method="popen")
    try:
        yield
    finally:
        StrategyRegistry[name] = lightnings
