"""Test suites for algorithms, networks and data of one's own: inherit one, override what it asks for, run pytest."""

from pkgutil import iter_modules

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in iter_modules(__path__)))

from bioprop.testing.algorithms import AlgorithmContract  # noqa: E402
from bioprop.testing.data import DataModuleContract  # noqa: E402
from bioprop.testing.difference_reconstruction import DifferenceReconstructionContract  # noqa: E402
from bioprop.testing.networks import NetworkContract  # noqa: E402
from bioprop.testing.target_propagation import TargetPropagationContract  # noqa: E402

__all__ = [
    "AlgorithmContract",
    "DataModuleContract",
    "DifferenceReconstructionContract",
    "NetworkContract",
    "TargetPropagationContract",
]
