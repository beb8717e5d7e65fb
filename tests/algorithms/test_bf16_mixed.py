"""bf16-mixed keeps each algorithm what it is: small differences keep their digits, weights never go stale."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

from bioprop.algorithms import (
    DDTPRHL,
    DTP,
    DTPDRL,
    LDRL,
    Algorithm,
    Backprop,
    DDTPControl,
    DDTPLinear,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    FixedWeightDTP,
    GAITProp,
    ParallelLDRL,
    TargetAlgorithm,
    TargetPropagation,
)
from bioprop.callbacks import AlignmentToBackprop
from bioprop.callbacks.alignment import alignment_to_backprop
from bioprop.errors import UserError
from bioprop.feedback.speed import Speed
from bioprop.functional import precision
from bioprop.functional.angles import angle_degrees, flatten_all
from bioprop.networks import MLP, InvertibleMLP, Network, ResNet
from bioprop.networks.mirrors import LayerMirror
from bioprop.testing.helpers import (
    CLASSES,
    NETWORKS,
    SHAPE,
    Weights,
    changed,
    copy_state,
    draw_batch,
    make_loader,
    make_trainer,
    refused,
    small_lenet,
)

AUTOGRAD = Speed(closed_form=False)
INDEPENDENT = {"second_noise": "independent", "noise": 0.1, "feedback_lr": 0.03}


def tanh_mlp(standardize: bool = False) -> Network:
    return MLP(SHAPE, CLASSES, hidden=(40, 40, 40), activation="tanh", standardize=standardize)


def resnet() -> Network:
    return ResNet(SHAPE, CLASSES, blocks=(1, 1), widths=(4, 8), activation="elu")


def reduced() -> torch.autocast:
    """What Lightning puts around a step; with autocast's own default, which keeps copies of weights."""
    return torch.autocast("cpu", torch.bfloat16)


def angle(found: Weights, expected: Weights) -> float:
    sides = (flatten_all(side[name] for name in expected) for side in (found, expected))
    return float(angle_degrees(*sides))


# -- forward gradients -----------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[Callable[..., Algorithm], Callable[[], Network]]] = {
    "bp": (Backprop, tanh_mlp),
    "bp resnet": (Backprop, resnet),
    "fa": (FeedbackAlignment, tanh_mlp),
    "fa strided": (FeedbackAlignment, NETWORKS["strided"]),
    "fa resnet": (FeedbackAlignment, resnet),
    "dfa": (DirectFeedbackAlignment, tanh_mlp),
    "ldrl": (LDRL, tanh_mlp),
    "ldrl strided": (LDRL, NETWORKS["strided"]),
    "ldrl by autograd": (partial(LDRL, speed=AUTOGRAD), NETWORKS["strided"]),
    "ldrl resnet": (LDRL, resnet),
    "ldrl resnet paper": (
        partial(LDRL, mirror="paper", noise_at="stage", feedback_step="sgd", feedback_lr=0.01),
        resnet,
    ),
    "dtp": (DTP, tanh_mlp),
    "dtp outer": (partial(DTP, mirror="outer", penultimate_target="gradient"), tanh_mlp),
    "tp": (TargetPropagation, tanh_mlp),
    "fw-dtp": (FixedWeightDTP, tanh_mlp),
    "fw-dtp standardized": (FixedWeightDTP, partial(tanh_mlp, standardize=True)),
    "gait-prop": (GAITProp, partial(InvertibleMLP, SHAPE, CLASSES, widths=(256, 128, 64))),
    "ddtp-control": (DDTPControl, tanh_mlp),
}
#: Degrees; what rounding in the products costs BP too. Most of it comes from kinks, on whose other side some units are.
ROUNDING = 3.0


@pytest.mark.parametrize(("make", "build"), METHODS.values(), ids=METHODS)
def test_forward_gradients_are_those_of_float32_but_for_the_rounding_of_products(
    make: Callable[..., Algorithm], build: Callable[[], Network]
) -> None:
    algorithm = make(build())
    exact = algorithm.forward_gradients(*draw_batch(64))
    before = copy_state(algorithm)
    with reduced():
        found = algorithm.forward_gradients(*draw_batch(64))
    assert changed(before, copy_state(algorithm)) == set()
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert 0.0 < angle(found, exact) < ROUNDING


def test_max_pooling_costs_other_algorithms_no_more_than_bp() -> None:
    """Rounding decides some of a window's near-ties otherwise, for every algorithm alike."""
    found = {}
    for make in (Backprop, FeedbackAlignment, LDRL, DTP):
        torch.manual_seed(0)
        algorithm = make(small_lenet())
        algorithm.symmetrize_feedback()
        exact = algorithm.forward_gradients(*draw_batch(64))
        with reduced():
            found[make] = angle(algorithm.forward_gradients(*draw_batch(64)), exact)
    assert all(other < 1.2 * found[Backprop] + 0.1 for other in found.values()), found
    assert found[Backprop] < 5.0


def two_projections(self: LayerMirror, outputs: Tensor, step: Tensor, switches: Tensor | None) -> Tensor:
    """The plain form: ``G(y + step) - G(y)``."""
    return self(outputs + step, switches) - self(outputs, switches)


@pytest.mark.parametrize("make", [LDRL, DTP])
def test_small_differences_keep_their_digits(
    make: Callable[..., TargetAlgorithm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With symmetric feedback and exact mirrors the update is BP's to O(beta), in bf16-mixed as in float32."""
    algorithm = make(tanh_mlp(), beta=0.01)
    algorithm.symmetrize_feedback()

    def to_backprop() -> float:
        return float(alignment_to_backprop(algorithm, *draw_batch(64))["overall"].angle)

    assert to_backprop() < 0.1
    with reduced():
        assert to_backprop() < 0.5
        monkeypatch.setattr(LayerMirror, "difference", two_projections)
        assert to_backprop() > 20.0  # the difference of two rounded results
        monkeypatch.undo()
        monkeypatch.setattr(precision, "products_of_autocast", lambda weight: nullcontext())
        assert to_backprop() > 5.0  # torch's autocast, whose activations are rounded, too


def test_the_way_back_through_a_block_carries_differences() -> None:
    algorithm = LDRL(resnet(), mirror="paper", noise_at="stage", feedback_step="sgd", feedback_lr=0.01, beta=1e-3)
    algorithm.requires_grad_(False)
    _, stage, mirror = algorithm.mirrored_stages()[0]
    output, switches = stage.run(torch.randn(16, *stage.input_shape))
    step = 1e-3 * torch.randn_like(output)
    exact = mirror.difference(output, step, switches).double()
    literal = mirror(output + step, switches) - mirror(output, switches)
    torch.testing.assert_close(literal.double(), exact, rtol=0, atol=1e-3 * float(exact.abs().max()))
    with reduced(), precision.products_of_autocast(next(mirror.parameters())):
        found = mirror.difference(output, step, switches).double()
        naive = (mirror(output + step, switches) - mirror(output, switches)).double()
    assert (found - exact).norm() < 0.01 * exact.norm() < (naive - exact).norm()


def test_the_reference_of_angles_is_in_float32() -> None:
    algorithm = Backprop(tanh_mlp())
    exact = algorithm.forward_gradients(*draw_batch(64))
    with reduced():
        rounding = angle(algorithm.forward_gradients(*draw_batch(64)), exact)
        measured = alignment_to_backprop(algorithm, *draw_batch(64))["overall"].angle
    assert float(measured) == pytest.approx(rounding, rel=1e-3)


# -- feedback training -----------------------------------------------------------------------------------------------

TRAINED: dict[str, tuple[Callable[..., TargetAlgorithm], Callable[[], Network]]] = {
    "ldrl": (LDRL, tanh_mlp),
    "ldrl by autograd": (partial(LDRL, speed=AUTOGRAD), tanh_mlp),
    "ldrl, little noise": (partial(LDRL, speed=AUTOGRAD, noise=0.001), tanh_mlp),
    "ldrl expected": (partial(LDRL, second_noise="expected"), tanh_mlp),
    "ldrl independent": (partial(LDRL, **INDEPENDENT), tanh_mlp),
    "ldrl independent by autograd": (partial(LDRL, speed=AUTOGRAD, **INDEPENDENT), tanh_mlp),
    "ldrl independent, little noise": (partial(LDRL, speed=AUTOGRAD, **(INDEPENDENT | {"noise": 0.01})), tanh_mlp),
    "ldrl strided": (LDRL, NETWORKS["strided"]),
    "ldrl resnet": (LDRL, resnet),
    "ldrl resnet independent": (partial(LDRL, **INDEPENDENT), resnet),
    "ldrl resnet, stage": (partial(LDRL, noise_at="stage", feedback_step="sgd", feedback_lr=1.0), resnet),
    "ldrl resnet, stage, independent": (
        partial(LDRL, noise_at="stage", feedback_step="sgd", **(INDEPENDENT | {"feedback_lr": 1e-3})),
        resnet,
    ),
    "parallel ldrl": (ParallelLDRL, tanh_mlp),
    "dtp": (DTP, tanh_mlp),
    "dtp by autograd": (partial(DTP, speed=AUTOGRAD), tanh_mlp),
    "dtp outer": (partial(DTP, mirror="outer"), tanh_mlp),
    "dtp resnet": (partial(DTP, feedback_lr=1e-4), resnet),
}


def course(
    make: Callable[..., TargetAlgorithm], build: Callable[[], Network], *around: torch.autocast
) -> tuple[Weights, Weights]:
    """Feedback weights before and after some iterations within one context."""
    torch.manual_seed(5)
    algorithm = make(build(), iterations=6)
    before = copy_state(algorithm.feedback)
    with around[0] if around else nullcontext():
        algorithm.train_feedback(draw_batch(64)[0])
    return before, copy_state(algorithm.feedback)


@pytest.mark.parametrize(("make", "build"), TRAINED.values(), ids=TRAINED)
def test_feedback_training_is_that_of_float32_but_for_the_rounding_of_products(
    make: Callable[..., TargetAlgorithm], build: Callable[[], Network]
) -> None:
    before, exact = course(make, build)
    _, found = course(make, build, reduced())
    moved = [{name: after[name] - before[name] for name in before if "weight" in name} for after in (found, exact)]
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert 0.0 < angle(*moved) < 1.0


@pytest.mark.parametrize(("make", "build"), TRAINED.values(), ids=TRAINED)
def test_every_iteration_multiplies_by_the_weights_as_they_are(
    make: Callable[..., TargetAlgorithm], build: Callable[[], Network]
) -> None:
    """All iterations of a step lie in one autocast context, whose copies of weights must not be used."""
    _, expected = course(make, build, torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
    _, found = course(make, build, reduced())
    assert changed(found, expected) == set()


def test_autocast_itself_would_multiply_by_stale_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap that the test above watches, so that it is known to notice."""
    monkeypatch.setattr(precision, "products_of_autocast", lambda weight: nullcontext())
    make, build = TRAINED["dtp by autograd"]
    _, expected = course(make, build, torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
    _, found = course(make, build, reduced())
    assert {name for name in found if "weight" in name} <= changed(found, expected)


# -- whole runs ------------------------------------------------------------------------------------------------------


@contextmanager
def passes_recorded(network: Network) -> Iterator[list[torch.dtype]]:
    found: list[torch.dtype] = []
    hooks = [
        stage.register_forward_hook(lambda stage, inputs, output: found.append(output.dtype))
        for _, stage in network.stages()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def test_activations_and_probabilities_are_float32() -> None:
    algorithm = Backprop(resnet())
    with reduced(), passes_recorded(algorithm.network) as found:
        logits = algorithm(draw_batch()[0])
    assert logits.dtype == torch.float32
    assert set(found) == {torch.float32}


@pytest.mark.parametrize(("precision", "low", "high"), [("32-true", 0.0, 0.01), ("bf16-mixed", 0.01, 5.0)])
def test_logged_angles_are_those_of_the_updates_in_the_runs_precision(
    precision: str, low: float, high: float, tmp_path: Path
) -> None:
    algorithm = Backprop(tanh_mlp())
    callback = AlignmentToBackprop()
    trainer = make_trainer(
        tmp_path, max_epochs=1, precision=precision, callbacks=[callback], logger=CSVLogger(tmp_path)
    )
    trainer.fit(algorithm, make_loader(), make_loader(1))
    assert low <= trainer.callback_metrics["angle/overall"].item() < high


@pytest.mark.parametrize("make", [DTPDRL, DDTPLinear, DDTPRHL])
def test_what_subtracts_whole_passes_is_refused_with_the_reason(make: type[Algorithm], tmp_path: Path) -> None:
    with refused(f"bf16-mixed is not supported by {make.__name__}", "differences between two passes", "32-true"):
        make_trainer(tmp_path, max_epochs=1, precision="bf16-mixed").fit(make(tanh_mlp()), make_loader())
    with refused("bf16-mixed is not supported"):
        make_trainer(tmp_path, precision="bf16-mixed").test(make(tanh_mlp()), make_loader())


@pytest.mark.parametrize(
    ("precision", "reason"), [("16-true", "below float16's range"), ("bf16-true", "below 1/512 of its size")]
)
@pytest.mark.parametrize("make", [Backprop, FeedbackAlignment, LDRL])
def test_weights_of_16_bits_are_refused(make: type[Algorithm], precision: str, reason: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1, precision=precision)
    with refused(f"precision {precision} is not supported by {make.__name__}", reason, "bf16-mixed"):
        trainer.fit(make(small_lenet()), make_loader())


def test_float16_autocast_from_python_is_refused() -> None:
    with torch.autocast("cpu", torch.float16), pytest.raises(UserError, match=r"float16 is not supported"):
        LDRL(small_lenet()).forward_gradients(*draw_batch())
