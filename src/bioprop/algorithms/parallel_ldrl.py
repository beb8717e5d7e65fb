"""Parallel L-DRL: several samples of noise for each step."""

from typing import Any

from bioprop.algorithms.ldrl import LDRL
from bioprop.networks.network import Network
from bioprop.ranges import count


class ParallelLDRL(LDRL):
    """L-DRL whose feedback weights step along the mean over several samples of noise.

    A variant in the program of Ernoult et al. (ICML 2022), not in their paper. Loss, second noise and targets are those
    of `LDRL`. There, in one iteration and with independent noise, the mean over ``samples`` draws takes the place of
    many noisy steps; with an echo, whose noise vanishes at the solution, a single draw will do.

    Args:
        network: the forward network.
        samples: draws of the noise that the gradient of a step is the mean of, at least 1.
        settings: the other arguments of `LDRL`.

    Raises:
        UserError: if a hyperparameter is out of its range, a list has the wrong length, or a stage has no mirror.
    """

    recordable = True

    def __init__(self, network: Network, samples: int = 1, **settings: Any) -> None:
        super().__init__(network, **settings)
        self.feedback_training.samples = count("samples", samples, 1)
