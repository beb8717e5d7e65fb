"""Recording feedback training, with a stand-in for CUDA graphs: it repeats the call on the recorded tensors."""

import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import LDRL
from bioprop.feedback.noise import NoiseStream
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
    noise = NoiseStream(torch.Generator(), torch.float32)

    def double(_: NoiseStream, values: Tensor) -> Tensor:
        calls.append(1)
        return 2 * values

    with pytest.warns(UserWarning, match="not recorded as a CUDA graph .operation not permitted when stream is cap"):
        results = [recorded(double, [torch.tensor(3.0)], noise) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results.append(recorded(double, [torch.tensor(3.0)], noise))
    assert results == [6.0] * 3
    assert len(calls) == 3


class Breaking(StandIn):
    """Fails at one of the recordings as CUDA does: the generator is lost, and the last word is vague."""

    def __init__(self, fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.fails_at, self.broken = fails_at, list[torch.Generator]()
        draws = NoiseStream._values

        def values(stream: NoiseStream, count: int, sigma: float) -> Tensor:
            if any(stream.generator is each for each in self.broken):
                raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
            return draws(stream, count, sigma)

        monkeypatch.setattr(NoiseStream, "_values", values)

    def __call__(self, function: Callable[[], Tensor], generator: torch.Generator) -> tuple[Replay, Tensor]:
        recorded = super().__call__(function, generator)
        if self.recordings == self.fails_at:
            self.broken.append(generator)
            try:
                raise RuntimeError("operation not permitted when stream is capturing")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        return recorded


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_a_recording_that_fails_changes_no_number(rule: str, fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, backend = [], Breaking(fails_at, monkeypatch)
    for recorded in (False, True):
        torch.manual_seed(0)
        algorithm = LDRL(small_lenet(), **({} if rule == "echo" else {"iterations": 3}), **RULES[rule])
        losses = [algorithm.train_feedback(draw_batch(seed=0)[0])]
        if recorded:
            algorithm.feedback_training._recorded = defaultdict(partial(Recorded, backend))
            monkeypatch.setattr(algorithm.feedback_training, "_may_record", lambda *_: True)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            losses += [algorithm.train_feedback(draw_batch(seed=batch)[0]) for batch in range(1, 5)]
        assert [str(each.message) for each in said] == recorded * [
            "feedback training is not recorded as a CUDA graph (operation not permitted when stream is capturing)"
        ]
        runs.append((copy_state(algorithm.feedback), losses))
    assert backend.recordings == fails_at  # none is tried after it
    assert backend.replays == fails_at - 1
    assert changed(runs[0][0], runs[1][0]) == set()
    assert all(torch.equal(a[name], b[name]) for a, b in zip(runs[0][1], runs[1][1], strict=True) for name in a)


def test_another_precision_is_recorded_anew(record_on_cpu: Callable[[LDRL], StandIn]) -> None:
    algorithm = LDRL(small_lenet(), iterations=1)
    backend = record_on_cpu(algorithm)
    for reduced in (False, False, True, True, False, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            algorithm.train_feedback(draw_batch()[0])
    assert (backend.recordings, backend.replays) == (9, 9)
