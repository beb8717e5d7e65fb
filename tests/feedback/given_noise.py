"""Noise that a test hands in, and the rules that it is for."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from bioprop.feedback.noise import ALONE, Rule, SecondNoise


class GivenNoise:
    """Stands in for a stream of noise.

    Args:
        normals: standard normals, in the order in which they are asked for.
    """

    def __init__(self, normals: Iterable[Tensor]) -> None:
        self.normals = iter(normals)

    def draw(self, sigma: float, *shapes: Sequence[int]) -> list[Tensor]:
        drawn = [sigma * next(self.normals) for _ in shapes]
        assert [each.shape for each in drawn] == [tuple(shape) for shape in shapes]
        return drawn


def rule_of(second_noise: SecondNoise, sigma: float, clean_switches: bool = True) -> Rule:
    """Noise on the whole batch, layer by layer, in one process."""
    return Rule(second_noise, clean_switches, sigma, True, True, 1, ALONE)
