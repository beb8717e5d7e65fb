"""Recording of a function as a CUDA graph, replayed without launching its kernels one by one."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bioprop.feedback.noise import NoiseStream
from bioprop.functional.precision import products

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
    # the outer context goes back to the stream of before, which a failed recording does not
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


class Recorded:
    """Runs a function of noise and tensors: one by one at first, recorded from the second call with the same shapes.

    The first call creates what outlives a call (momentum, the choice of kernels), so that the recording finds it there.
    A recording draws its noise from a generator of its own. Where recording fails that generator is lost with it; a
    warning says why, and that call and all further ones run one by one.

    Args:
        backend: how the function is recorded.

    Attributes:
        failed: whether a recording has failed.
    """

    def __init__(self, backend: Backend = cuda_graph) -> None:
        self._backend = backend
        self._shapes: list[Any] | None = None
        self._inputs: list[Tensor | None] = []
        self._noise: NoiseStream | None = None
        self._recording: tuple[Replay, Tensor] | None = None
        self.failed = False

    def __call__(
        self,
        function: Callable[..., Tensor],
        arguments: Sequence[Tensor | None],
        noise: NoiseStream,
    ) -> Tensor:
        """Return ``function(noise, *arguments)``.

        Args:
            function: of the noise, of the arguments, and of tensors that stay where they are (parameters).
            arguments: what changes from call to call.
            noise: of this call, with nothing drawn yet.
        """
        shapes: list[Any] = [each if each is None else (each.shape, each.stride(), each.dtype) for each in arguments]
        shapes.append(products.reduced)
        if self.failed or shapes != self._shapes:
            self._shapes, self._noise, self._recording = shapes, None, None
            return function(noise, *arguments)
        seed = noise.generator.initial_seed()
        if self._noise is None or self._recording is None:
            self._inputs = [each if each is None else each.clone() for each in arguments]
            generator = torch.Generator(noise.generator.device).manual_seed(seed)
            recorded = self._noise = NoiseStream(generator, noise.dtype)
            try:
                self._recording = self._backend(lambda: function(recorded, *self._inputs), generator)
            except RuntimeError as error:
                self.failed, self._noise, self._inputs = True, None, []
                warnings.warn(f"feedback training is not recorded as a CUDA graph ({_reason(error)})", stacklevel=2)
                return function(noise, *arguments)
        for kept, fresh in zip(self._inputs, arguments, strict=True):
            if kept is not None and fresh is not None:
                kept.copy_(fresh)
        self._noise.generator.manual_seed(seed)
        replay, result = self._recording
        replay()
        return result.clone()


def _reason(error: BaseException) -> str:
    """The first line of the first error: those that follow it say only that the recording had failed already."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
