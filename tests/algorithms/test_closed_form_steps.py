"""Whole training steps by the closed forms: those of autograd and of the plain implementation, on any geometry."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from bioprop.algorithms import DTP, LDRL, TargetAlgorithm
from bioprop.feedback import ldrl
from bioprop.feedback import noise as noises
from bioprop.feedback.noise import NoiseStream, Probing
from bioprop.feedback.speed import Speed
from bioprop.functional.pooling import Pool
from bioprop.networks import ConvStage, LinearStage, Network, layers
from bioprop.networks.layers import Block, ConvLayer, FeedbackLayer
from tests.algorithms.plain import SGD, PlainLearner
from tests.algorithms.plain_geometry import general_stage
from tests.geometries import few, networks
from tests.published_steps import in_units_of_backprop

BATCH, STEPS = 10, 2
BETA, NOISE, ITERATIONS = 0.7, [0.3, 0.2], [2, 1]
RATE = {LDRL: 0.05, DTP: 0.005}
Weights = dict[str, Tensor]

forms = st.sampled_from(["paper", "exact"])
#: For an echo, and for the second noise integrated out.
AUTO = {"noise": "auto", "iterations": "auto", "feedback_lr": "auto"}
our_noises, feedback_steps = st.sampled_from(["expected", "echo"]), st.sampled_from(["sgd", "normalized"])
ldrl_rules = st.one_of(
    st.fixed_dictionaries(
        {
            "second_noise": st.just("independent"),
            "switches": st.sampled_from(["noisy", "clean"]),
            "feedback_step": feedback_steps,
        }
    ),
    st.fixed_dictionaries({"second_noise": our_noises, "switches": st.just("clean"), "feedback_step": feedback_steps}),
    st.fixed_dictionaries(
        {"second_noise": our_noises, "switches": st.just("clean")} | {name: st.just("auto") for name in AUTO}
    ),
)


def make(algorithm: type[TargetAlgorithm], network: Network, closed_form: bool, **rules: Any) -> TargetAlgorithm:
    """An algorithm in float64 on a copy of a network, its random numbers from the same seed every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        rules = {"beta": BETA, "noise": NOISE, "iterations": ITERATIONS, "feedback_lr": RATE[algorithm]} | rules
        return algorithm(deepcopy(network), speed=Speed(closed_form=closed_form), **rules).double()


def draw_batches(network: Network) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shape = (BATCH, *network.stages()[0][1].input_shape)
    images = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    return [(each, torch.arange(BATCH) % 3) for each in images]


def train(algorithm: TargetAlgorithm) -> list[Tensor]:
    """Two whole steps; the feedback losses."""
    optimizer = torch.optim.SGD(algorithm.network.parameters(), **in_units_of_backprop("SGD", SGD, BETA))
    losses: list[Tensor] = []
    for images, labels in draw_batches(algorithm.network):
        found, gradients = algorithm._learn(images, labels)
        losses += found.values()
        for name, parameter in algorithm.network.named_parameters():
            parameter.grad = gradients.forward[name]
        optimizer.step()
    return losses


def weights_of(algorithm: TargetAlgorithm) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in algorithm.named_parameters()}


def assert_same_change(before: Weights, found: Weights, expected: Weights, tolerance: float = 1e-12) -> None:
    """Relative to the change of each weight as a whole; beside that, the rounding of the weights themselves."""
    assert set(found) == set(expected) == set(before)
    for name, start in before.items():
        change, wanted = found[name] - start, expected[name] - start
        rounding = 1e-15 * start.norm()
        assert (change - wanted).norm() <= tolerance * wanted.norm() + rounding, name


def assert_closed_form_is_autograd(algorithm: type[TargetAlgorithm], network: Network, **rules: Any) -> None:
    closed, plain = (make(algorithm, network, closed_form, **rules) for closed_form in (True, False))
    before = weights_of(closed)
    assert all(stage.products is not None for _, stage in network.stages())
    losses, expected = train(closed), train(plain)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-10, atol=1e-13)
    # noise of a hundredth of the activities leaves two digits fewer of what autograd subtracts
    tolerance = 1e-10 if rules.get("noise") == "auto" else 1e-12
    assert_same_change(before, weights_of(closed), weights_of(plain), tolerance)
    moved = {name for name, start in before.items() if not torch.equal(start, weights_of(closed)[name])}
    assert {name for name in moved if name.startswith("network")}
    assert {name for name in moved if name.startswith("feedback")}


@few(80)
@given(network=networks(), mirror=forms, rules=ldrl_rules)
def test_ldrl_steps_are_those_of_autograd(network: Network, mirror: str, rules: dict[str, str]) -> None:
    assert_closed_form_is_autograd(LDRL, network, mirror=mirror, **rules)


@few(80)
@given(network=networks(), mirror=forms)
def test_dtp_steps_are_those_of_autograd(network: Network, mirror: str) -> None:
    assert_closed_form_is_autograd(DTP, network, mirror=mirror)


class Recording(list[Tensor]):
    """Noise, which hypothesis would otherwise write out number by number."""

    def __repr__(self) -> str:
        return "recording"


@pytest.fixture
def recorded_noise(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """All noise that is drawn, in order, of standard deviation 1."""
    draws = Recording()
    draw = NoiseStream.draw

    def record(self: NoiseStream, sigma: float, *shapes: tuple[int, ...]) -> list[Tensor]:
        drawn = draw(self, sigma, *shapes)
        draws.extend(tensor / sigma for tensor in drawn)
        return drawn

    monkeypatch.setattr(NoiseStream, "draw", record)
    return draws


def train_against_plain(
    algorithm: type[TargetAlgorithm],
    network: Network,
    draws: Recording,
    mirror: str,
    closed_form: bool = True,
    **rules: Any,
) -> None:
    ours = make(algorithm, network, closed_form, mirror=mirror, **rules)
    before = weights_of(ours)
    mirrors = [None, *(each for _, _, each in ours.mirrored_stages())]
    plain = PlainLearner(
        [general_stage(stage, each) for (_, stage), each in zip(ours.network.stages(), mirrors, strict=True)],
        "dtp" if algorithm is DTP else "ldrl",
        mirror,
        BETA,
        [None if rules.get("iterations") == "auto" else each for each in ours.feedback_training.iterations.values()],
        list(ours.feedback_training.feedback_lr.values()),
        ours.feedback_training.feedback_step == "normalized",
        rules.get("switches") == "clean",
        second_noise=rules.get("second_noise", "independent"),
    )
    draws.clear()
    train(ours)
    noise: Iterator[Tensor] = iter(list(draws))
    for images, labels in draw_batches(network):
        plain.training_step(images, labels, noise, list(ours.feedback_training.noise.values()))
    expected: Weights = {}
    for (name, stage), weights in zip(ours.network.stages(), plain.stages, strict=True):
        expected |= {f"network.{name}.{stage.layer_name}.{kind}": getattr(weights, kind) for kind in ("weight", "bias")}
        if name in ours.feedback:
            expected |= {f"feedback.{name}.weight": weights.feedback, f"feedback.{name}.bias": weights.feedback_bias}
    assert_same_change(before, weights_of(ours), {name: value.detach() for name, value in expected.items()}, 1e-10)


@few(75)
@given(network=networks(bias=True), mirror=forms, rules=ldrl_rules)
def test_ldrl_steps_are_those_of_the_formulas(
    recorded_noise: Recording, network: Network, mirror: str, rules: dict[str, str]
) -> None:
    # one dead ReLU unit has next to no curvature, and a Newton step magnifies rounding without bounds
    assume(rules.get("feedback_step") != "normalized" or network.middle.activation != "relu")
    train_against_plain(LDRL, network, recorded_noise, mirror, **rules)


@few(20)
@given(network=networks(bias=True), mirror=forms)
def test_dtp_steps_are_those_of_the_formulas(recorded_noise: Recording, network: Network, mirror: str) -> None:
    train_against_plain(DTP, network, recorded_noise, mirror)


def overlapping_network() -> Network:
    below = ConvStage((1, 7, 6), 2, 1, activation="tanh")
    middle = ConvStage((2, 7, 6), 3, 3, padding=1, pool=Pool(3, 2, 1))
    return Network({"below": below, "middle": middle, "top": LinearStage(middle.output_shape, 3, "identity")}, {})


def flipped_change(layer: FeedbackLayer, change: Tensor, clean_switches: bool) -> Tensor:
    return -FEATURES_CHANGE(layer, change, clean_switches)


def other_switches(layer: FeedbackLayer, change: Tensor, clean_switches: bool) -> Tensor:
    return FEATURES_CHANGE(layer, change, not clean_switches)


FEATURES_CHANGE = ldrl._features_change


@pytest.mark.parametrize("mutation", [flipped_change, other_switches], ids=["sign flipped", "other pass's switches"])
@pytest.mark.parametrize(
    ("switches", "second_noise"), [("noisy", "independent"), ("clean", "independent"), ("clean", "expected")]
)
def test_another_first_term_is_noticed(
    mutation: Callable[..., Tensor], switches: str, second_noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ldrl, "_features_change", mutation)
    with pytest.raises(AssertionError):
        assert_closed_form_is_autograd(LDRL, overlapping_network(), switches=switches, second_noise=second_noise)


Fault = Callable[[pytest.MonkeyPatch], None]
#: Other weights; or noise of another shape than the formulas ask for.
NOTICED = (AssertionError, RuntimeError, StopIteration)


def with_another_slope(slope: Callable[[Tensor], Tensor]) -> Fault:
    """Change ``phi'`` in the echo alone, not in the curvature."""
    right = ldrl.echo_gradient

    def faulty(blocks: list[Block], eps: Tensor) -> tuple[Tensor, Tensor]:
        changed = [Block(samples, part._replace(slope=slope(part.slope))) for samples, part in blocks]
        return right(changed, eps)

    return lambda monkeypatch: monkeypatch.setattr(ldrl, "echo_gradient", faulty)


def with_an_echo_that_is_not_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.autograd.grad

    def through(outputs: Any, inputs: Any, *given: Any) -> Any:
        return right(outputs, inputs, *given, create_graph=bool(given))  # the echo is the one with a vector

    monkeypatch.setattr(torch.autograd, "grad", through)


def with_curvatures_of_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of their squares."""

    def unit_sums(values: Tensor) -> Tensor:
        return values.flatten(2).sum(2).mean(0) if values.dim() > 2 else values.mean(0)

    monkeypatch.setattr(ldrl, "unit_square_sums", unit_sums)


def replacing(name: str, value: Any) -> Fault:
    return lambda monkeypatch: monkeypatch.setattr(Probing, name, value)


FAULTS: dict[str, tuple[Fault, bool]] = {
    "the echo's sign flipped": (with_another_slope(torch.neg), True),
    "no slope in the echo": (with_another_slope(torch.ones_like), True),
    "the echo not constant": (with_an_echo_that_is_not_constant, False),
    "no damping": (replacing("damped", lambda self, curvature, draw: curvature), True),
    "no noise along the activities": (replacing("is_along", lambda self, draw: False), True),
    "curvatures not squared": (with_curvatures_of_slopes, True),
    "another size of noise": (lambda monkeypatch: monkeypatch.setattr(noises, "NOISE_SHARE", 0.02), True),
    "one iteration": (lambda monkeypatch: monkeypatch.setattr(ldrl, "ECHO_ITERATIONS", 1), True),
    "noise on more images": (lambda monkeypatch: monkeypatch.setattr(noises, "IMAGES_MULTIPLE", 16), True),
}


def wide_network() -> Network:
    """Its middle stage needs 8 of 10 images, its top more than there are."""
    below = ConvStage((1, 8, 8), 3, 1, activation="tanh")
    middle = ConvStage((3, 8, 8), 3, 3, padding=1, pool=Pool(3, 2, 1))
    return Network({"below": below, "middle": middle, "top": LinearStage(middle.output_shape, 3, "identity")}, {})


@pytest.mark.parametrize(("fault", "closed_form"), FAULTS.values(), ids=FAULTS)
def test_a_fault_of_the_echo_is_noticed(
    fault: Fault, closed_form: bool, recorded_noise: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {"switches": "clean", "second_noise": "echo", "closed_form": closed_form} | AUTO
    train_against_plain(LDRL, wide_network(), recorded_noise, "exact", **rules)
    fault(monkeypatch)
    with pytest.raises(NOTICED):
        train_against_plain(LDRL, wide_network(), recorded_noise, "exact", **rules)


CURVATURE_OF_TAPS = ldrl.curvature_of_taps
EXPECTED_FAULTS: dict[str, Fault] = {
    "no damping": FAULTS["no damping"][0],
    "curvatures of units": lambda monkeypatch: monkeypatch.setattr(
        ldrl,
        "curvature_of_taps",
        lambda layer, variance: (
            ldrl.curvature_of_units(layer, variance)[:, None, None, None]
            if layer.output.dim() > 2
            else CURVATURE_OF_TAPS(layer, variance)
        ),
    ),
    "another damping": lambda monkeypatch: monkeypatch.setattr(noises, "EXPECTED_DAMPING", 1.0),
    "fewer iterations": lambda monkeypatch: monkeypatch.setattr(noises, "EXPECTED_ITERATIONS", 3),
}


@pytest.mark.parametrize("fault", EXPECTED_FAULTS.values(), ids=EXPECTED_FAULTS)
def test_a_fault_of_what_is_integrated_out_is_noticed(
    fault: Fault, recorded_noise: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {"switches": "clean", "second_noise": "expected"} | AUTO
    train_against_plain(LDRL, wide_network(), recorded_noise, "exact", **rules)
    fault(monkeypatch)
    with pytest.raises(NOTICED):
        train_against_plain(LDRL, wide_network(), recorded_noise, "exact", **rules)


@pytest.mark.parametrize("algorithm", [LDRL, DTP])
def test_another_factor_is_noticed(algorithm: type[TargetAlgorithm], monkeypatch: pytest.MonkeyPatch) -> None:
    """``1/batch`` instead of ``2/batch``."""
    gradient = ConvLayer.weight_gradient
    monkeypatch.setattr(ConvLayer, "weight_gradient", lambda *given: 0.5 * gradient(*given))
    with pytest.raises(AssertionError):
        assert_closed_form_is_autograd(algorithm, overlapping_network())


def test_a_missing_second_term_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ConvLayer, "transposed_product", lambda self, outputs, *given: outputs.new_zeros(len(outputs), 2, 7, 6)
    )
    with pytest.raises(AssertionError):
        assert_closed_form_is_autograd(LDRL, overlapping_network(), second_noise="independent")


BLOCKED: dict[str, dict[str, Any]] = {
    "echo": {},
    "echo by itself": AUTO,
    "expected": {"second_noise": "expected"},
    "sgd": {"second_noise": "independent", "feedback_step": "sgd"},
    "normalized": {"second_noise": "independent"},
}


@pytest.mark.parametrize("rules", BLOCKED.values(), ids=BLOCKED)
def test_a_batch_in_blocks_learns_as_one_in_a_piece(rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch: here one of 67 samples in blocks of 17 and less."""
    images = torch.randn(67, 1, 7, 6, dtype=torch.float64)
    ends = []
    for limit in (layers.BLOCK_BYTES, 1):
        monkeypatch.setattr(layers, "BLOCK_BYTES", limit)
        algorithm = make(LDRL, overlapping_network_of_seed(), True, **rules)
        losses = algorithm.train_feedback(images)
        ends.append([*weights_of(algorithm).values(), *losses.values()])
    pieces = layers.blocks(torch.empty(67, 3, 7, 6))
    assert len(pieces) > 1
    assert torch.equal(torch.cat([torch.arange(67)[piece] for piece in pieces]), torch.arange(67))
    for whole, cut in zip(*ends, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-14)


def overlapping_network_of_seed() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return overlapping_network()


def test_a_forgotten_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "blocks", lambda affine: [slice(0, len(affine) // 2)])
    with pytest.raises(AssertionError):
        assert_closed_form_is_autograd(LDRL, overlapping_network())


def test_a_gradient_in_another_layout_than_its_weight_steps_the_same_weights() -> None:
    """One output channel: the products hand a contiguous gradient out, and the weight is channels-last."""
    below = ConvStage((1, 7, 5), 2, 1, activation="tanh")
    middle = ConvStage((2, 7, 5), 1, 3)
    network = Network({"below": below, "middle": middle, "top": LinearStage(middle.output_shape, 3, "identity")}, {})
    assert_closed_form_is_autograd(DTP, network)
