"""Remedies of Moskovitz et al. (2018), with every rule and with direct feedback alignment."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bioprop.algorithms import Algorithm, DirectFeedbackAlignment, FeedbackAlignment
from bioprop.algorithms.feedback_alignment import Rule
from bioprop.functional.angles import angle_degrees
from bioprop.functional.gradients import backprop_gradients
from bioprop.testing.helpers import Weights, copy_state, draw_batch, make_loader, make_trainer, sgd, small_lenet
from tests.algorithms.plain_models import PLAIN, RESNETS
from tests.functional.substituted import with_backward_matrices

RULES = get_args(Rule)
with_every_rule = pytest.mark.parametrize("rule", RULES)
ALGORITHMS = [*RULES, "dfa"]
with_every_algorithm = pytest.mark.parametrize("rule", ALGORITHMS)


def make(rule: str, network: nn.Module, **settings: Any) -> Algorithm:
    if rule == "dfa":
        return DirectFeedbackAlignment(network, **settings)
    return FeedbackAlignment(network, rule=rule, **settings)


def weights_of(algorithm: Algorithm) -> Weights:
    """The matrices and kernels, copied; no biases, nor the scales of batch norm."""
    return {name: p.detach().clone() for name, p in algorithm.network.named_parameters() if p.dim() > 1}


# -- feedback at the forward weight's norm ---------------------------------------------------------------------------


@with_every_rule
def test_normalised_feedback_has_the_forward_weights_norm_and_its_own_direction(rule: Rule, tmp_path: Path) -> None:
    algorithm = FeedbackAlignment(small_lenet(), rule=rule, normalize_feedback=True, optimizer=sgd(lr=0.3))
    start = weights_of(algorithm)
    make_trainer(tmp_path, max_epochs=2).fit(algorithm, make_loader())
    plain = FeedbackAlignment(small_lenet(), rule=rule)
    plain.load_state_dict(copy_state(algorithm))
    for name, layer in algorithm.layers():
        found, raw = (run.backward_matrix(name, layer.weight) for run in (algorithm, plain))
        assert layer.weight.norm().item() != pytest.approx(start[f"{name}.weight"].norm().item(), rel=1e-3)
        assert found.norm().item() == pytest.approx(layer.weight.norm().item(), rel=1e-5)
        assert float(angle_degrees(found, raw)) < 0.05
        if rule in ("fa", "frsf", "brsf"):
            assert raw.norm().item() != pytest.approx(layer.weight.norm().item(), rel=1e-3)


@with_every_rule
def test_gradients_are_formed_with_the_normalised_feedback(rule: Rule) -> None:
    algorithm = FeedbackAlignment(PLAIN["plain residual"](), rule, feedback_scale="unit", normalize_feedback=True)
    algorithm = algorithm.double()
    stored = copy_state(algorithm.backward_weights)
    matrices = {}
    for name, layer in algorithm.layers():
        W, B = layer.weight.detach(), stored[name.replace(".", "/")]
        B = W if rule == "transpose" else B.abs() * W.sign() if rule in ("usf", "frsf", "brsf") else B
        matrices[name] = B * (W.square().sum() / B.square().sum()).sqrt()
    images, labels = draw_batch()
    expected, _ = backprop_gradients(with_backward_matrices(algorithm.network, matrices), images.double(), labels)
    for name, found in algorithm.forward_gradients(images.double(), labels).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12)


# -- forward weights at their initial norm ---------------------------------------------------------------------------


@with_every_algorithm
@pytest.mark.parametrize("build", [small_lenet, RESNETS["resnet"]], ids=["lenet", "resnet"])
def test_constrained_weights_keep_their_norm_and_tensors_and_change_direction(
    rule: str, build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    algorithm = make(rule, build(), constrain_norm=True, optimizer=sgd(lr=0.1))
    before = weights_of(algorithm)
    tensors = {name: (id(p), p.data_ptr()) for name, p in algorithm.network.named_parameters()}
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(algorithm, make_loader())
    for name, weight in weights_of(algorithm).items():
        torch.testing.assert_close(weight.norm(), before[name].norm(), rtol=1e-5, atol=0.0)
        assert float(angle_degrees(weight, before[name])) > 0.5
    assert {name: (id(p), p.data_ptr()) for name, p in algorithm.network.named_parameters()} == tensors
    stepped = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert stepped == [id(p) for p in algorithm.network.parameters()]


@with_every_algorithm
def test_without_the_constraint_norms_drift(rule: str, tmp_path: Path) -> None:
    algorithm = make(rule, small_lenet(), optimizer=sgd(lr=0.1))
    before = weights_of(algorithm)
    make_trainer(tmp_path, max_epochs=2).fit(algorithm, make_loader())
    drifts = [abs(float(w.norm() / before[name].norm()) - 1) for name, w in weights_of(algorithm).items()]
    assert min(drifts) > 1e-4


@with_every_algorithm
def test_constrained_weights_do_keep_learning(rule: str, tmp_path: Path) -> None:
    """The loss falls, and directions change, in the later part of the course too."""
    algorithm = make(rule, small_lenet(), constrain_norm=True, optimizer=sgd(lr=0.005))
    images, labels = draw_batch(8)
    losses, kept = [F.cross_entropy(algorithm(images), labels).item()], [weights_of(algorithm)]
    for batches in (30, 100):
        make_trainer(tmp_path, max_epochs=batches).fit(algorithm, make_loader(1))
        losses.append(F.cross_entropy(algorithm(images), labels).item())
        kept.append(weights_of(algorithm))
    assert losses[2] < 0.8 * losses[0]
    assert losses[2] < 0.97 * losses[1]
    for before, after in pairwise(kept):
        assert all(float(angle_degrees(after[name], before[name])) > 0.1 for name in before)


def test_biases_and_batch_norm_are_not_held(tmp_path: Path) -> None:
    algorithm = FeedbackAlignment(PLAIN["plain residual"](), constrain_norm=True, optimizer=sgd(lr=0.1))
    before = {name: p.detach().clone() for name, p in algorithm.network.named_parameters() if p.dim() == 1}
    make_trainer(tmp_path, max_epochs=2).fit(algorithm, make_loader())
    after = dict(algorithm.network.named_parameters())
    assert "norm.weight" in before
    assert all(abs(float(after[name].detach().norm() / value.norm()) - 1) > 1e-4 for name, value in before.items())


def test_a_resumed_run_holds_the_norms_of_the_first_start(tmp_path: Path) -> None:
    """Those of the weights the new object was made with are other ones."""
    first = FeedbackAlignment(small_lenet(), constrain_norm=True)
    norms = {name: weight.norm() for name, weight in weights_of(first).items()}
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(first, make_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    network = small_lenet()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    second = FeedbackAlignment(network, constrain_norm=True)
    make_trainer(tmp_path, max_epochs=2).fit(second, make_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for name, weight in weights_of(second).items():
        torch.testing.assert_close(weight.norm(), norms[name], rtol=1e-5, atol=0.0)


# -- Batch Manhattan -------------------------------------------------------------------------------------------------


@with_every_algorithm
def test_batch_manhattan_takes_the_sign_of_the_rules_gradient(rule: str) -> None:
    plain = make(rule, small_lenet())
    network = small_lenet()
    signed = make(rule, network, batch_manhattan=True)
    signed.load_state_dict(copy_state(plain))
    expected = plain.forward_gradients(*draw_batch())
    for name, found in signed.forward_gradients(*draw_batch()).items():
        assert torch.equal(found, expected[name].sign())
        assert found.abs().max() == 1


@with_every_algorithm
def test_a_step_of_batch_manhattan_has_the_size_of_the_learning_rate(rule: str, tmp_path: Path) -> None:
    settings = {"decay": 0.0} if rule == "kolen_pollack" else {}
    optimizer = sgd(lr=0.01, momentum=0.0, weight_decay=0.0)
    algorithm = make(rule, small_lenet(), batch_manhattan=True, optimizer=optimizer, **settings)
    before = weights_of(algorithm)
    make_trainer(tmp_path, max_epochs=1).fit(algorithm, make_loader(1))
    for name, weight in weights_of(algorithm).items():
        step = (weight - before[name]).abs()
        moved = step[step > 1e-6]
        assert moved.numel() > 0.8 * step.numel()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=0.0)


# -- the scale of what is drawn --------------------------------------------------------------------------------------


@with_every_rule
@pytest.mark.parametrize("scale", ["initialisation", "unit"])
def test_feedback_scale_is_that_of_the_weights_at_the_start_or_one(rule: Rule, scale: Any, tmp_path: Path) -> None:
    algorithm = FeedbackAlignment(small_lenet(), rule=rule, feedback_scale=scale, optimizer=sgd(lr=0.3))
    start = {name: layer.weight.detach().clone() for name, layer in algorithm.layers()}
    if rule not in ("kolen_pollack", "weight_mirror"):  # of which the first would learn another, the second keeps it
        make_trainer(tmp_path, max_epochs=1).fit(algorithm, make_loader())
    for name, layer in algorithm.layers():
        found = algorithm.backward_matrix(name, layer.weight).square().mean().sqrt().item()
        expected = 1.0 if scale == "unit" else start[name].square().mean().sqrt().item()
        if rule == "transpose":
            assert found == layer.weight.detach().square().mean().sqrt().item()
        elif rule == "usf":
            assert found == pytest.approx(expected, rel=1e-5)
        else:
            assert found == pytest.approx(expected, rel=4 * (2 * layer.weight.numel()) ** -0.5)  # 4 standard errors
