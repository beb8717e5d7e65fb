"""Noise: a function of seed, batch and place alone, normally distributed, and independent between them."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from bioprop.algorithms import LDRL
from bioprop.feedback.noise import NoiseStream, RandomStreams
from bioprop.testing.helpers import draw_batch, small_lenet

CPU = torch.device("cpu")
KEY = (2**30 + 5, 17, 3)


def stream(key: tuple[int, int, int] = KEY, dtype: torch.dtype = torch.float32, rank: int = 0) -> NoiseStream:
    streams = RandomStreams()
    streams.seed.fill_(key[0])
    streams.batches.fill_(key[1])
    return streams.noise(key[2], torch.zeros(1, dtype=dtype), rank)


def draw(key: tuple[int, int, int] = KEY, skipped: int = 0, count: int = 16, sigma: float = 1.0) -> Tensor:
    """After so many draws before it."""
    made = stream(key)
    for _ in range(skipped):
        made.draw(sigma, (count,))
    return made.draw(sigma, (count,))[0]


def test_no_two_of_many_streams_are_the_same() -> None:
    """Keys that differ in one part by one, keys with parts swapped, keys of one bit; ranks."""
    bits = [1 << place for place in range(31)]
    keys = {*product((0, 1, 2), repeat=3), *((bit, 0, 0) for bit in bits), *((0, bit, 0) for bit in bits)}
    keys |= {(5, batch, place) for batch in range(400) for place in range(4)}
    seen = {tuple(draw(key, skipped).tolist()) for key in keys for skipped in (0, 1, 2)}
    seen |= {tuple(stream(rank=rank).draw(1.0, (16,))[0].tolist()) for rank in (1, 2, 3)}
    assert len(seen) == 3 * len(keys) + 3


@pytest.mark.parametrize("key", [KEY, (0, 0, 0), (1, 2**31, 7)])
def test_noise_is_normal(key: tuple[int, int, int]) -> None:
    """Five standard errors of each moment; Kolmogorov and Smirnov's distance; the tails."""
    count = 400_000
    values = draw(key, 1, count, 0.3).double().numpy() / 0.3
    errors = np.sqrt(np.array([1.0, 2.0, 6.0, 24.0]) / count)
    moments = np.array([values.mean(), values.var() - 1.0, stats.skew(values), stats.kurtosis(values)])
    assert (np.abs(moments) < 5 * errors).all()
    assert stats.kstest(values, "norm").pvalue > 1e-4
    for limit in (2.0, 3.0, 4.0):
        expected = count * stats.norm.sf(limit)
        for tail in ((values > limit).sum(), (values < -limit).sum()):
            assert abs(tail - expected) < 5 * np.sqrt(expected) + 1


def correlation(first: Tensor, second: Tensor) -> float:
    """In standard errors."""
    return float(np.corrcoef(first.double(), second.double())[0, 1] * np.sqrt(len(first)))


def test_nothing_is_correlated() -> None:
    """Neighbours, halves, iterations, batches, stages, seeds; the values and their squares."""
    count = 200_000
    one = draw(KEY, 0, count)
    half = count // 2
    pairs = [(one[:-1], one[1:]), (one[:-2], one[2:]), (one[:half], one[half:])]
    others = [(KEY, 1), *((tuple(part + (place == axis) for place, part in enumerate(KEY)), 0) for axis in range(3))]
    pairs += [(one, draw(*other, count)) for other in others]
    for first, second in pairs:
        for power in (1, 2):
            assert abs(correlation(first**power, second**power)) < 5.0


def test_images_come_channels_last_and_in_their_shape() -> None:
    images, rows = stream(dtype=torch.float64).draw(1.0, (4, 3, 5, 6), (7, 2))
    assert images.shape == (4, 3, 5, 6)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert rows.shape == (7, 2)
    assert images.dtype == rows.dtype == torch.float64
    assert not set(images.flatten().tolist()) & set(rows.flatten().tolist())


def test_sigma_scales() -> None:
    torch.testing.assert_close(draw(sigma=0.25), 0.25 * draw(sigma=1.0))


def test_counters_stay_on_the_cpu_and_as_they_are(tmp_path: Path) -> None:
    streams = RandomStreams()
    for _ in range(3):
        streams.next_batch()
    moved = streams.double().to("meta")
    assert moved.batches.device == moved.seed.device == CPU
    assert moved.batches.dtype is torch.int64
    assert int(moved.batches) == 3

    other = RandomStreams()
    torch.save(streams.state_dict(), tmp_path / "streams.pt")
    assert int(other.seed) != int(streams.seed)
    other.load_state_dict(torch.load(tmp_path / "streams.pt"))
    like = torch.zeros(1)
    drawn = [each.noise(2, like).draw(1.0, (20,))[0] for each in (streams, other)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("settings", "noises"),
    [
        ({"second_noise": "independent", "noise": 0.1, "feedback_lr": 0.1}, 3 * 3 * 2),  # stages, iterations, noises
        ({"second_noise": "expected"}, 3 * 3),
        ({}, 3 + 2 + 2),  # of two stages, the second iteration is along the activities
    ],
    ids=["independent", "expected", "echo"],
)
def test_every_batch_stage_and_iteration_draws_its_own(
    settings: dict[str, Any], noises: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    original = NoiseStream.draw

    def record(self: NoiseStream, sigma: float, *shapes: tuple[int, ...]) -> list[Tensor]:
        values = original(self, sigma, *shapes)
        drawn.extend(each.flatten()[:8] / sigma for each in values)
        return values

    monkeypatch.setattr(NoiseStream, "draw", record)
    algorithm = LDRL(small_lenet(), iterations=3, **settings)
    for _ in range(2):
        algorithm.train_feedback(draw_batch()[0])
    assert len(drawn) == 2 * noises  # batches
    rounded = torch.stack([each[:8] for each in drawn]).mul(1e4).round()
    assert len(rounded.unique(dim=0)) == len(drawn)


def test_both_noises_of_an_iteration_are_independent() -> None:
    first, second = stream().draw(1.0, (100_000,), (100_000,))
    assert abs(correlation(first, second)) < 5.0
