"""L-DRL on a GPU prepares several iterations at once; here a stand-in says that it is on one."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import LDRL, ParallelLDRL
from bioprop.algorithms import ldrl as module
from bioprop.algorithms.layerwise_feedback import FeedbackIteration
from bioprop.algorithms.random_streams import NoiseStream
from bioprop.functional import first_terms
from tests.algorithms.contract import changed, copy_state, draw_batch, small_lenet
from tests.algorithms.test_recorded import StandIn, record_on_cpu

__all__ = ["record_on_cpu"]  # the fixture
ITERATIONS = 5
Groups = list[tuple[int, int]]
Run = tuple[dict[str, Tensor], list[dict[str, Tensor]]]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Groups:
    """As on a GPU; the first iteration and the number of every group of iterations prepared at once."""
    monkeypatch.setattr(LDRL, "_works_ahead", staticmethod(lambda clean: True))
    found: Groups = []
    draw = module._draw_group

    def noted(noise: NoiseStream, sigma: float, shapes: Any, iteration: int, count: int) -> list[Tensor]:
        found.append((iteration, count))
        return draw(noise, sigma, shapes, iteration, count)

    monkeypatch.setattr(module, "_draw_group", noted)
    return found


@pytest.fixture
def groups_of_single_draws(monkeypatch: pytest.MonkeyPatch) -> Groups:
    """The same, where a group's noise is what its iterations draw one by one on a CPU."""
    found: Groups = []

    def draw(noise: NoiseStream, sigma: float, shapes: Sequence[Sequence[int]], first: int, count: int) -> list[Tensor]:
        found.append((first, count))
        drawn = [[each.clone() for each in noise.draw(first + number, sigma, *shapes)] for number in range(count)]
        return [torch.cat(parts) for parts in zip(*drawn, strict=True)]

    monkeypatch.setattr(module, "_draw_group", draw)
    return found


def make(algorithm: type[LDRL] = LDRL, **settings: Any) -> LDRL:
    torch.manual_seed(3)
    return algorithm(small_lenet(), **{"iterations": ITERATIONS, "feedback_lr": 0.01} | settings)


def train(algorithm: LDRL, batches: int = 2) -> Run:
    images = [draw_batch(seed=seed)[0].to(next(algorithm.parameters()).dtype) for seed in range(batches)]
    losses = [algorithm.train_feedback(each) for each in images]
    return copy_state(algorithm.feedback), losses


def assert_equal(one: Run, other: Run) -> None:
    assert changed(one[0], other[0]) == set()
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one[1], other[1], strict=True) for name in a)


@pytest.mark.parametrize("algorithm", [LDRL, ParallelLDRL])
@pytest.mark.parametrize("step", ["sgd", "normalized"])
def test_a_batch_learns_what_it_learns_one_by_one(
    algorithm: type[LDRL], step: str, groups_of_single_draws: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, losses = train(make(algorithm, feedback_step=step).double())
    assert groups_of_single_draws == []
    monkeypatch.setattr(LDRL, "_works_ahead", staticmethod(lambda clean: True))
    monkeypatch.setattr(first_terms, "GROUP_BYTES", 3 * 8 * draw_batch()[0].numel())
    found, found_losses = train(make(algorithm, feedback_step=step).double())
    assert len(groups_of_single_draws) > 2 * 3  # more than one a stage and batch
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-11, atol=1e-13)
    for here, there in zip(found_losses, losses, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("samples", "expected"), [(None, 5), (4, 20)])
def test_groups_reach_to_the_last_draw_of_the_batch(samples: int | None, expected: int, groups: Groups) -> None:
    """Small maps: all of it is one group, for each of three stages."""
    train(make() if samples is None else make(ParallelLDRL, samples=samples), batches=1)
    assert groups == [(0, expected)] * 3


def test_memory_for_less_than_two_iterations_goes_one_by_one(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_terms, "GROUP_BYTES", 1)
    found = train(make())
    assert groups == []
    monkeypatch.setattr(LDRL, "_works_ahead", staticmethod(lambda clean: False))
    assert_equal(found, train(make()))


def test_on_a_cpu_nothing_is_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ldrl_in_groups", None)
    train(make())
    on_cpu, on_gpu = (SimpleNamespace(inputs=SimpleNamespace(is_cuda=is_cuda)) for is_cuda in (False, True))
    assert not LDRL._works_ahead(on_cpu)
    assert LDRL._works_ahead(on_gpu)


def test_groups_are_recorded(groups: Groups, record_on_cpu: Callable[[LDRL], StandIn]) -> None:
    runs = []
    for recorded in (False, True):
        algorithm = make()
        backend = record_on_cpu(algorithm) if recorded else None
        runs.append(train(algorithm, batches=4))
        if backend is not None:
            assert (backend.recordings, backend.replays) == (3, 9)
    assert_equal(*runs)
    assert groups == [(0, ITERATIONS)] * 24


def test_observers_see_every_iteration_and_change_none(groups: Groups) -> None:
    runs, seen = [], []

    def observe(event: FeedbackIteration) -> None:
        seen.append((event.stage, event.iteration, float(event.angle)))

    for watched in (False, True):
        algorithm = make()
        with algorithm.observe_feedback(observe) if watched else nullcontext():
            runs.append(train(algorithm, batches=1))
    assert_equal(*runs)
    assert [event[:2] for event in seen] == [(name, i) for name in ("conv2", "fc1", "fc2") for i in range(ITERATIONS)]
    assert len({angle for _, _, angle in seen}) == len(seen)  # after each step, not after each group
