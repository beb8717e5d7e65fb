"""L-DRL with the feedback of all stages trained at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import LDRL, ParallelLDRL
from bioprop.feedback.speed import Speed
from bioprop.networks import MLP, Network
from bioprop.testing import TargetPropagationContract
from bioprop.testing.helpers import changed, copy_state, draw_batch, refused, small_lenet
from tests.algorithms.test_whole_steps import recorded_noise

INDEPENDENT: dict[str, Any] = {"second_noise": "independent", "noise": 0.1, "iterations": 2}
__all__ = ["recorded_noise"]  # the fixture


class TestParallelLDRL(TargetPropagationContract):
    loss_falls_to = 0.5

    def make(self, network: Network, **settings: Any) -> ParallelLDRL:
        return ParallelLDRL(network, **({"samples": 3} | settings))


class SGDSuite(TestParallelLDRL):
    """The checks that look at the feedback optimizer, with one."""

    __test__ = False

    def make(self, network: Network, **settings: Any) -> ParallelLDRL:
        sgd = {"second_noise": "independent", "iterations": 1, "feedback_step": "sgd", "feedback_lr": 0.2, "noise": 0.2}
        return super().make(network, **(sgd | settings))


def test_the_suite_holds_with_a_feedback_optimizer(tmp_path: Path) -> None:
    suite = SGDSuite()
    suite.test_phase_1_trains_every_feedback_weight()
    suite.test_every_batch_draws_noise_of_its_own()
    suite.test_the_feedback_optimizers_momentum_survives_a_checkpoint(tmp_path)
    suite.test_a_resumed_run_equals_the_uninterrupted_one(tmp_path)
    suite.test_the_loss_of_one_batch_falls(tmp_path)


STEPS = {
    "independent, sgd": INDEPENDENT | {"feedback_step": "sgd", "feedback_lr": (0.01, 0.02, 0.03)},
    "independent, normalized": INDEPENDENT | {"feedback_lr": (0.1, 0.2, 0.3)},
    "expected": {"second_noise": "expected"},
    "echo": {},
    "echo with numbers": {"noise": 0.1, "feedback_lr": (0.1, 0.2, 0.3), "iterations": (1, 3, 2)},
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_with_one_sample_it_is_the_sequential_form(step: dict[str, Any]) -> None:
    """Equal noise, equal gradient, equal step: bit for bit, over several batches and iterations."""
    ends = []
    for make in (lambda network: LDRL(network, **step), one_sample(step)):
        torch.manual_seed(4)
        algorithm = make(small_lenet())
        for seed in range(2):
            algorithm.train_feedback(draw_batch(seed=seed)[0])
        ends.append(copy_state(algorithm.feedback))
    assert changed(*ends) == set()


def one_sample(step: dict[str, Any]) -> Any:
    return lambda network: ParallelLDRL(network, samples=1, **step)


def plain_loss_gradient(algorithm: LDRL, name: str, clean: Any, eps: Tensor, eta: Tensor) -> Tensor:
    """Of ``mean[ -2 <eps, G(F(s + eps)) - G(s')> + |G(s' + eta) - G(s')|^2 ]`` for linear ``F`` and ``G``."""
    stage, weight = algorithm.network.get_submodule(name), algorithm.feedback[name].weight.detach().requires_grad_()
    noisy = (clean.inputs + eps) @ stage.weight.T + stage.bias
    first = (eps * ((noisy - clean.output) @ weight)).sum()
    second = ((eta @ weight) ** 2).sum()
    return torch.autograd.grad((second - 2 * first) / len(eps), weight)[0].detach()


def linear_mlp() -> Network:
    return MLP((1, 4, 4), 5, hidden=(8, 6), activation="identity")


def test_a_step_is_the_mean_over_the_samples(recorded_noise: list[Tensor]) -> None:
    sigma, lr, samples = 0.3, 0.05, 4
    algorithm = ParallelLDRL(
        linear_mlp(),
        second_noise="independent",
        noise=sigma,
        iterations=1,
        samples=samples,
        feedback_step="sgd",
        feedback_lr=lr,
        feedback_momentum=0.0,
    ).double()
    images = torch.rand(6, 1, 4, 4, dtype=torch.float64)
    passes, before = algorithm.clean_passes(images), copy_state(algorithm.feedback)
    recorded_noise.clear()
    gradients: dict[str, Tensor] = {}
    with torch.no_grad():
        algorithm.train_feedback(images)
    draws, after = iter([sigma * draw for draw in recorded_noise]), copy_state(algorithm.feedback)
    algorithm.feedback.load_state_dict(before)
    for name, clean in zip(("fc2", "fc3"), passes[1:], strict=True):
        pairs = [(next(draws), next(draws)) for _ in range(samples)]
        each = [plain_loss_gradient(algorithm, name, clean, *pair) for pair in pairs]
        gradients[name] = sum(each) / samples
        expected = before[f"{name}.weight"] - lr * gradients[name]
        torch.testing.assert_close(after[f"{name}.weight"], expected, rtol=1e-10, atol=1e-13)
        with pytest.raises(AssertionError):  # one sample's gradient alone is another
            torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] - lr * each[0])
    assert next(draws, None) is None


def step_taken(algorithm: LDRL, images: Tensor) -> Tensor:
    before = algorithm.feedback["fc3"].weight.detach().clone()
    algorithm.train_feedback(images)
    return before - algorithm.feedback["fc3"].weight.detach()


@pytest.mark.parametrize("second_noise", ["echo", "expected", "independent"])
def test_both_forms_agree_in_expectation(second_noise: str) -> None:
    """On a linear stage ``E[dL/dV] = 2 sigma^2 (V - W)``, from many samples at once or from many batches of one."""
    sigma, many = 0.5, 800
    settings: dict[str, Any] = {"noise": sigma, "feedback_step": "sgd", "feedback_lr": 1e-9, "feedback_momentum": 0.0}
    settings["second_noise"] = second_noise
    network, images = linear_mlp(), torch.rand(64, 1, 4, 4, dtype=torch.float64)
    parallel = ParallelLDRL(network, iterations=1, samples=many, **settings).double()
    sequential = LDRL(network, iterations=many, **settings).double()
    sequential.feedback.load_state_dict(parallel.feedback.state_dict())
    difference = parallel.feedback["fc3"].weight.detach() - network.get_submodule("fc3").weight.detach()
    expected = 2 * sigma**2 * difference
    for algorithm, steps in ((parallel, 1), (sequential, many)):
        gradient = step_taken(algorithm, images) / (1e-9 * steps)
        assert (gradient - expected).norm() < 0.05 * expected.norm()
        assert (gradient + expected).norm() > expected.norm()


def test_samples_are_checked_and_remembered() -> None:
    with refused("samples is 0", "at least 1"):
        ParallelLDRL(small_lenet(), samples=0)
    with refused("samples holds 2.5", "a whole number"):
        ParallelLDRL(small_lenet(), samples=2.5)
    algorithm = ParallelLDRL(small_lenet(), samples=7)
    assert algorithm.hparams["samples"] == 7
    assert algorithm.hparams["iterations"] == "auto"


def test_adam_takes_its_first_step_by_hand() -> None:
    """``V - lr g / (|g| + 1e-8)`` with the decay in ``g``, which a step of SGD with rate 1 on the same noise shows."""
    lr, decay = 0.02, 0.3
    settings: dict[str, Any] = {"second_noise": "independent", "noise": 0.3, "iterations": 1, "samples": 3}
    steps: dict[str, dict[str, Any]] = {
        "sgd": {"feedback_lr": 1.0, "feedback_momentum": 0.0},
        "adam": {"feedback_lr": lr, "feedback_decay": decay},
    }
    images, before, after = torch.rand(6, 1, 4, 4, dtype=torch.float64), {}, {}
    for step, own in steps.items():
        torch.manual_seed(0)
        algorithm = ParallelLDRL(linear_mlp(), feedback_step=step, **settings, **own).double()
        before = copy_state(algorithm.feedback)
        algorithm.train_feedback(images)
        after[step] = copy_state(algorithm.feedback)
    for name, weight in before.items():
        if name.endswith("weight"):
            gradient = weight - after["sgd"][name] + decay * weight
            expected = weight - lr * gradient / (gradient.abs() + 1e-8)
            torch.testing.assert_close(after["adam"][name], expected, rtol=1e-9, atol=1e-12)


class AdamSuite(SGDSuite):
    """The same checks with the optimizer of the authors' program."""

    __test__ = False

    def make(self, network: Network, **settings: Any) -> ParallelLDRL:
        adam = {"feedback_step": "adam", "feedback_lr": 3e-3, "feedback_decay": 1e-4}
        return super().make(network, **(adam | settings))


def test_adams_state_survives_a_checkpoint(tmp_path: Path) -> None:
    AdamSuite().test_a_resumed_run_equals_the_uninterrupted_one(tmp_path)


def test_processes_that_would_each_have_their_own_moments_are_refused() -> None:
    settings: dict[str, Any] = {"noise": 0.1, "iterations": 1, "feedback_lr": 1e-3, "feedback_step": "adam"}
    for processes in ("stages", "weights"):
        with refused(f"speed.processes {processes}", "speed.processes: gradients"):
            ParallelLDRL(small_lenet(), speed=Speed(processes=processes), **settings)


def test_a_decay_that_nothing_would_use_is_refused() -> None:
    with refused("feedback_decay is 0.1", "feedback_step: adam"):
        ParallelLDRL(small_lenet(), feedback_decay=0.1)
    with refused("feedback_lr: auto is a normalized step", "feedback_step adam"):
        ParallelLDRL(small_lenet(), feedback_step="adam")
