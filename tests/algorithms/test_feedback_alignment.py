"""Feedback alignment: every rule's backward matrices, and exact gradients given them."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from bioprop.algorithms import Backprop, FeedbackAlignment
from bioprop.algorithms.feedback_alignment import Rule
from bioprop.callbacks.alignment import alignment_to_backprop
from bioprop.functional.gradients import backprop_gradients
from bioprop.functional.precision import bfloat16_products
from bioprop.networks import MLP, Network
from bioprop.testing import AlgorithmContract
from bioprop.testing.helpers import (
    CLASSES,
    SHAPE,
    Phases,
    Weights,
    changed,
    copy_state,
    cosine,
    draw_batch,
    make_loader,
    make_trainer,
    refused,
    sgd,
    small_lenet,
)
from tests.algorithms.plain_models import EVERY, PLAIN, RESNETS
from tests.functional.plain_layers import Array, conv_gradients, linear_gradients
from tests.functional.substituted import with_backward_matrices

RULES = get_args(Rule)
SIGN_RULES = ("usf", "frsf", "brsf")
WITH_PRECISIONS = [(rule, "bf16-mixed") for rule in RULES]
with_every_rule = pytest.mark.parametrize("rule", RULES)
with_every_sign_rule = pytest.mark.parametrize("rule", SIGN_RULES)
on_every_model = pytest.mark.parametrize("build", EVERY.values(), ids=EVERY)


class FeedbackAlignmentContract(AlgorithmContract):
    rule: Rule

    def make(self, network: Network, **settings: Any) -> FeedbackAlignment:
        return FeedbackAlignment(network, rule=self.rule, **settings)


class TestFA(FeedbackAlignmentContract):
    rule = "fa"
    loss_falls_to = 0.9  # the first steps go to aligning


class TestUSF(FeedbackAlignmentContract):
    rule = "usf"


class TestFRSF(FeedbackAlignmentContract):
    rule = "frsf"


class TestBRSF(FeedbackAlignmentContract):
    rule = "brsf"


class TestKolenPollack(FeedbackAlignmentContract):
    """Its decay comes on top of the optimizer's step, and its ``B`` learns with ``W``, in phase 2."""

    rule = "kolen_pollack"
    decay = 1e-3
    loss_falls_to = 0.9
    one_batch_settings: ClassVar = {
        **AlgorithmContract.one_batch_settings,
        "decay": 0.05,
    }  # aligns within the few steps there are

    def make(self, network: Network, **settings: Any) -> FeedbackAlignment:
        return super().make(network, **({"decay": self.decay} | settings))

    def test_phase_1_leaves_forward_weights_and_phase_2_feedback_weights(self, tmp_path: Path) -> None:
        algorithm = self.make(small_lenet())
        phases = Phases(algorithm, self.phases)
        self.fit(algorithm, tmp_path)
        learning = {name for name in algorithm.state_dict() if name.startswith(("network.", "backward_weights."))}
        course = [("train_feedback", set()), ("_gradients", set()), ("_step_forward_weights", learning)]
        assert phases.course == course * 3

    def test_the_forward_optimizer_is_handed_the_forward_gradients(self, tmp_path: Path) -> None:
        self.decay = 0.0
        super().test_the_forward_optimizer_is_handed_the_forward_gradients(tmp_path)


class TestWeightMirror(FeedbackAlignmentContract):
    rule = "weight_mirror"


class TestTranspose(FeedbackAlignmentContract):
    rule = "transpose"
    loss_falls_to = 0.1


def test_the_contract_is_inherited_for_every_rule() -> None:
    assert {suite.rule for suite in FeedbackAlignmentContract.__subclasses__()} == set(RULES)


def trained(algorithm: FeedbackAlignment, folder: Path, batches: int = 3, **settings: Any) -> FeedbackAlignment:
    """Train for some batches in float64, so that no weight is what it was at the start."""
    algorithm = algorithm.double()
    make_trainer(folder, max_epochs=1, precision="64-true", **settings).fit(algorithm, make_loader(batches))
    return algorithm


def double_batch(count: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    images, labels = draw_batch(count, seed)
    return images.double(), labels


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], torch.as_tensor(value), rtol=1e-10, atol=1e-12)


# -- the matrices by hand --------------------------------------------------------------------------------------------


class ByHand:
    """``B`` of each layer in numpy, from what is stored and the definition of the rule."""

    def __init__(self, algorithm: FeedbackAlignment) -> None:
        """Takes the sizes of the weights at the start, before any training."""
        self.algorithm = algorithm
        self.sizes = {
            name: float(np.sqrt(np.mean(layer.weight.detach().numpy() ** 2))) for name, layer in algorithm.layers()
        }

    def matrices(self) -> dict[str, Array]:
        return {name: self.matrix(name, layer.weight.detach().numpy()) for name, layer in self.algorithm.layers()}

    def matrix(self, name: str, weight: Array) -> Array:
        stored = self.algorithm.state_dict()[f"backward_weights.{name.replace('.', '/')}"].numpy()
        if self.algorithm.rule == "transpose":
            return weight
        if self.algorithm.rule == "usf":
            return self.sizes[name] * np.sign(weight)
        if self.algorithm.rule in ("frsf", "brsf"):
            return np.abs(stored) * np.sign(weight)
        return stored


def output_error(logits: Array, labels: Tensor) -> Array:
    """``(softmax - onehot) / batch``."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return (powers / powers.sum(1, keepdims=True) - np.eye(logits.shape[1])[labels.numpy()]) / len(logits)


def linear_net() -> Network:
    return MLP(SHAPE, CLASSES, hidden=(12, 9), activation="tanh")


def linear_net_by_hand(parameters: dict[str, Array], B: dict[str, Array], images: Tensor, labels: Tensor) -> Any:
    W1, b1, W2, b2, W3, b3 = parameters.values()
    x = images.flatten(1).numpy()
    h1 = np.tanh(x @ W1.T + b1)
    h2 = np.tanh(h1 @ W2.T + b2)
    top = linear_gradients(h2, B["fc3.linear"], output_error(h2 @ W3.T + b3, labels))
    middle = linear_gradients(h1, B["fc2.linear"], top.below * (1 - h2**2))
    bottom = linear_gradients(x, np.zeros_like(W1), middle.below * (1 - h1**2))
    return [part for layer in (bottom, middle, top) for part in (layer.weight, layer.bias)]


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(SHAPE[0], 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 4 * 8, CLASSES),
    )


def conv_net_by_hand(parameters: dict[str, Array], B: dict[str, Array], images: Tensor, labels: Tensor) -> Any:
    W1, b1, W2, b2, W3, b3 = (torch.from_numpy(value) for value in parameters.values())
    h1 = torch.tanh(F.conv2d(images, W1, b1, 2, 1)).numpy()
    h2 = torch.tanh(F.conv2d(torch.from_numpy(h1), W2, b2, (2, 1), (1, 2), (1, 2), 2)).numpy()
    features = h2.reshape(len(h2), -1)
    top = linear_gradients(features, B["5"], output_error(features @ W3.numpy().T + b3.numpy(), labels))
    error = top.below.reshape(h2.shape) * (1 - h2**2)
    middle = conv_gradients(h1, B["2"], error, (2, 1), ((1, 1), (2, 2)), (1, 2), 2)
    error = middle.below * (1 - h1**2)
    bottom = conv_gradients(images.numpy(), np.zeros(W1.shape), error, (2, 2), ((1, 1), (1, 1)))
    return [part for layer in (bottom, middle, top) for part in (layer.weight, layer.bias)]


Case = tuple[Callable[[], nn.Module], Callable[..., Any]]
CASES: dict[str, Case] = {"linear": (linear_net, linear_net_by_hand), "conv": (conv_net, conv_net_by_hand)}
by_hand = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def assert_gradients_by_hand(algorithm: FeedbackAlignment, hand: ByHand, compute: Callable[..., Any]) -> None:
    images, labels = double_batch()
    parameters = {name: value.detach().numpy() for name, value in algorithm.network.named_parameters()}
    expected = compute(parameters, hand.matrices(), images, labels)
    found = algorithm.forward_gradients(images, labels)
    assert_same(found, dict(zip(parameters, expected, strict=True)))


@by_hand
@with_every_rule
def test_gradients_are_those_by_hand_before_and_after_training(rule: Rule, case: Case, tmp_path: Path) -> None:
    build, compute = case
    algorithm = FeedbackAlignment(build().double(), rule=rule, optimizer=sgd(lr=0.3))
    hand = ByHand(algorithm)
    assert_gradients_by_hand(algorithm, hand, compute)
    trained(algorithm, tmp_path)
    assert_gradients_by_hand(algorithm, hand, compute)


@by_hand
@with_every_rule
def test_a_sign_flipped_in_any_matrix_is_noticed(rule: Rule, case: Case) -> None:
    build, compute = case
    algorithm = FeedbackAlignment(build().double(), rule=rule)
    hand, backward_matrix = ByHand(algorithm), algorithm.backward_matrix
    carrying = [name for name, _ in algorithm.layers() if name != "0"]  # below a plain model's first layer is nothing
    assert len(carrying) == 2
    for flipped in carrying:

        def flip(name: str, weight: Tensor, flipped: str = flipped) -> Tensor:
            return (-1 if name == flipped else 1) * backward_matrix(name, weight)

        algorithm.backward_matrix = flip
        with pytest.raises(AssertionError):
            assert_gradients_by_hand(algorithm, hand, compute)


@pytest.mark.parametrize("rule", ["fa", "kolen_pollack", "weight_mirror"])
def test_the_matrix_is_what_is_stored(rule: Rule) -> None:
    """A sign flipped in the stored tensor, which a checkpoint would bring, reaches the layers below and no others."""
    algorithm = FeedbackAlignment(linear_net(), rule=rule)
    before = algorithm.forward_gradients(*draw_batch())
    algorithm.backward_weights["fc2/linear"].neg_()
    after = algorithm.forward_gradients(*draw_batch())
    assert changed(before, after) == {"fc1.linear.weight", "fc1.linear.bias"}
    torch.testing.assert_close(after["fc1.linear.weight"], -before["fc1.linear.weight"])


# -- every network ---------------------------------------------------------------------------------------------------


@on_every_model
def test_transpose_is_backpropagation(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Gradients in training mode, then three steps with momentum and decay."""
    torch.manual_seed(5)
    algorithm = FeedbackAlignment(build(), rule="transpose", optimizer=sgd()).double()
    control = Backprop(build(), optimizer=sgd()).double()
    control.network.load_state_dict(copy_state(algorithm.network))
    images, labels = double_batch()
    assert_same(algorithm.forward_gradients(images, labels), control.forward_gradients(images, labels))
    for run in (algorithm, control):
        make_trainer(tmp_path, max_epochs=1, precision="64-true").fit(run, make_loader())
    for name, expected in copy_state(control.network).items():
        torch.testing.assert_close(algorithm.network.state_dict()[name], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("build", {**RESNETS, **PLAIN}.values(), ids=[*RESNETS, *PLAIN])
@with_every_rule
def test_gradients_are_those_of_the_substituted_graph(
    rule: Rule, build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """With batch norm in training mode, pooling, residual connections and all geometries of convolutions."""
    algorithm = FeedbackAlignment(build().double(), rule=rule, optimizer=sgd(lr=0.1))
    hand = ByHand(algorithm)
    trained(algorithm, tmp_path)
    images, labels = double_batch()
    matrices = {name: torch.from_numpy(matrix) for name, matrix in hand.matrices().items()}
    expected, _ = backprop_gradients(with_backward_matrices(algorithm.network, matrices), images, labels)
    assert_same(algorithm.forward_gradients(images, labels), expected)
    if rule != "transpose":
        symmetric, _ = backprop_gradients(algorithm.network, images, labels)
        with pytest.raises(AssertionError):
            assert_same(symmetric, expected)


@on_every_model
def test_the_last_stage_gets_backpropagations_gradient(build: Callable[[], nn.Module]) -> None:
    algorithm = FeedbackAlignment(build()).double()
    images, labels = double_batch()
    expected = Backprop(algorithm.network).forward_gradients(images, labels)
    found = algorithm.forward_gradients(images, labels)
    last = list(expected)[-1].rsplit(".", 1)[0]
    names = [name for name in expected if name.startswith(f"{last}.")]
    assert_same({name: found[name] for name in names}, {name: expected[name] for name in names})


@pytest.mark.parametrize("build", RESNETS.values(), ids=RESNETS)
@with_every_rule
def test_a_resnet_trains_and_comes_back_from_a_checkpoint(
    rule: Rule, build: Callable[[], Network], tmp_path: Path
) -> None:
    algorithm = FeedbackAlignment(build(), rule=rule)
    before = copy_state(algorithm.network)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(algorithm, make_loader())
    assert changed(before, copy_state(algorithm.network)) == set(before)
    trainer.save_checkpoint(tmp_path / "resnet.ckpt")
    loaded = FeedbackAlignment.load_from_checkpoint(tmp_path / "resnet.ckpt")
    assert changed(copy_state(algorithm), copy_state(loaded)) == set()
    assert loaded.rule == rule
    assert all(value.isfinite().all() for value in copy_state(algorithm).values())


# -- plain torch models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", PLAIN.values(), ids=PLAIN)
def test_a_plain_model_learns_with_nothing_else_given(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = build()
    algorithm = FeedbackAlignment(model, rule="fa")
    assert algorithm.network is model
    layers = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert {name for name, _ in algorithm.layers()} == layers
    images, labels = draw_batch(8)
    before, loss = copy_state(model), F.cross_entropy(model(images), labels)
    trainer = make_trainer(tmp_path, max_epochs=30)
    trainer.fit(algorithm, make_loader(1), make_loader(1))
    trainer.test(algorithm, make_loader(1), verbose=False)
    assert changed(before, copy_state(model)) == set(before)
    assert F.cross_entropy(model.train()(images), labels) < 0.75 * loss


def test_a_plain_model_brings_its_own_class_to_a_checkpoint(tmp_path: Path) -> None:
    algorithm = FeedbackAlignment(PLAIN["plain residual"](), rule="kolen_pollack")
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(algorithm, make_loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with refused("ResidualModel, which only you can build", "network="):
        FeedbackAlignment.load_from_checkpoint(tmp_path / "plain.ckpt")
    loaded = FeedbackAlignment.load_from_checkpoint(tmp_path / "plain.ckpt", network=PLAIN["plain residual"]())
    assert changed(copy_state(algorithm), copy_state(loaded)) == set()
    assert loaded.rule == "kolen_pollack"


def test_a_plain_models_angles_are_by_its_children() -> None:
    model = PLAIN["plain residual"]()
    found = {}
    for rule in ("fa", "transpose"):
        found[rule] = alignment_to_backprop(FeedbackAlignment(model, rule).double(), *double_batch())
    assert list(found["fa"]) == ["stem", "norm", "first", "second", "head", "overall"]
    assert all(float(aligned.angle) < 1e-6 for aligned in found["transpose"].values())
    assert float(found["fa"]["head"].angle) < 1e-6
    assert float(found["fa"]["stem"].angle) > 1


def test_a_model_without_layers_is_refused() -> None:
    with refused("ReLU has no Linear or Conv layer"):
        FeedbackAlignment(nn.ReLU())


def test_torchvisions_resnet_18_runs_as_it_comes(tmp_path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=10)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    transpose = FeedbackAlignment(model, rule="transpose").forward_gradients(images, labels)
    expected = Backprop(model).forward_gradients(images, labels)
    for name, value in expected.items():
        assert (transpose[name] - value).norm() <= 1e-4 * value.norm()
    algorithm = FeedbackAlignment(model, rule="fa")
    assert len(algorithm.backward_weights) == 21
    found = algorithm.forward_gradients(images, labels)
    assert all(value.isfinite().all() for value in found.values())
    unaltered = {n for n, value in expected.items() if (found[n] - value).norm() <= 1e-4 * value.norm()}
    assert unaltered == {"fc.weight", "fc.bias"}
    before = copy_state(model)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=2)
    make_trainer(tmp_path, max_epochs=1).fit(algorithm, data)
    assert changed(before, copy_state(model)) == set(before)


# -- the rules -------------------------------------------------------------------------------------------------------


class Course:
    """Copies of every layer's ``W``, ``B`` and stored tensor, at each batch of training."""

    def __init__(self, algorithm: FeedbackAlignment) -> None:
        self.weights: list[Weights] = []
        self.matrices: list[Weights] = []
        self.stored: list[Weights] = []
        run = algorithm._gradients

        def recorded(images: Tensor, labels: Tensor) -> Any:
            layers = algorithm.layers()
            self.weights.append({name: layer.weight.detach().clone() for name, layer in layers})
            self.matrices.append(
                {name: algorithm.backward_matrix(name, layer.weight).clone() for name, layer in layers}
            )
            self.stored.append(copy_state(algorithm.backward_weights))
            return run(images, labels)

        algorithm._gradients = recorded


@with_every_sign_rule
def test_signs_agree_in_every_batch_though_weights_change_theirs(rule: Rule, tmp_path: Path) -> None:
    algorithm = FeedbackAlignment(small_lenet(), rule=rule, optimizer=sgd(lr=0.5))
    course = Course(algorithm)
    make_trainer(tmp_path, max_epochs=4).fit(algorithm, make_loader())
    assert len(course.weights) == 12
    for weights, matrices in zip(course.weights, course.matrices, strict=True):
        assert all(torch.equal(matrices[name].sign(), weights[name].sign()) for name in weights)
    first, last = course.weights[0], course.weights[-1]
    assert all((first[name].sign() != last[name].sign()).any() for name in first)


def test_brsf_draws_new_magnitudes_in_every_batch(tmp_path: Path) -> None:
    algorithm = FeedbackAlignment(small_lenet(), rule="brsf")
    course = Course(algorithm)
    make_trainer(tmp_path, max_epochs=2).fit(algorithm, make_loader())
    for before, after in pairwise(course.matrices):
        for name in before:
            assert (before[name].abs() != after[name].abs()).float().mean() > 0.99
            assert float(after[name].norm()) == pytest.approx(float(before[name].norm()), rel=1e-4)
    assert len({float(matrices["fc2.linear"][0, 0].abs()) for matrices in course.matrices}) == 6


def test_brsf_draws_gaussian_magnitudes_apart_for_every_layer() -> None:
    algorithm = FeedbackAlignment(MLP(SHAPE, CLASSES, hidden=(90, 90, 90)), rule="brsf", feedback_scale="unit")
    algorithm.train_feedback(draw_batch()[0])
    first, second = (algorithm.backward_weights[f"fc{number}/linear"] for number in (2, 3))
    assert not torch.equal(first, second)
    assert float(first.abs().mean()) == pytest.approx((2 / np.pi) ** 0.5, abs=0.03)


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf"])
def test_what_is_fixed_stays_as_drawn(rule: Rule, tmp_path: Path) -> None:
    algorithm = FeedbackAlignment(small_lenet(), rule=rule, optimizer=sgd(lr=0.5))
    course = Course(algorithm)
    make_trainer(tmp_path, max_epochs=2).fit(algorithm, make_loader())
    for stored, matrices in zip(course.stored, course.matrices, strict=True):
        assert changed(course.stored[0], stored) == set()
        for name, first in course.matrices[0].items():
            assert torch.equal(matrices[name].abs(), first.abs())


def test_frsf_has_random_magnitudes_and_usf_a_single_one() -> None:
    fixed, uniform = (FeedbackAlignment(small_lenet(), rule=rule) for rule in ("frsf", "usf"))
    for name, layer in fixed.layers():
        assert fixed.backward_matrix(name, layer.weight).abs().unique().numel() == layer.weight.numel()
    for name, layer in uniform.layers():
        magnitude = uniform.backward_matrix(name, layer.weight).abs().unique()
        assert magnitude.numel() == 1
        assert magnitude.item() == pytest.approx(layer.weight.square().mean().sqrt().item(), rel=1e-6)


@with_every_rule
def test_backward_matrices_are_drawn_from_the_seed_alone(rule: Rule, tmp_path: Path) -> None:
    """Not from the data, and not from what the generator does later; other seeds give others."""
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        network = small_lenet()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.fill_(0.1)  # the same network for all: what differs is the draw
        runs.append(FeedbackAlignment(network, rule=rule))
        torch.rand(seed)
        runs[-1].train_feedback(torch.randn(8, *SHAPE))
    first, second, other = (copy_state(run.backward_weights) for run in runs)
    assert changed(first, second) == set()
    assert changed(first, other) == (set() if rule in ("usf", "transpose") else set(first))


@with_every_rule
def test_backward_matrices_move_and_save_like_any_other(rule: Rule) -> None:
    algorithm = FeedbackAlignment(small_lenet(), rule=rule)
    names = {name for name in algorithm.state_dict() if name.startswith("backward_weights.")}
    assert names == {f"backward_weights.{layer}" for layer in ("conv2/conv", "fc1/linear", "fc2/linear")}
    other = FeedbackAlignment(small_lenet(), rule=rule)
    other.load_state_dict(copy_state(algorithm))
    assert changed(copy_state(algorithm), copy_state(other)) == set()
    moved = algorithm.to(device="meta", dtype=torch.float64)
    assert all(value.device.type == "meta" for value in moved.backward_weights.values())
    assert all(value.dtype == torch.float64 for value in moved.backward_weights.values())
    assert not any(value.requires_grad for value in moved.backward_weights.values())


@with_every_rule
def test_symmetrize_feedback_makes_a_copy(rule: Rule, tmp_path: Path) -> None:
    algorithm = FeedbackAlignment(small_lenet(), rule=rule, optimizer=sgd(lr=0.5)).double()
    algorithm.symmetrize_feedback()
    images, labels = double_batch()
    if rule != "usf":
        assert all(angle < 1e-6 for angle in algorithm.feedback_angles().values())
        assert_same(
            algorithm.forward_gradients(images, labels), Backprop(algorithm.network).forward_gradients(images, labels)
        )
    stored = copy_state(algorithm.backward_weights)
    with torch.no_grad():
        for _, layer in algorithm.layers():
            layer.weight.mul_(2).add_(1)
    assert changed(stored, copy_state(algorithm.backward_weights)) == set()


def test_angles_are_by_stage_and_by_layer_where_a_stage_has_several() -> None:
    assert list(FeedbackAlignment(small_lenet()).feedback_angles()) == ["conv2", "fc1", "fc2"]
    angles = FeedbackAlignment(RESNETS["resnet"]()).feedback_angles()
    blocks = [f"block{n}_1.{layer}" for n, layer in ((1, "conv1"), (1, "conv2"), (2, "conv1"), (2, "conv2"))]
    assert list(angles) == [*blocks, "block2_1.shortcut.0", "fc.linear"]
    assert all(45 < angle < 135 for angle in angles.values())
    uniform = FeedbackAlignment(small_lenet(), rule="usf").feedback_angles()
    assert all(0 < angle < 45 for angle in uniform.values())


# -- precision, layout, settings -------------------------------------------------------------------------------------


def seeded_run(rule: Rule, folder: Path, build: Callable[[], nn.Module], **trainer: Any) -> Weights:
    torch.manual_seed(3)
    algorithm = FeedbackAlignment(build(), rule=rule).to(memory_format=torch.channels_last)
    make_trainer(folder, max_epochs=2, **trainer).fit(algorithm, make_loader(2))
    return copy_state(algorithm)


@pytest.mark.parametrize(("rule", "precision"), [*WITH_PRECISIONS, *((rule, "32-true") for rule in RULES)])
def test_a_second_run_of_the_seed_is_bit_identical_in_channels_last(rule: Rule, precision: str, tmp_path: Path) -> None:
    first, second = (seeded_run(rule, tmp_path, RESNETS["resnet"], precision=precision) for _ in range(2))
    assert changed(first, second) == set()
    assert all(value.isfinite().all() for value in first.values())


@with_every_rule
def test_bf16_mixed_gradients_are_float32_and_autograds(rule: Rule) -> None:
    algorithm = FeedbackAlignment(RESNETS["resnet"](), rule=rule)
    matrices = {name: algorithm.backward_matrix(name, layer.weight) for name, layer in algorithm.layers()}
    twin = with_backward_matrices(algorithm.network, matrices)
    with torch.autocast("cpu", torch.bfloat16):
        found = algorithm.forward_gradients(*draw_batch())
    with bfloat16_products():
        expected, _ = backprop_gradients(twin, *draw_batch())
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).norm() <= 0.02 * value.norm()


@with_every_rule
def test_every_rule_trains_in_bf16_mixed(rule: Rule, tmp_path: Path) -> None:
    algorithm = FeedbackAlignment(small_lenet(), rule=rule, decay=0.2, optimizer=partial(torch.optim.Adam, lr=0.01))
    images, labels = draw_batch()
    before = F.cross_entropy(algorithm(images), labels)
    make_trainer(tmp_path, max_epochs=30, precision="bf16-mixed").fit(algorithm, make_loader(1))
    assert F.cross_entropy(algorithm(images), labels) < 0.8 * before
    assert {value.dtype for value in algorithm.backward_weights.values()} == {torch.float32}


@pytest.mark.parametrize("build", [RESNETS["resnet"], PLAIN["plain residual"]], ids=["resnet", "plain"])
def test_channels_last_gives_the_same_gradients(build: Callable[[], nn.Module]) -> None:
    algorithm = FeedbackAlignment(build()).double()
    images, labels = double_batch()
    expected = algorithm.forward_gradients(images, labels)
    algorithm = algorithm.to(memory_format=torch.channels_last)
    assert_same(algorithm.forward_gradients(images.to(memory_format=torch.channels_last), labels), expected)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rule": "sf"}, ["rule 'sf' is not known", "fa, usf, frsf, brsf, kolen_pollack, weight_mirror, transpose"]),
        ({"feedback_scale": 2}, ["feedback_scale 2 is not known", "initialisation, unit"]),
        ({"decay": -0.1}, ["decay is -0.1", "at least 0"]),
        ({"decay": 1.0}, ["decay is 1", "below 1"]),
        ({"mirror_rate": 0.0}, ["mirror_rate is 0.0", "above 0"]),
        ({"mirror_rate": 1.5}, ["mirror_rate 1.5", "at most 1"]),
        ({"mirror_samples": 0}, ["mirror_samples is 0", "at least 1"]),
        ({"mirror_samples": 2.5}, ["mirror_samples holds 2.5", "a whole number"]),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], named: list[str]) -> None:
    with refused(*named):
        FeedbackAlignment(small_lenet(), **settings)


def test_resuming_with_another_rule_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(FeedbackAlignment(small_lenet(), rule="fa", scheduler=cosine(2)), make_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    other = FeedbackAlignment(small_lenet(), rule="kolen_pollack", scheduler=cosine(2))
    with refused("rule was fa and is now kolen_pollack"):
        make_trainer(tmp_path, max_epochs=2).fit(other, make_loader(), ckpt_path=tmp_path / "half.ckpt")
