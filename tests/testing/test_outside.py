"""The suites serve algorithms and networks that live outside the repository, by inheritance alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"

RULE = """
from bioprop.algorithms import Backprop
from bioprop.testing import AlgorithmContract

class Halved(Backprop):
    '''Takes half of each gradient.'''

    def _direction(self, gradients):
        return {name: gradient / 2 for name, gradient in gradients.items()}

class TestHalved(AlgorithmContract):
    loss_falls_to = 0.5

    def make(self, network, **settings):
        return Halved(network, **settings)

class TestTooMuchToAsk(TestHalved):
    loss_falls_to = 0.0
    one_batch_epochs = 2
"""
NETWORK = """
from bioprop.networks import LinearStage, Network
from bioprop.testing import NetworkContract

class Narrow(Network):
    def __init__(self, image_shape, num_classes, hidden=5):
        inner, out = LinearStage(image_shape, hidden, "tanh"), LinearStage((hidden,), num_classes, "identity")
        settings = dict(image_shape=list(image_shape), num_classes=num_classes, hidden=hidden)
        super().__init__({"in": inner, "out": out}, settings)

class TestNarrow(NetworkContract):
    def make(self, image_shape, num_classes):
        return Narrow(image_shape, num_classes)
"""


def run_pytest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_strangers_rule_and_network_pass_and_a_failure_tells_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "test_rule.py").write_text(RULE)
    (tmp_path / "test_network.py").write_text(NETWORK)
    some = "Narrow or two_processes or one_batch or killed or evaluation or mlp"
    passed = run_pytest(tmp_path, "-k", f"({some}) and not TooMuch")
    assert passed.returncode == 0, passed.stdout
    assert " passed" in passed.stdout
    assert "skipped" not in passed.stdout

    failed = run_pytest(tmp_path, "-k", "TooMuch and one_batch")
    assert failed.returncode == 1
    assert "2 steps took the loss of one batch from 2." in failed.stdout
    assert "not below 0: give the suite other one_batch_settings" in failed.stdout
