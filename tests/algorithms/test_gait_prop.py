"""GAIT-prop: against BP, where the theorem says so, and against the paper's formulas taken literally."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.algorithms import DTP, Algorithm, Backprop, GAITProp, gait_prop
from bioprop.callbacks.alignment import alignment_to_backprop
from bioprop.functional.gait import gait_difference
from bioprop.networks import InvertibleMLP, InvertibleStage, Network
from bioprop.testing import AlgorithmContract
from bioprop.testing.helpers import (
    CLASSES,
    SHAPE,
    changed,
    copy_state,
    draw_batch,
    make_loader,
    make_trainer,
    refused,
    sgd,
    small_lenet,
)

LEAK = 0.1


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * (logits - torch.eye(logits.shape[1], dtype=logits.dtype)[labels]).square().sum(1).mean()


def as_invertible(network: Network) -> Network:
    """A network of the suite as an invertible one of as many stages."""
    if all(isinstance(stage, InvertibleStage) for _, stage in network.stages()):
        return network
    bias = any(name.endswith("bias") for name, _ in network.named_parameters())
    return InvertibleMLP(SHAPE, CLASSES, widths=(40, 30, 20, 12)[-len(network.stages()) :], bias=bias)


class TestGAITProp(AlgorithmContract):
    phases = ("_train_feedback", "_local_gradients", "_step_forward_weights")
    loss_falls_to = 0.3
    orthogonality = 0.1

    def make(self, network: Network, **settings: Any) -> GAITProp:
        return GAITProp(as_invertible(network), **({"orthogonality": self.orthogonality} | settings))

    def test_the_forward_optimizer_is_handed_the_forward_gradients(self, tmp_path: Path) -> None:
        self.orthogonality = 0.0  # the regulariser is part of the step alone
        super().test_the_forward_optimizer_is_handed_the_forward_gradients(tmp_path)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return squared_error(logits, labels)

    def test_resuming_with_another_network_is_refused(self, tmp_path: Path) -> None:
        self.fit(self.make(InvertibleMLP(SHAPE, CLASSES, widths=(20, 15))), tmp_path).save_checkpoint(tmp_path / "half")
        with refused("network.init_args.widths was [20, 15] and is now [20, 16]"):
            other = self.make(InvertibleMLP(SHAPE, CLASSES, widths=(20, 16)))
            self.fit(other, tmp_path, epochs=2, ckpt_path=tmp_path / "half")

    def test_a_checkpoint_loads_into_a_network_of_ones_own(self, tmp_path: Path) -> None:
        algorithm, network = self.make(small_lenet()), as_invertible(small_lenet())
        self.fit(algorithm, tmp_path).save_checkpoint(tmp_path / "one.ckpt")
        loaded = GAITProp.load_from_checkpoint(tmp_path / "one.ckpt", network=network)
        assert loaded.network is network
        assert changed(copy_state(algorithm), copy_state(loaded)) == set()


class CrossEntropySuite(TestGAITProp):
    """The checks that look at the loss, on the other one."""

    __test__ = False
    loss_falls_to = 0.5

    def make(self, network: Network, **settings: Any) -> GAITProp:
        return super().make(network, **({"loss": "cross_entropy"} | settings))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)


def test_the_suite_holds_on_cross_entropy(tmp_path: Path) -> None:
    suite = CrossEntropySuite()
    suite.test_the_loss_of_one_batch_falls(tmp_path)
    suite.test_the_loss_of_training_is_logged(tmp_path)
    suite.test_evaluation_trains_nothing(tmp_path)
    suite.test_a_checkpoint_brings_everything_back(small_lenet, tmp_path)


# -- the paper's formulas, taken literally ----------------------------------------------------------------------------


class Layer(NamedTuple):
    """One layer's weight ``[n, n]``, which reads the first n units, and bias."""

    weight: Tensor
    bias: Tensor


def layers_of(network: Network) -> list[Layer]:
    return [Layer(stage.linear.weight.detach(), stage.linear.bias.detach()) for _, stage in network.stages()]


def literal_gradients(layers: list[Layer], images: Tensor, labels: Tensor, gamma: float) -> list[Tensor]:
    """``mean e_l y_{l-1}^T`` and ``mean e_l`` from the first layer to the last, by targets and inverses as printed."""
    outputs, slopes = [images.flatten(1)], []
    for layer in layers:
        affine = outputs[-1][:, : len(layer.weight)] @ layer.weight.T + layer.bias
        outputs.append(torch.where(affine > 0, affine, LEAK * affine))
        slopes.append((affine > 0).to(affine.dtype) * (1 - LEAK) + LEAK)
    target = outputs[-1].clone()
    target[:, :CLASSES] = torch.eye(CLASSES, dtype=images.dtype)[labels]
    gradients: list[Tensor] = []
    for number in range(len(layers), 0, -1):
        layer, output, below = layers[number - 1], outputs[number], outputs[number - 1]
        slope, width = slopes[number - 1], len(layers[number - 1].weight)
        error = gamma ** -(len(layers) - number) * (output - target) * slope
        gradients[:0] = [error.T @ below[:, :width] / len(images), error.mean(0)]
        step = (1 - gamma * slope**2) * output + gamma * slope**2 * target
        affine = torch.where(step > 0, step, step / LEAK)
        target = torch.cat([(affine - layer.bias) @ torch.linalg.inv(layer.weight).T, below[:, width:]], 1)
    return gradients


def bp_gradients(layers: list[Layer], images: Tensor, labels: Tensor) -> list[Tensor]:
    tensors = [tensor.clone().requires_grad_() for layer in layers for tensor in layer]
    state = images.flatten(1)
    for weight, bias in zip(tensors[::2], tensors[1::2], strict=True):
        state = F.leaky_relu(state[:, : len(weight)] @ weight.T + bias, LEAK)
    return list(torch.autograd.grad(squared_error(state[:, :CLASSES], labels), tensors))


def error_between(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative, the largest of all weights and biases."""
    pairs = zip(found, expected, strict=True)
    return max(float((one.double() - other.double()).norm() / other.double().norm()) for one, other in pairs)


def make_double(widths: int | tuple[int, ...], orthogonal: bool = True, **settings: Any) -> GAITProp:
    """In float64 throughout: weights that are orthogonal to the last digit, and biases that are not zero."""
    algorithm = GAITProp(InvertibleMLP((1, 5, 5), CLASSES, widths, orthogonal=orthogonal), **settings).double()
    for _, stage in algorithm.network.stages():
        torch.nn.init.normal_(stage.linear.bias, std=0.1)
        if orthogonal:
            torch.nn.init.orthogonal_(stage.linear.weight)
    return algorithm


def double_batch(count: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 1, 5, 5, dtype=torch.float64), torch.randint(CLASSES, (count,))


def gradients_of(algorithm: Algorithm, images: Tensor, labels: Tensor) -> list[Tensor]:
    return list(algorithm.forward_gradients(images, labels).values())


WIDTHS: dict[str, int | tuple[int, ...]] = {"2": 2, "4": 4, "8": 8, "tower": (25, 20, 14, 10), "wide top": (22, 22, 13)}
with_every_depth = pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize(
    ("widths", "gamma"),
    [(2, 1e-3), (3, 1e-3), (4, 1e-2), (8, 0.3), (2, 1.0), ((25, 20, 14, 10), 1e-2), ((22, 22, 13), 0.1)],
)
def test_the_stable_form_is_the_literal_one(widths: int | tuple[int, ...], gamma: float, orthogonal: bool) -> None:
    """Where float64 can hold the latter: with large ``gamma`` many targets lie across a unit's kink."""
    algorithm, (images, labels) = make_double(widths, orthogonal, gamma=gamma), double_batch()
    literal = literal_gradients(layers_of(algorithm.network), images, labels, gamma)
    assert error_between(gradients_of(algorithm, images, labels), literal) < 1e-6


# -- the theorem ------------------------------------------------------------------------------------------------------


def assert_equals_bp(algorithm: GAITProp, images: Tensor, labels: Tensor) -> None:
    expected = bp_gradients(layers_of(algorithm.network), images, labels)
    assert error_between(gradients_of(algorithm, images, labels), expected) < 1e-6


@with_every_depth
def test_with_orthogonal_weights_it_is_bp(widths: int | tuple[int, ...]) -> None:
    assert_equals_bp(make_double(widths, gamma=1e-7), *double_batch())


@with_every_depth
def test_in_single_precision_it_is_bp_to_a_thousandth(widths: int | tuple[int, ...]) -> None:
    algorithm, (images, labels) = make_double(widths), double_batch()
    expected = bp_gradients(layers_of(algorithm.network), images, labels)
    found = gradients_of(algorithm.float(), images.float(), labels)
    assert error_between(found, expected) < 1e-3


@pytest.mark.parametrize("stages", [4, 8])
def test_the_literal_form_in_single_precision_is_not(stages: int) -> None:
    algorithm, (images, labels) = make_double(stages), double_batch()
    expected = bp_gradients(layers_of(algorithm.network), images, labels)
    layers = layers_of(algorithm.float().network)
    assert not error_between(literal_gradients(layers, images.float(), labels, 1e-3), expected) < 0.5


@with_every_depth
def test_without_orthogonality_it_is_not_bp(widths: int | tuple[int, ...]) -> None:
    algorithm, (images, labels) = make_double(widths, orthogonal=False, gamma=1e-7), double_batch()
    expected = bp_gradients(layers_of(algorithm.network), images, labels)
    found = gradients_of(algorithm, images, labels)
    assert error_between(found, expected) > 0.5
    assert error_between(found[-2:], expected[-2:]) < 1e-12  # the output's own update needs no inverse


def test_a_large_gamma_is_not_bp() -> None:
    with pytest.raises(AssertionError):
        assert_equals_bp(make_double(4, gamma=1.0), *double_batch())


MUTATIONS: dict[str, Callable[..., Tensor]] = {
    "sign": lambda y, w, d, *rest: -gait_difference(y, w, d, *rest),
    "transposed inverse": lambda y, w, d, *rest: gait_difference(y, w.mT, d, *rest),
    "no slope": lambda y, w, d, *rest: gait_difference(y, w, d / ((y > 0) * (1 - LEAK) + LEAK), *rest),
    "scaled": lambda y, w, d, gamma, above, slope: gamma * gait_difference(y, w, d, gamma, above, slope),
}


@pytest.mark.parametrize("mutated", MUTATIONS.values(), ids=MUTATIONS)
def test_a_mutated_target_is_noticed(mutated: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, batch = make_double(4, gamma=1e-7), double_batch()
    assert_equals_bp(algorithm, *batch)
    monkeypatch.setattr(gait_prop, "gait_difference", mutated)
    with pytest.raises(AssertionError):
        assert_equals_bp(algorithm, *batch)


@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_angles_to_bp_are_zero_on_either_loss(loss: str) -> None:
    algorithm, batch = make_double(4, loss=loss), double_batch()
    aligned = alignment_to_backprop(algorithm, *batch)
    assert list(aligned) == ["fc1", "fc2", "fc3", "fc4", "overall"]
    assert all(float(value.angle) < 0.1 for value in aligned.values())
    baseline = Backprop(algorithm.network, loss=loss)
    assert error_between(gradients_of(algorithm, *batch), gradients_of(baseline, *batch)) < 1e-2


# -- the regulariser --------------------------------------------------------------------------------------------------


def penalty(weight: Tensor) -> Tensor:
    return ((weight @ weight.T) * (1 - torch.eye(len(weight), dtype=weight.dtype))).square().sum()


@pytest.mark.parametrize(("orthogonality", "orthogonal"), [(0.0, "rows"), (0.03, "rows"), (0.03, "columns")])
def test_the_step_descends_the_regulariser_too(orthogonality: float, orthogonal: Any, tmp_path: Path) -> None:
    network = InvertibleMLP(SHAPE, CLASSES, widths=(14, 12), orthogonal=False)
    optimizer = sgd(lr=0.1, momentum=0.0, weight_decay=0.0)
    algorithm = GAITProp(network, orthogonality=orthogonality, orthogonal=orthogonal, optimizer=optimizer).double()
    before = copy_state(algorithm.network)
    images, labels = draw_batch(8)
    gradients = algorithm.forward_gradients(images.double(), labels)
    for name, weight in before.items():
        if name.endswith("weight"):
            weight.requires_grad_()
            loss = penalty(weight if orthogonal == "rows" else weight.T)
            gradients[name] += orthogonality * torch.autograd.grad(loss, weight)[0]
    make_trainer(tmp_path, max_epochs=1, precision="64-true").fit(algorithm, make_loader(1))
    for name, weight in algorithm.network.state_dict().items():
        torch.testing.assert_close(weight, before[name].detach() - 0.1 * gradients[name], rtol=1e-9, atol=1e-12)


def test_the_regulariser_keeps_weights_near_orthogonal(tmp_path: Path) -> None:
    ends = []
    for orthogonality in (0.0, 1.0):
        torch.manual_seed(0)
        algorithm = GAITProp(
            InvertibleMLP(SHAPE, CLASSES, widths=(30, 20)),
            orthogonality=orthogonality,
            optimizer=lambda params: torch.optim.Adam(params, lr=3e-3),
        )
        make_trainer(tmp_path, max_epochs=10).fit(algorithm, make_loader())
        ends.append(sum(float(penalty(layer.weight)) for layer in layers_of(algorithm.network)))
    assert ends[1] < 0.2 * ends[0]


def test_frozen_weights_are_not_regularised(tmp_path: Path) -> None:
    algorithm = GAITProp(InvertibleMLP(SHAPE, CLASSES, widths=(14, 12), orthogonal=False))
    algorithm.network[0].requires_grad_(False)
    before = copy_state(algorithm.network)
    make_trainer(tmp_path, max_epochs=1).fit(algorithm, make_loader())
    assert changed(before, copy_state(algorithm.network)) == {"fc2.linear.weight", "fc2.linear.bias"}


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"orthogonal": "both"}, "orthogonal 'both' is not known: choose one of rows, columns"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"gamma": "small"}, "gamma holds 'small'"),
        ({"orthogonality": -0.1}, "orthogonality is -0.1"),
        ({"loss": "hinge"}, "loss 'hinge' is not known"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], named: str) -> None:
    with refused(named):
        GAITProp(as_invertible(small_lenet()), **settings)


def test_networks_without_inverses_are_refused_and_the_other_way_round() -> None:
    with refused("conv1 is a ConvStage", "InvertibleMLP"):
        GAITProp(small_lenet())
    with refused("InvertibleStage has no feedback mirror"):
        DTP(as_invertible(small_lenet()))


def test_a_weight_that_has_lost_its_inverse_is_named() -> None:
    algorithm = GAITProp(as_invertible(small_lenet()))
    torch.nn.init.zeros_(algorithm.network[2].weight)
    with refused("the weight of stage fc3 has lost its inverse", "model.orthogonality"):
        algorithm.forward_gradients(*draw_batch())


@pytest.mark.parametrize(
    ("name", "other", "named"),
    [
        ("gamma", 1e-2, "gamma was 0.001 and is now 0.01"),
        ("orthogonality", 0.0, "orthogonality was 0.1 and is now 0.0"),
        ("loss", "cross_entropy", "loss was squared_error and is now cross_entropy"),
    ],
)
def test_resuming_with_another_hyperparameter_is_refused(name: str, other: Any, named: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(GAITProp(as_invertible(small_lenet())), make_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with refused(named):
        second = GAITProp(as_invertible(small_lenet()), **{name: other})
        make_trainer(tmp_path, max_epochs=2).fit(second, make_loader(), ckpt_path=tmp_path / "half.ckpt")
