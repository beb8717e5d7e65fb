"""The exchanges of processes that train together.

Every process holds the whole model and sees its rows of every batch. Algorithms average gradients themselves, not by
hooks of autograd: they form many gradients a batch, most of them in closed form.
"""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bioprop.errors import UserError

#: Seconds that a process other than the first waits before it says what went wrong: the first says it for all, unless
#: it was not the same for all.
AFTER_THE_FIRST = 3.0
#: What the libraries underneath say where another process is gone.
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "Timed out")


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
