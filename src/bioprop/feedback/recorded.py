"""Recording of a function as a CUDA graph, replayed without launching its kernels one by one."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bioprop.functional.precision import products_are_reduced

Replay = Callable[[], None]


class Backend(Protocol):
    """A way to record a function: CUDA graphs, or a stand-in where there is no GPU."""

    def __call__(self, function: Callable[[], Tensor], generator: torch.Generator) -> tuple[Replay, Tensor]:
        """Record a call; return what repeats it and the tensor its result is written to."""


def cuda_graph(function: Callable[[], Tensor], generator: torch.Generator) -> tuple[Replay, Tensor]:
    """Record on a GPU. The generator may be seeded anew between replays.

    Raises:
        RuntimeError: if the function does something that cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


class Recorded:
    """Runs a function of tensors: one by one at first, recorded from the second call on with the same shapes.

    The first call creates what outlives a call (momentum, the choice of kernels), so that the recording finds it there.
    Where recording fails, a warning says why, and all further calls run one by one.

    Args:
        backend: how the function is recorded.
    """

    def __init__(self, backend: Backend = cuda_graph) -> None:
        self._backend = backend
        self._shapes: list[Any] | None = None
        self._inputs: list[Tensor | None] = []
        self._recording: tuple[Replay, Tensor] | None = None
        self._failed = False

    def __call__(
        self,
        function: Callable[..., Tensor],
        arguments: Sequence[Tensor | None],
        generator: torch.Generator,
    ) -> Tensor:
        """Return ``function(*arguments)``.

        Args:
            function: of the arguments, of tensors that stay where they are (parameters), and of the generator.
            arguments: what changes from call to call.
            generator: seeded for this call.
        """
        shapes: list[Any] = [each if each is None else (each.shape, each.stride(), each.dtype) for each in arguments]
        shapes.append(products_are_reduced())
        if self._failed or shapes != self._shapes:
            self._shapes, self._recording = shapes, None
            return function(*arguments)
        if self._recording is None:
            self._inputs = [each if each is None else each.clone() for each in arguments]
            try:
                self._recording = self._backend(lambda: function(*self._inputs), generator)
            except RuntimeError as error:
                self._failed = True
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"feedback training is not recorded as a CUDA graph ({reason})", stacklevel=2)
                return function(*arguments)
        for kept, fresh in zip(self._inputs, arguments, strict=True):
            if kept is not None and fresh is not None:
                kept.copy_(fresh)
        replay, result = self._recording
        replay()
        return result.clone()
