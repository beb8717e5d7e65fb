"""Recording of a function as a CUDA graph, replayed without launching its kernels one by one."""

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bioprop.feedback.noise import RandomStreams
from bioprop.functional.precision import products

#: Kinds of calls that are remembered, the latest: batches of an epoch, its smaller last one, and some more.
KEPT = 4


class Backend(Protocol):
    """A way to record a function: CUDA graphs, or a stand-in where there is no GPU."""

    def __call__(self, function: Callable[[], Any], generators: Sequence[torch.Generator]) -> Callable[[], Any]:
        """Record a call; return what repeats it and hands out its result, in the same tensors every time."""


def cuda_graph(function: Callable[[], Any], generators: Sequence[torch.Generator]) -> Callable[[], Any]:
    """Record on a GPU. The generators may be seeded anew between replays.

    Raises:
        RuntimeError: if the function does something that cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    # the outer context goes back to the stream of before, which a failed recording does not; what other threads do on
    # the GPU, such as loading the next batch, is no part of this
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        result = function()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


@dataclass
class _Call:
    """What is known of calls of one kind.

    Attributes:
        ranks: of the processes whose generators were asked for, by number of the generator.
        batches: how far a call moves the generators on.
        inputs: tensors that the recording reads.
        generators: that it draws from.
        replay: the recording, once there is one.
    """

    ranks: Mapping[int, int]
    batches: int
    inputs: list[Tensor | None] = field(default_factory=list)
    generators: dict[int, torch.Generator] = field(default_factory=dict)
    replay: Callable[[], Any] | None = None


class Recorded:
    """Runs functions of tensors: one by one at first, recorded from the second call of a kind.

    The first call creates what outlives a call (momentum, the choice of kernels), so that the recording finds it there.
    A recording draws from generators of its own, seeded for every call as those of `RandomStreams` are. Where recording
    fails they are lost with it; a warning says why, and that call and all further ones run one by one.

    Args:
        streams: where the functions draw from; None where they draw nothing.
        backend: how a function is recorded.

    Attributes:
        failed: whether a recording has failed.
    """

    def __init__(self, streams: RandomStreams | None, backend: Backend = cuda_graph) -> None:
        self._streams, self._backend = streams, backend
        self._calls: dict[Hashable, _Call] = {}
        self.failed = False

    def clear(self) -> None:
        """Forget all recordings."""
        self._calls.clear()

    def __call__(self, function: Callable[..., Any], arguments: Sequence[Tensor | None], kind: Hashable = ()) -> Any:
        """Return ``function(*arguments)``: tensors, which the next call may overwrite.

        Args:
            function: of the arguments, and of tensors that stay where they are (parameters).
            arguments: what changes from call to call.
            kind: whatever else a recording depends on; together with the shapes it tells calls apart.
        """
        shapes = [each if each is None else (each.shape, each.stride(), each.dtype) for each in arguments]
        key = (*shapes, products.reduced, kind)
        call = self._calls.get(key)
        if self.failed:
            return function(*arguments)
        if call is None:
            return self._first(key, function, arguments)
        if call.replay is None and not self._record(call, function, arguments):
            return function(*arguments)
        assert call.replay is not None
        for kept, fresh in zip(call.inputs, arguments, strict=True):
            if kept is not None and fresh is not None:
                kept.copy_(fresh)
        if self._streams is None:
            return call.replay()
        for number, generator in call.generators.items():
            generator.manual_seed(self._streams.seed_of(number, call.ranks[number]))
        with self._streams.given_by(call.generators):
            result = call.replay()
        self._streams.batches += call.batches
        return result

    def _first(self, key: Hashable, function: Callable[..., Any], arguments: Sequence[Tensor | None]) -> Any:
        if self._streams is None:
            result, call = function(*arguments), _Call({}, 0)
        else:
            before = int(self._streams.batches)
            with self._streams.watched() as asked:
                result = function(*arguments)
            call = _Call(asked, int(self._streams.batches) - before)
        for oldest in list(self._calls)[: len(self._calls) + 1 - KEPT]:
            del self._calls[oldest]
        self._calls[key] = call
        return result

    def _record(self, call: _Call, function: Callable[..., Any], arguments: Sequence[Tensor | None]) -> bool:
        """Record a call; return whether that went well."""
        call.inputs = [each if each is None else each.clone() for each in arguments]
        device = next(each.device for each in arguments if each is not None)
        try:
            if self._streams is None:
                call.replay = self._backend(lambda: function(*call.inputs), [])
                return True
            call.generators = {
                number: torch.Generator(device).manual_seed(self._streams.seed_of(number, rank))
                for number, rank in call.ranks.items()
            }
            with self._streams.given_by(call.generators):
                call.replay = self._backend(lambda: function(*call.inputs), list(call.generators.values()))
        except RuntimeError as error:
            self.failed = True
            self.clear()
            warnings.warn(f"training is not recorded as a CUDA graph ({_reason(error)})", stacklevel=4)
            return False
        return True


def _reason(error: BaseException) -> str:
    """The first line of the first error: those that follow it say only that the recording had failed already."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
