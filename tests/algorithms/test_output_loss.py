"""The squared error at the output, for every algorithm, beside autograd in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import (
    DDTPRHL,
    DTP,
    DTPDRL,
    LDRL,
    Algorithm,
    AnalyticFeedback,
    DDTPControl,
    DDTPLinear,
    DirectFeedbackAlignment,
    DirectKolenPollack,
    DirectRandomTargetProjection,
    FeedbackAlignment,
    FixedWeightDTP,
    NormalizedDFA,
    ParallelLDRL,
    TargetPropagation,
)
from bioprop.callbacks.alignment import alignment_to_gauss_newton
from bioprop.networks import MLP, Network
from bioprop.testing.helpers import CLASSES, SHAPE, draw_batch, make_loader, make_trainer, refused

ALGORITHMS: list[Callable[..., Algorithm]] = [
    *(LDRL, ParallelLDRL, DTP, TargetPropagation, DTPDRL, DDTPLinear, DDTPRHL, DDTPControl, FixedWeightDTP),
    *(AnalyticFeedback, FeedbackAlignment, DirectFeedbackAlignment, DirectRandomTargetProjection),
    *(DirectKolenPollack, NormalizedDFA),
]


def double_batch() -> tuple[Tensor, Tensor]:
    images, labels = draw_batch(8)
    return images.double(), labels


def squared_error(network: Network, images: Tensor, labels: Tensor) -> Tensor:
    """``mean 1/2 |s^N - onehot(y)|^2``."""
    return ((network(images) - torch.eye(CLASSES, dtype=images.dtype)[labels]) ** 2).sum() / (2 * len(images))


def gradients_of_squared_error(network: Network) -> dict[str, Tensor]:
    names, parameters = zip(*network.named_parameters(), strict=True)
    loss = squared_error(network, *double_batch())
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def make(algorithm: Callable[..., Any], **settings: Any) -> Any:
    return algorithm(MLP(SHAPE, CLASSES, hidden=(9, 7), activation="tanh"), loss="squared_error", **settings).double()


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: each.__name__)
def test_the_output_stage_has_the_gradient_of_the_squared_error(algorithm: Callable[..., Any]) -> None:
    """In the units of backpropagation, whatever beta: there is no feedback between the loss and this stage."""
    trained = make(algorithm)
    found = trained.forward_gradients(*double_batch())
    expected = gradients_of_squared_error(trained.network)
    for name in ("fc3.linear.weight", "fc3.linear.bias"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [(FeedbackAlignment, {"rule": "transpose"}), (LDRL, {"beta": 1e-5}), (AnalyticFeedback, {"beta": 1e-5})],
)
def test_symmetric_feedback_carries_its_gradient_down(algorithm: Callable[..., Any], settings: dict[str, Any]) -> None:
    trained = make(algorithm, **settings)
    trained.symmetrize_feedback()
    found, expected = trained.forward_gradients(*double_batch()), gradients_of_squared_error(trained.network)
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-4 * value.norm(), name


def test_the_squared_error_is_what_is_logged_and_kept(tmp_path: Path) -> None:
    trained = make(LDRL)
    before = squared_error(trained.network, *double_batch()).item()
    trainer = make_trainer(tmp_path, max_epochs=1, precision="64-true")
    trainer.fit(trained, make_loader(1))
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(before, rel=1e-6)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = LDRL.load_from_checkpoint(tmp_path / "one.ckpt")
    assert loaded.hparams["loss"] == "squared_error"
    assert loaded.output_loss is trained.output_loss


def test_gauss_newton_targets_are_those_of_the_same_loss() -> None:
    """At the output, and with all samples alike, they are the gradient of the loss but for the damping."""
    trained = make(LDRL)
    aligned = alignment_to_gauss_newton(trained, *double_batch(), damping=1e4)
    assert float(aligned["fc3"].angle) < 1e-3


def test_an_unknown_loss_is_refused() -> None:
    with refused("loss 'hinge' is not known"):
        LDRL(MLP(SHAPE, CLASSES), loss="hinge")
