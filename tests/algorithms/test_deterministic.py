"""``--trainer.deterministic true``: torch refuses every operation that has no defined order."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bioprop.algorithms import DTP, DTPDRL, LDRL, Algorithm, Backprop, DirectFeedbackAlignment, FeedbackAlignment
from bioprop.networks import Network
from bioprop.testing.helpers import NETWORKS, WITHOUT_REMINDERS, Weights, changed, copy_state, make_loader, make_trainer

pytestmark = WITHOUT_REMINDERS
PUBLISHED = {"second_noise": "independent", "noise": 0.1, "feedback_lr": 0.01, "iterations": 2}
MADE: dict[str, Callable[[Network], Algorithm]] = {
    "BP": Backprop,
    "FA": FeedbackAlignment,
    "DFA": DirectFeedbackAlignment,
    "L-DRL": LDRL,
    "L-DRL as published": lambda network: LDRL(network, mirror="paper", switches="noisy", **PUBLISHED),
    "DTP": DTP,
    "DTP-DRL": DTPDRL,
}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def train(make: Callable[[Network], Algorithm], network: str, folder: Path, **settings: Any) -> Weights:
    torch.manual_seed(0)
    algorithm = make(NETWORKS[network]())
    make_trainer(folder, max_epochs=1, **settings).fit(algorithm, make_loader())
    return copy_state(algorithm)


@pytest.mark.parametrize("network", ["vgg", "lenet"])
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_every_algorithm_trains_and_to_the_same_bits(
    make: Callable[[Network], Algorithm], network: str, tmp_path: Path
) -> None:
    free = train(make, network, tmp_path)
    ordered = train(make, network, tmp_path, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert changed(free, ordered) == set()
