"""Feedback alignment where a layer multiplies by another tensor than its weight, in any spelling of the product."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from bioprop.algorithms import Backprop, DirectFeedbackAlignment, FeedbackAlignment
from bioprop.algorithms.feedback_alignment import Rule
from bioprop.functional.angles import angle_degrees
from bioprop.functional.gradients import backprop_gradients
from bioprop.functional.precision import bfloat16_products
from bioprop.testing.helpers import (
    Weights,
    changed,
    copy_state,
    draw_batch,
    make_loader,
    make_trainer,
    refused,
    sgd,
    small_lenet,
)
from tests.functional.substituted import substituted

RULES = get_args(Rule)
with_every_rule = pytest.mark.parametrize("rule", RULES)


class Rounded(torch.autograd.Function):
    """A straight-through estimator that autograd does not see into."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.mul(8).round().div(8)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> Tensor:
        return errors[0]


def standardised(layer: nn.Module) -> Tensor:
    rows = layer.weight.flatten(1)
    shape = (-1, *[1] * (layer.weight.dim() - 1))
    return (layer.weight - rows.mean(1).view(shape)) / rows.std(1).view(shape)


def straight_through(layer: nn.Module) -> Tensor:
    with torch.no_grad():
        step = layer.weight.abs().max() / 7
        rounded = (layer.weight / step).round() * step
    return layer.weight + (rounded - layer.weight).detach()


def low_rank(layer: nn.Module) -> Tensor:
    return layer.weight + (layer.up @ layer.down).view_as(layer.weight)


def assembled(layer: nn.Module) -> Tensor:
    copied = torch.empty_like(layer.weight)
    copied.copy_(layer.weight)
    return copied.mul_(0.5)


def dropped(layer: nn.Module) -> Tensor:
    torch.manual_seed(5)
    return F.dropout(layer.weight, 0.3)


EFFECTIVE: dict[str, Callable[[nn.Module], Tensor]] = {
    "own": lambda layer: layer.weight,
    "of unit norm": lambda layer: layer.weight / layer.weight.norm(),
    "rows of unit norm": lambda layer: F.normalize(layer.weight, dim=1),
    "standardised": standardised,
    "masked": lambda layer: layer.weight * (layer.weight.abs() > layer.weight.abs().median()),
    "scaled": lambda layer: layer.weight * layer.gain.exp(),
    "straight through": straight_through,
    "rounded by a function": lambda layer: Rounded.apply(layer.weight),
    "signs without gradient": lambda layer: layer.weight.detach().sign() * layer.weight.abs().mean(),
    "low rank": low_rank,
    "cast": lambda layer: layer.weight.to(torch.float32).to(layer.weight),
    "written in place": assembled,
    "dropped": dropped,
    "rotated by a constant": lambda layer: (layer.turn @ layer.weight.flatten(1)).view_as(layer.weight),
    "squared": lambda layer: layer.weight.square() + 0.1 * layer.weight.flip(0).flip(0),
}
Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]
SPELLINGS: dict[str, Spelling] = {
    "linear": F.linear,
    "linear by keyword": lambda x, W, b: F.linear(weight=W, input=x, bias=b),
    "one row": lambda x, W, b: torch.stack([F.linear(row, W, b) for row in x]),
    "in place afterwards": lambda x, W, b: F.linear(x, W).add_(b),
}
#: In which no other matrix can stand in: where its entries belong would have to be guessed.
REFUSED_SPELLINGS: dict[str, Spelling] = {
    "at": lambda x, W, b: x @ W.t() + b,
    "at from the left": lambda x, W, b: (W @ x.mT).T + b,
    "matmul of rows": lambda x, W, b: torch.matmul(x.unsqueeze(1), W.transpose(0, 1))[:, 0] + b,
    "addmm": lambda x, W, b: torch.addmm(b, x, W.permute(1, 0)),
    "addmm by method": lambda x, W, b: b.expand(len(x), -1).addmm(x, W.swapaxes(0, 1), beta=1, alpha=1),
    "baddbmm": lambda x, W, b: torch.baddbmm(b.expand(1, len(x), -1), x[None], W.mT[None])[0],
    "mm of a copy": lambda x, W, b: x.mm(W.t().contiguous()) + b,
    "einsum": lambda x, W, b: torch.einsum("ni,oi->no", x, W) + b,
    "einsum of a list": lambda x, W, b: torch.einsum("oi,ni->no", [W, x]) + b,
    "tensordot": lambda x, W, b: torch.tensordot(x, W, dims=([1], [1])) + b,
    "conv of one pixel": lambda x, W, b: F.conv2d(x[:, :, None, None], W[:, :, None, None], b).flatten(1),
    "mv": lambda x, W, b: torch.stack([torch.mv(W, row) for row in x]) + b,
    "chunks": lambda x, W, b: torch.cat([F.linear(x, part) for part in W.chunk(3)], 1) + b,
    "by hand": lambda x, W, b: (x.unsqueeze(1) * W).sum(-1) + b,
}


class Layer(nn.Linear):
    """A linear layer with any effective weight and any spelling of the product."""

    def __init__(self, inputs: int, outputs: int, effective: str = "own", spelling: str = "linear") -> None:
        super().__init__(inputs, outputs)
        self.effective, self.spelling = effective, spelling
        if effective == "scaled":
            self.gain = nn.Parameter(torch.randn(outputs, 1))
        if effective == "low rank":
            self.up, self.down = nn.Parameter(torch.randn(outputs, 2)), nn.Parameter(torch.randn(2, inputs))
        if effective == "rotated by a constant":
            self.register_buffer("turn", torch.randn(outputs, outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return (SPELLINGS | REFUSED_SPELLINGS)[self.spelling](inputs, EFFECTIVE[self.effective](self), self.bias)


def net(effective: str = "own", spelling: str = "linear") -> nn.Sequential:
    torch.manual_seed(3)
    layers = (Layer(256, 9, effective, spelling), Layer(9, 9, effective, spelling), Layer(9, 7, effective, spelling))
    first, second, third = layers
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), second, nn.Tanh(), third, nn.Linear(7, 10)).double()


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    images, labels = draw_batch(count)
    return images.double(), labels


def by_hand(algorithm: FeedbackAlignment, name: str, weight: Tensor, effective: Tensor) -> Tensor:
    """``B`` from what a checkpoint holds and the definition of the rule, ``weight`` being that of the start."""
    stored = algorithm.state_dict()[f"backward_weights.{name}"]
    signs = effective.detach().sign()
    if algorithm.rule == "usf":
        return weight.detach().square().mean().sqrt() * signs
    if algorithm.rule in ("frsf", "brsf"):
        return stored.abs() * signs
    return effective.detach() if algorithm.rule == "transpose" else stored


def plain_gradients(algorithm: FeedbackAlignment, normalized: bool = False) -> Weights:
    """By substitution in the graph of a twin that spells every product as a linear layer."""
    twin = copy.deepcopy(algorithm.network)
    for name, layer in twin.named_children():
        if isinstance(layer, Layer):

            def forward(inputs: Tensor, layer: Layer = layer, name: str = name) -> Tensor:
                effective = EFFECTIVE[layer.effective](layer)
                matrix = by_hand(algorithm, name, layer.weight, effective)
                if normalized:
                    matrix = matrix * effective.norm() / matrix.norm()
                return substituted(F.linear, matrix, inputs, effective, layer.bias)

            layer.forward = forward
        elif isinstance(layer, nn.Linear):
            matrix = by_hand(algorithm, name, layer.weight, layer.weight)
            layer.forward = partial(
                _plain, layer, matrix * layer.weight.norm() / matrix.norm() if normalized else matrix
            )
    return backprop_gradients(twin, *batch())[0]


def _plain(layer: nn.Linear, matrix: Tensor, inputs: Tensor) -> Tensor:
    return substituted(F.linear, matrix, inputs, layer.weight, layer.bias)


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


PAIRS = [(effective, "linear") for effective in EFFECTIVE] + [
    (effective, spelling) for effective in ("own", "standardised") for spelling in SPELLINGS
]


@pytest.mark.parametrize(("effective", "spelling"), PAIRS)
def test_the_gradients_of_every_rule_are_those_of_the_substituted_graph(effective: str, spelling: str) -> None:
    for rule in RULES:
        algorithm = FeedbackAlignment(net(effective, spelling), rule=rule).double()
        algorithm.train_feedback(*batch())
        found, symmetric = (
            each.forward_gradients(*batch()) for each in (algorithm, Backprop(algorithm.network).double())
        )
        assert_same(found, plain_gradients(algorithm))
        if rule == "transpose":
            assert_same(found, symmetric)
        else:
            with pytest.raises(AssertionError):
                assert_same(found, symmetric)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("effective", ["own", "standardised"])
@pytest.mark.parametrize("spelling", REFUSED_SPELLINGS)
def test_another_spelling_of_the_product_is_refused_by_name(spelling: str, effective: str, frozen: bool) -> None:
    """In a layer above the first, whose input needs an error; and in the first, whose weight would be misjudged."""
    model = net(effective, "linear")
    model[3].spelling = spelling
    model[3].requires_grad_(not frozen)
    with refused("3"):
        FeedbackAlignment(model).forward_gradients(*batch())
    first = net(effective, "linear")
    first[1].spelling = spelling
    with refused("1"):
        FeedbackAlignment(first).forward_gradients(*batch())


@pytest.mark.parametrize("effective", ["own", "masked", "low rank"])
def test_a_frozen_layer_sends_the_error_through_its_matrix(effective: str) -> None:
    model = net(effective)
    model[3].requires_grad_(False)
    algorithm = FeedbackAlignment(model)
    assert_same(algorithm.forward_gradients(*batch()), plain_gradients(algorithm))


def test_the_norm_is_that_of_the_effective_weight() -> None:
    algorithm = FeedbackAlignment(net("masked"), normalize_feedback=True)
    assert_same(algorithm.forward_gradients(*batch()), plain_gradients(algorithm, normalized=True))


# -- convolutions, parametrizations, hooks ---------------------------------------------------------------------------

CONVOLUTIONS = {"conv1d": (nn.Conv1d, F.conv1d), "conv2d": (nn.Conv2d, F.conv2d), "conv3d": (nn.Conv3d, F.conv3d)}
SHAPES = {"conv1d": (64, 4), "conv2d": (4, 8, 8), "conv3d": (2, 4, 8, 4)}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "strided": {"stride": 2, "padding": 1, "groups": 2},
    "same": {"padding": "same", "dilation": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_by_effective_weights(kind: str, geometry: dict[str, Any]) -> None:
    make, _ = CONVOLUTIONS[kind]
    (channels, *sides) = SHAPES[kind]

    class Standardised(make):
        def forward(self, inputs: Tensor) -> Tensor:
            return self._conv_forward(inputs, standardised(self), self.bias)

    layers = [
        nn.Unflatten(1, (channels, *sides)),
        Standardised(channels, 4, 3, padding=1),
        nn.Tanh(),
        Standardised(4, 6, 3, **geometry) if "stride" in geometry or sides[-1] > 4 else make(4, 6, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(10),
    ]
    model = nn.Sequential(nn.Flatten(), *layers)
    model(batch()[0].float())
    for rule in RULES:
        algorithm = FeedbackAlignment(model.double(), rule=rule).double()
        twin = copy.deepcopy(algorithm.network)
        layer, head = twin[4], twin[7]
        effective = standardised(layer) if isinstance(layer, Standardised) else layer.weight

        def forward(
            inputs: Tensor, layer: Any = layer, effective: Tensor = effective, run: FeedbackAlignment = algorithm
        ) -> Tensor:
            matrix = by_hand(run, "4", layer.weight, effective)
            return substituted(layer._conv_forward, matrix, inputs, effective, layer.bias)

        layer.forward = forward
        head.forward = partial(_plain, head, by_hand(algorithm, "7", head.weight, head.weight))
        expected, _ = backprop_gradients(twin, *batch())
        assert_same(algorithm.forward_gradients(*batch()), expected)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


REPARAMETRIZED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "symmetric": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "weight norm by a hook": lambda layer: torch.nn.utils.weight_norm(layer),
    "spectral norm by a hook": lambda layer: torch.nn.utils.spectral_norm(layer),
}
on_every_parametrization = pytest.mark.parametrize("change", REPARAMETRIZED.values(), ids=REPARAMETRIZED)


def reparametrized(change: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    torch.manual_seed(3)
    middle = change(nn.Linear(9, 9))
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 9), nn.Tanh(), middle, nn.Tanh(), nn.Linear(9, 10)).double()


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@on_every_parametrization
def test_parametrized_weights(change: Callable[[nn.Module], nn.Module]) -> None:
    """In evaluation mode, in which reading the weight twice gives the same."""
    for rule in set(RULES) - {"kolen_pollack"}:
        algorithm = FeedbackAlignment(reparametrized(change).eval(), rule=rule).double()
        algorithm.train_feedback(*batch())
        twin = reparametrized(change).eval()
        twin.load_state_dict(copy_state(algorithm.network))
        hidden = torch.tanh(twin[1](batch()[0].flatten(1)))
        twin[3](hidden)  # lets hooks make the weight
        weight, head = twin[3].weight, twin[5].weight
        start = FeedbackAlignment(reparametrized(change).eval(), rule="usf").backward_weights["3"].detach()
        matrices = {"3": by_hand(algorithm, "3", start, weight), "5": by_hand(algorithm, "5", head, head)}
        hidden = torch.tanh(substituted(F.linear, matrices["3"], hidden, weight, twin[3].bias))
        logits = substituted(F.linear, matrices["5"], hidden, head, twin[5].bias)
        loss = F.cross_entropy(logits, batch()[1])
        expected = torch.autograd.grad(loss, list(twin.parameters()))
        found = algorithm.forward_gradients(*batch())
        assert_same(found, dict(zip(dict(twin.named_parameters()), expected, strict=True)))


# -- what learns -----------------------------------------------------------------------------------------------------


def fit(algorithm: FeedbackAlignment, folder: Path, epochs: int = 1, **settings: Any) -> Any:
    trainer = make_trainer(folder, max_epochs=epochs, precision="64-true")
    trainer.fit(algorithm.double(), make_loader(2), **settings)
    return trainer


@pytest.mark.parametrize("effective", ["own", "of unit norm", "masked", "straight through", "low rank"])
def test_kolen_pollack_gives_a_matrix_the_steps_of_its_parameter(effective: str, tmp_path: Path) -> None:
    """``W - B`` shrinks at the rate of the decay, whatever is made of ``W``."""
    algorithm = FeedbackAlignment(net(effective), rule="kolen_pollack", decay=0.1, optimizer=sgd(weight_decay=0.0))
    before = {n: layer.weight.detach() - algorithm.backward_weights[n] for n, layer in algorithm.layers()}
    fit(algorithm, tmp_path, epochs=2)
    for name, layer in algorithm.layers():
        difference = layer.weight.detach() - algorithm.backward_weights[name]
        torch.testing.assert_close(difference, 0.9**4 * before[name], rtol=1e-9, atol=1e-12)


@on_every_parametrization
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_kolen_pollack_refuses_a_weight_that_is_made_of_other_parameters(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    with refused("kolen_pollack gives a matrix the steps of its weight", "layer 3"):
        FeedbackAlignment(reparametrized(change), rule="kolen_pollack")


@pytest.mark.parametrize(("effective", "spelling"), [("standardised", "linear"), ("masked", "one row")])
def test_the_mirror_finds_effective_weights(effective: str, spelling: str) -> None:
    algorithm = FeedbackAlignment(net(effective, spelling), rule="weight_mirror", mirror_samples=1000)
    before = copy_state(algorithm.network)
    for _ in range(60):
        algorithm.train_feedback(*batch())
    assert changed(before, copy_state(algorithm.network)) == set()
    for name in ("1", "3", "5"):
        layer = algorithm.network[int(name)]
        assert angle_degrees(EFFECTIVE[effective](layer), algorithm.backward_weights[name]) < 15


def test_the_mirror_is_shown_the_mean_of_what_processes_multiply_by(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []

    def mean(tensors: list[Tensor]) -> list[Tensor]:
        shown.append(len(tensors))
        return [-tensor for tensor in tensors]

    model = net("dropped")
    own, other = (FeedbackAlignment(copy.deepcopy(model), rule="weight_mirror", mirror_samples=2000) for _ in range(2))
    other.load_state_dict(copy_state(own))
    own.train_feedback(*batch())
    monkeypatch.setattr("bioprop.algorithms.feedback_alignment.mean_over_processes", mean)
    other.train_feedback(*batch())
    assert shown == [3]  # the output layer multiplies by its weight itself
    assert changed(copy_state(own), copy_state(other)) == {f"backward_weights.{n}" for n in "135"}


@pytest.mark.parametrize("rule", ["kolen_pollack", "weight_mirror", "brsf"])
def test_two_halves_of_a_run_are_one(rule: Rule, tmp_path: Path) -> None:
    def make() -> FeedbackAlignment:
        return FeedbackAlignment(net("straight through"), rule=rule, optimizer=sgd())

    whole, half, resumed = make(), make(), make()
    fit(whole, tmp_path, epochs=2)
    fit(half, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path, epochs=2, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert changed(copy_state(whole), copy_state(resumed)) == set()


# -- what is told and set --------------------------------------------------------------------------------------------


@with_every_rule
@pytest.mark.parametrize("spelling", ["linear", "one row"])
def test_angles_are_to_what_is_multiplied_by(rule: Rule, spelling: str) -> None:
    algorithm = FeedbackAlignment(net("standardised", spelling), rule=rule).double()
    start = {name: layer.weight for name, layer in algorithm.layers()}
    algorithm.forward_gradients(*batch())
    angles = algorithm.feedback_angles()
    for name in ("1", "3", "5"):
        effective = standardised(algorithm.network[int(name)])
        expected = angle_degrees(effective, by_hand(algorithm, name, start[name], effective))
        assert angles[name] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("spelling", ["linear", "one row"])
def test_symmetric_feedback_to_effective_weights_is_backpropagation(spelling: str) -> None:
    algorithm = FeedbackAlignment(net("standardised", spelling))
    algorithm.forward_gradients(*batch())  # shows them
    algorithm.symmetrize_feedback()
    assert_same(algorithm.forward_gradients(*batch()), Backprop(algorithm.network).forward_gradients(*batch()))
    assert max(algorithm.feedback_angles().values()) < 1e-6


class Tied(nn.Module):
    """An encoder and its transpose, which share a weight; and one layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.twin, self.head = (
            nn.Linear(256, 9),
            nn.Linear(9, 9),
            nn.Linear(9, 9),
            nn.Linear(9, 10),
        )
        self.twin.weight = self.inner.weight

    def forward(self, images: Tensor, multiply: Callable[..., Tensor] = lambda _, x, W: F.linear(x, W)) -> Tensor:
        state = torch.tanh(self.stem(images.flatten(1)))
        for weight in (self.inner.weight, self.twin.weight):
            state = torch.tanh(multiply("inner", state, weight) + self.inner.bias + self.twin.bias)
        return multiply("head", state, self.head.weight) + self.head.bias


def test_a_weight_that_is_used_several_times_has_one_matrix() -> None:
    algorithm = FeedbackAlignment(Tied()).double()
    assert set(algorithm.backward_weights) == {"stem", "inner", "head"}
    twin = copy.deepcopy(algorithm.network)

    def multiply(name: str, state: Tensor, weight: Tensor) -> Tensor:
        matrix = algorithm.backward_weights[name]
        return substituted(F.linear, matrix, state, weight, None)

    twin.forward = partial(twin.forward, multiply=multiply)
    assert_same(algorithm.forward_gradients(*batch()), backprop_gradients(twin, *batch())[0])


def test_mixed_precision_rounds_products_with_effective_weights() -> None:
    algorithm = FeedbackAlignment(net("standardised").float())
    with torch.autocast("cpu", torch.bfloat16):
        found = algorithm.forward_gradients(*draw_batch(6))
    twin = algorithm.network
    with bfloat16_products():
        reference = plain_gradients(algorithm.double())
    for name, value in reference.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).norm() <= 0.05 * value.norm()
    assert twin is algorithm.network


# -- what is refused -------------------------------------------------------------------------------------------------


class Calls(nn.Module):
    """A layer, a product of its output as one would have it, and another layer."""

    def __init__(self, product: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(256, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.up, self.down = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))
        self.upper = nn.ConvTranspose2d(8, 8, 1)
        self.recurrent, self.cell = nn.LSTM(8, 8, batch_first=True), nn.GRUCell(8, 8)
        self.product = product

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.product(self, torch.tanh(self.stem(images.flatten(1)))))


class OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return inputs @ weight.t()

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        return errors[0] @ weight, errors[0].t() @ inputs


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "product by hand": (lambda m, x: (x.unsqueeze(1) * m.layer.weight).sum(-1), "layer layer (Linear) forms no"),
    "outside of its layer": (lambda m, x: F.linear(x, m.layer.weight / 2), "layer.weight multiplies the output"),
    "of two weights": (lambda m, x: x @ (m.layer.weight @ m.stem.weight[:, :8]), "weight multiplies the output"),
    "written over": (lambda m, x: torch.zeros_like(x).addmm_(x, m.layer.weight), "layer layer (Linear) forms no"),
    "own function": (lambda m, x: OwnLinear.apply(x, m.layer.weight), "layer layer (Linear) forms no"),
    "bare parameter": (lambda m, x: x @ m.matrix, "matrix multiplies the output of other weights (matmul)"),
    "bare parameter, scaled": (lambda m, x: F.linear(x, m.matrix / 2), "matrix multiplies the output of other weights"),
    "low rank beside": (lambda m, x: m.layer(x) + F.linear(F.linear(x, m.down), m.up), "down multiplies the output"),
    "LSTM": (lambda m, x: m.recurrent(x.unsqueeze(1))[0][:, 0], "recurrent.weight_ih_l0 multiplies the output"),
    "cell": (lambda m, x: m.cell(x), "cell.weight_"),
    "transposed convolution": (
        lambda m, x: m.upper(x.view(-1, 8, 1, 1)).flatten(1),
        "upper.weight multiplies the output of other weights (conv_transpose2d)",
    ),
}


@pytest.mark.parametrize(("product", "named"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("rule", ["fa", "transpose"])
def test_what_would_be_backpropagation_is_refused_by_name(
    product: Callable[[Any, Tensor], Tensor], named: str, rule: Rule
) -> None:
    algorithm = FeedbackAlignment(Calls(product), rule=rule)
    with refused(named):
        algorithm.forward_gradients(*draw_batch(6))


def test_a_weight_that_no_product_was_seen_with_is_refused() -> None:
    rescaled = Calls(lambda m, x: x * m.layer.weight[0].detach().norm() * m.layer.weight.norm(dim=1))
    with refused("layer layer (Linear) forms no product"):
        FeedbackAlignment(rescaled).forward_gradients(*draw_batch(6))


ALLOWED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gains": lambda m, x: m.layer(x) / m.layer.weight.norm(dim=1) + m.layer.weight.mean(),
    "attention among data": lambda m, x: m.layer(x).softmax(-1) @ (x.t() @ x),
    "constants": lambda m, x: m.layer(x) @ torch.eye(8).to(x),
    "queries": lambda m, x: x + m.layer(m.matrix).sum(0),
    "in the type of data": lambda m, x: F.linear(x, m.layer.weight.to(x).type_as(x), m.layer.bias.expand_as(x[0])),
    "states that begin with zeros": lambda m, x: m.layer(m.layer.weight.new_zeros(6, 8) + x),
    "activations": lambda m, x: F.prelu(F.layer_norm(m.layer(x), (8,), m.matrix[0], m.matrix[1]), m.matrix[2, :1]),
}


@pytest.mark.parametrize("product", ALLOWED.values(), ids=ALLOWED)
def test_what_is_no_product_of_a_weight_is_left_to_autograd(product: Callable[[Any, Tensor], Tensor]) -> None:
    model = Calls(product).double()
    transpose = FeedbackAlignment(model, rule="transpose").forward_gradients(*batch())
    expected = Backprop(model).forward_gradients(*batch())
    assert_same(transpose, expected)
    found = FeedbackAlignment(model, rule="fa").forward_gradients(*batch())
    assert F.cosine_similarity(found["stem.weight"].flatten(), expected["stem.weight"].flatten(), 0) < 0.99


# -- direct feedback -------------------------------------------------------------------------------------------------


def test_direct_feedback_alignment_leaves_effective_weights_to_autograd() -> None:
    network = small_lenet().double()
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name != "fc2.linear":
            parametrizations.weight_norm(module)
    algorithm = DirectFeedbackAlignment(network).double()
    images, labels = batch()
    found, state = algorithm.forward_gradients(images, labels), images
    logits = network(images)
    error = (logits.softmax(1) - F.one_hot(labels, 10)).detach() / len(images)
    for name, stage in network.stages():
        parameters = dict(stage.named_parameters())
        output = stage(state.detach())
        below = error if name == "fc2" else (error @ algorithm.backward_weights[name]).view_as(output)
        expected = torch.autograd.grad(output, list(parameters.values()), below)
        assert_same({n: found[f"{name}.{n}"] for n in parameters}, dict(zip(parameters, expected, strict=True)))
        state = output


def test_the_mirror_and_evaluation_take_whole_numbers() -> None:
    """As a model of words has them: no input is converted on its way to a table."""
    model = nn.Sequential(nn.Embedding(7, 8), nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 10))
    algorithm, words = FeedbackAlignment(model, rule="weight_mirror"), torch.randint(7, (6, 3))
    algorithm.train_feedback(words)
    assert algorithm.forward_gradients(words, torch.randint(10, (6,))).keys() == dict(model.named_parameters()).keys()
    assert algorithm(words).shape == (6, 10)
