"""Recording feedback training, with a stand-in for CUDA graphs: it repeats the call on the recorded tensors."""

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import LDRL
from bioprop.feedback.recorded import Recorded, Replay
from bioprop.testing.helpers import changed, copy_state, draw_batch, small_lenet


class StandIn:
    """Records by remembering the function; counts recordings and replays."""

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.recordings, self.replays = device, 0, 0

    def __call__(self, function: Callable[[], Tensor], generator: torch.Generator) -> tuple[Replay, Tensor]:
        self.recordings += 1
        result = torch.zeros((), device=self.device)

        def replay() -> None:
            self.replays += 1
            result.copy_(function())

        return replay, result


def refuse(function: Callable[[], Tensor], generator: torch.Generator) -> tuple[Replay, Tensor]:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.fixture
def record_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[LDRL], StandIn]:
    def install(algorithm: LDRL) -> StandIn:
        backend = StandIn()
        training = algorithm.feedback_training
        training._recorded = defaultdict(lambda: Recorded(backend))
        monkeypatch.setattr(training, "_may_record", lambda *_: True)
        return backend

    return install


RULES: dict[str, dict[str, Any]] = {
    "echo": {},
    "expected": {"second_noise": "expected"},
    "sgd": {"second_noise": "independent", "noise": 0.1, "feedback_lr": 1e-3, "feedback_step": "sgd"},
    "normalized": {"second_noise": "independent", "noise": 0.1, "feedback_lr": 1e-3},
}


@pytest.mark.parametrize("rule", RULES)
def test_recorded_training_equals_training_one_by_one(rule: str, record_on_cpu: Callable[[LDRL], StandIn]) -> None:
    runs = []
    for recorded in (False, True):
        torch.manual_seed(0)
        algorithm = LDRL(small_lenet(), **({} if rule == "echo" else {"iterations": 3}), **RULES[rule])
        backend = record_on_cpu(algorithm) if recorded else None
        losses = [algorithm.train_feedback(draw_batch(seed=batch)[0]) for batch in range(4)]
        runs.append((copy_state(algorithm.feedback), losses))
        if backend is not None:
            assert (backend.recordings, backend.replays) == (3, 9)  # three stages; the first batch runs one by one
    assert changed(runs[0][0], runs[1][0]) == set()
    assert all(torch.equal(a[name], b[name]) for a, b in zip(runs[0][1], runs[1][1], strict=True) for name in a)


def test_another_batch_size_is_recorded_anew(record_on_cpu: Callable[[LDRL], StandIn]) -> None:
    algorithm = LDRL(small_lenet(), iterations=1)
    backend = record_on_cpu(algorithm)
    for size in (8, 8, 5, 8, 8):
        algorithm.train_feedback(draw_batch(size)[0])
    assert (backend.recordings, backend.replays) == (6, 6)


def test_what_cannot_be_recorded_runs_one_by_one_after_one_warning() -> None:
    recorded, calls = Recorded(refuse), []

    def double(values: Tensor) -> Tensor:
        calls.append(1)
        return 2 * values

    with pytest.warns(UserWarning, match="not recorded as a CUDA graph .operation not permitted when stream is cap"):
        results = [recorded(double, [torch.tensor(3.0)], torch.Generator()) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results.append(recorded(double, [torch.tensor(3.0)], torch.Generator()))
    assert results == [6.0] * 3
    assert len(calls) == 3


def test_another_precision_is_recorded_anew(record_on_cpu: Callable[[LDRL], StandIn]) -> None:
    algorithm = LDRL(small_lenet(), iterations=1)
    backend = record_on_cpu(algorithm)
    for reduced in (False, False, True, True, False, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            algorithm.train_feedback(draw_batch()[0])
    assert (backend.recordings, backend.replays) == (9, 9)
