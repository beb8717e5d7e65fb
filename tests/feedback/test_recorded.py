"""Recording feedback training, with a stand-in for CUDA graphs: it repeats the call on the recorded tensors."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from bioprop.algorithms import LDRL
from bioprop.feedback.noise import NoiseStream
from bioprop.feedback.recorded import Recorded
from bioprop.testing.helpers import changed, copy_state, draw_batch, small_lenet


class StandIn:
    """Records by remembering the function; its result is written over by the next replay, as a graph's is."""

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.recordings, self.replays = device, 0, 0

    def __call__(self, function: Callable[[], Any], generators: Sequence[torch.Generator]) -> Callable[[], Any]:
        self.recordings += 1
        results: list[Any] = []

        def replay() -> Any:
            self.replays += 1
            fresh = function()
            if not results:
                results.append(tree_map_only(Tensor, torch.clone, fresh))
            for kept, new in zip(tree_leaves(results[0]), tree_leaves(fresh), strict=True):
                if isinstance(kept, Tensor):
                    kept.copy_(new)
            return results[0]

        return replay


def refuse(function: Callable[[], Any], generators: Sequence[torch.Generator]) -> Callable[[], Any]:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.fixture
def record_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[LDRL], StandIn]:
    def install(algorithm: LDRL) -> StandIn:
        backend = StandIn()
        training = algorithm.feedback_training
        training._recorded = defaultdict(lambda: Recorded(training.streams, backend))
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


def test_another_batch_size_leaves_the_recording(record_on_cpu: Callable[[LDRL], StandIn]) -> None:
    algorithm = LDRL(small_lenet(), iterations=1)
    backend = record_on_cpu(algorithm)
    for size in (8, 8, 5, 8, 8):
        algorithm.train_feedback(draw_batch(size)[0])
    assert (backend.recordings, backend.replays) == (3, 9)  # three stages; the smaller batch comes once


def test_what_cannot_be_recorded_runs_one_by_one_after_one_warning() -> None:
    recorded, calls = Recorded(None, refuse), []

    def double(values: Tensor) -> Tensor:
        calls.append(1)
        return 2 * values

    with pytest.warns(UserWarning, match="not recorded as a CUDA graph .operation not permitted when stream is cap"):
        results = [recorded(double, [torch.tensor(3.0)]) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results.append(recorded(double, [torch.tensor(3.0)]))
    assert results == [6.0] * 3
    assert len(calls) == 3


def test_kinds_of_calls_are_told_apart_and_the_latest_kept() -> None:
    backend = StandIn()
    recorded = Recorded(None, backend)
    for kind in (1, 2, 1, 2, 1):
        assert recorded(lambda values, kind=kind: kind * values, [torch.ones(2)], kind).tolist() == [kind, kind]
    assert (backend.recordings, backend.replays) == (2, 3)
    for kind in range(3, 8):
        recorded(lambda values: values, [torch.ones(2)], kind)
    recorded(lambda values: values, [torch.ones(2)], 1)
    assert backend.recordings == 2  # the first was forgotten


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

    def __call__(self, function: Callable[[], Any], generators: Sequence[torch.Generator]) -> Callable[[], Any]:
        recorded = super().__call__(function, generators)
        if self.recordings == self.fails_at:
            self.broken += generators
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
            algorithm.feedback_training._recorded = defaultdict(partial(Recorded, algorithm.streams, backend))
            monkeypatch.setattr(algorithm.feedback_training, "_may_record", lambda *_: True)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            losses += [algorithm.train_feedback(draw_batch(seed=batch)[0]) for batch in range(1, 5)]
        assert [str(each.message) for each in said] == recorded * [
            "training is not recorded as a CUDA graph (operation not permitted when stream is capturing)"
        ]
        runs.append((copy_state(algorithm.feedback), losses))
    assert backend.recordings == fails_at  # none is tried after it
    assert backend.replays == fails_at - 1
    assert changed(runs[0][0], runs[1][0]) == set()
    assert all(torch.equal(a[name], b[name]) for a, b in zip(runs[0][1], runs[1][1], strict=True) for name in a)


def test_another_precision_has_a_recording_of_its_own(record_on_cpu: Callable[[LDRL], StandIn]) -> None:
    algorithm = LDRL(small_lenet(), iterations=1)
    backend = record_on_cpu(algorithm)
    for reduced in (False, False, True, True, False, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            algorithm.train_feedback(draw_batch()[0])
    assert (backend.recordings, backend.replays) == (6, 12)
