"""What a GPU would be asked to do, without one: torch's fake tensors know where everything lies, and hold no values.

So a tensor left on the CPU, a copy between the two, or a host that waits for a result (``.item()``, a mask that
selects) is an error here; any of them would keep a stage from being recorded as a CUDA graph.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bioprop.algorithms import DTP, LDRL, ParallelLDRL
from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.feedback.losses import FeedbackGradient
from bioprop.feedback.noise import RandomStreams
from bioprop.feedback.recorded import Recorded
from bioprop.feedback.speed import Speed
from bioprop.feedback.training import FeedbackTraining, StageBatch
from bioprop.networks.network import Network
from bioprop.testing.helpers import NETWORKS, SHAPE, on_every_network
from tests.feedback.test_recorded import StandIn

BATCH = 8
INDEPENDENT = {"second_noise": "independent", "noise": 0.1, "feedback_lr": 0.01}
METHODS: dict[str, tuple[type[TargetAlgorithm], dict[str, Any]]] = {
    "L-DRL": (LDRL, {}),
    "echo with numbers": (LDRL, {"noise": 0.1, "feedback_lr": 0.05}),
    "expected": (LDRL, {"second_noise": "expected"}),
    "independent": (LDRL, INDEPENDENT),
    "L-DRL as published": (LDRL, INDEPENDENT | {"mirror": "paper", "switches": "noisy", "feedback_step": "sgd"}),
    "bfloat16": (LDRL, {"speed": Speed(bfloat16=True)}),
    "parallel": (ParallelLDRL, {"samples": 2}),
    "DTP": (DTP, {}),
}
#: Those that share most of their path with another.
VARIANTS = ("echo with numbers", "independent", "bfloat16")


class NothingOnTheHost(TorchDispatchMode):
    """Count operations; refuse those that read a tensor of the CPU, or make one."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        seen = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        assert all(each.is_cuda for each in seen), f"{function} of or to the CPU"
        self.operations += 1
        return result


@contextmanager
def on_a_simulated_gpu(algorithm: TargetAlgorithm) -> Iterator[None]:
    """Move an algorithm to a GPU that is not there, but for the counters of its noise, which stay on the CPU."""
    algorithm.streams = algorithm.feedback_training.streams = Counters()
    with FakeTensorMode():
        for module in algorithm.modules():
            for kept in (module._parameters, module._buffers):
                kept.update({name: moved(tensor) for name, tensor in kept.items() if tensor is not None})
        algorithm.feedback_training.restart()
        for group in (
            algorithm.feedback_training.optimizer.param_groups if algorithm.feedback_training.optimizer else []
        ):
            group["fused"], group["foreach"] = False, False  # fake tensors know no fused step
        yield


def moved(tensor: Tensor) -> Tensor:
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there


class Counters(RandomStreams):
    """Counters that are plain numbers: the real ones are tensors of the CPU that are read there."""

    def __init__(self) -> None:
        super().__init__()
        del self._buffers["seed"], self._buffers["batches"]
        self.seed, self.batches = 7, 0  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def device_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let generators of a GPU be made, and drawn from, without one."""

    class Generator:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def manual_seed(self, seed: int) -> "Generator":
            return self

        def initial_seed(self) -> int:
            return 0

    normal = Tensor.normal_
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(Tensor, "normal_", lambda self, mean, sigma, generator=None: normal(self, mean, sigma))


def make(method: str, build: Callable[[], Network]) -> TargetAlgorithm:
    algorithm, settings = METHODS[method]
    return algorithm(build(), iterations=3, **settings)


def draw_batch() -> tuple[Tensor, Tensor]:
    images = torch.empty(BATCH, *SHAPE, device="cuda").contiguous(memory_format=torch.channels_last)
    return images, torch.empty(BATCH, dtype=torch.int64, device="cuda")


@on_every_network
@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else []) for name in METHODS]
)
def test_a_batch_stays_on_the_gpu(method: str, build: Callable[[], Network]) -> None:
    algorithm, backend = make(method, build), StandIn("cuda")
    algorithm.feedback_training._recorded = defaultdict(lambda: Recorded(algorithm.streams, backend))
    with on_a_simulated_gpu(algorithm):
        algorithm._learn(*draw_batch())  # copies constants and makes momentum, which stay
        with NothingOnTheHost() as watched:
            for _ in range(2):
                losses, gradients = algorithm._learn(*draw_batch())
    assert losses.keys() == algorithm.feedback.keys()
    assert gradients.forward.keys() == dict(algorithm.network.named_parameters()).keys()
    assert watched.operations > 0
    recorded = len(algorithm.feedback)
    assert (backend.recordings, backend.replays) == (recorded, 2 * recorded)


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_recorded_step_stays_on_the_gpu(method: str) -> None:
    algorithm, backend = make(method, NETWORKS["lenet"]), StandIn("cuda")
    with on_a_simulated_gpu(algorithm):
        step = Recorded(algorithm.streams, backend)
        step(algorithm._learn, draw_batch())
        with NothingOnTheHost() as watched:
            for _ in range(2):
                losses, gradients = step(algorithm._learn, draw_batch())
    assert losses.keys() == algorithm.feedback.keys()
    assert gradients.forward.keys() == dict(algorithm.network.named_parameters()).keys()
    assert watched.operations > 0
    assert (backend.recordings, backend.replays) == (1, 2)
    assert algorithm.streams.batches == 3


@pytest.mark.parametrize("fault", [Tensor.item, Tensor.cpu, Tensor.nonzero, lambda loss: loss + torch.ones(1)])
def test_a_host_that_waits_is_noticed(fault: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = make("L-DRL", NETWORKS["lenet"])
    step = FeedbackTraining._step

    def faulty(self: FeedbackTraining, each: StageBatch, gradient: FeedbackGradient) -> None:
        step(self, each, gradient)
        fault(gradient.loss)

    monkeypatch.setattr(FeedbackTraining, "_step", faulty)
    refused = pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException))
    with on_a_simulated_gpu(algorithm), NothingOnTheHost(), refused:
        algorithm._learn(*draw_batch())
