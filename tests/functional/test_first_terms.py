"""Iterations prepared in groups against the same iterations one by one, by the closed form and by autograd."""

import weakref
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bioprop.functional import first_terms
from bioprop.functional.closed_forms import CleanPass, LayerPair, clean_pass, ldrl_closed_form
from bioprop.functional.feedback_losses import FeedbackGradient, ldrl_gradient
from bioprop.functional.first_terms import group_size, ldrl_in_groups, repeated
from bioprop.functional.layer_products import ConvProducts, LinearProducts
from bioprop.functional.pooling import Pool
from bioprop.functional.speed import DEFAULT_SPEED
from bioprop.networks import ConvStage, LinearStage, Mirror, Stage, build_mirror
from bioprop.networks.layer_pairs import layer_pair, noise_shape
from tests.functional.test_speed import Operations

SIGMA, BATCH, ITERATIONS = 0.3, 4, 5
STAGES: dict[str, Callable[[], Stage]] = {
    "linear": lambda: LinearStage((2, 3, 1), 4, "elu"),
    "linear identity": lambda: LinearStage((6,), 4, "identity"),
    "conv": lambda: ConvStage((2, 6, 5), 3, 3, padding=1, activation="elu"),
    "conv pooled": lambda: ConvStage((2, 6, 5), 3, 3, padding=1, activation="elu", pool=Pool(2, 2)),
    "conv overlapping": lambda: ConvStage((2, 7, 6), 3, 3, padding=1, activation="tanh", pool=Pool(3, 2, 1)),
    "conv strided identity": lambda: ConvStage((2, 6, 5), 3, 3, stride=2, activation="identity"),
    "conv small": lambda: ConvStage((2, 2, 2), 3, 3, padding=1, activation="elu", pool=Pool(2, 2)),
}


class Case(NamedTuple):
    """A stage with its mirror, a batch, and the noise of every iteration."""

    stage: Stage
    mirror: Mirror
    inputs: Tensor
    noise: list[tuple[Tensor, Tensor]]

    def pair(self) -> LayerPair:
        pair = layer_pair(self.stage, self.mirror, DEFAULT_SPEED)
        assert pair is not None
        return pair

    @torch.no_grad()
    def clean(self) -> CleanPass:
        affine = self.stage.affine(self.inputs)
        return clean_pass(self.pair(), affine, *self.stage.activate(affine))


Course = list[tuple[FeedbackGradient, Tensor]]
Rule = tuple[bool, bool]


def make_case(kind: str, form: str = "exact", layout: torch.memory_format = torch.contiguous_format) -> Case:
    stage = STAGES[kind]().double()
    inputs = torch.randn(BATCH, *stage.input_shape, dtype=torch.float64)
    inputs = inputs.contiguous(memory_format=layout) if inputs.dim() == 4 else inputs
    shapes = noise_shape(stage, inputs), (BATCH, *stage.output_shape)
    noise = [tuple(SIGMA * torch.randn(shape, dtype=torch.float64) for shape in shapes) for _ in range(ITERATIONS)]
    return Case(stage, build_mirror(stage, form).double(), inputs, noise)


@torch.no_grad()
def course(case: Case, gradient_at: Callable[[int], FeedbackGradient]) -> Course:
    """Every iteration's gradient, and the weight after its step; the mirror is left as it was."""
    start, found = case.mirror.weight.detach().clone(), []
    for iteration in range(ITERATIONS):
        gradient = gradient_at(iteration)
        case.mirror.weight -= 0.1 * gradient.weight
        found.append((gradient, case.mirror.weight.detach().clone()))
    case.mirror.weight.copy_(start)
    return found


def one_by_one(case: Case, rule: Rule) -> Course:
    pair, clean = case.pair(), case.clean()
    weight = pair.products.prepare(pair.weight)
    return course(
        case,
        lambda iteration: ldrl_closed_form(
            pair, weight, clean, case.mirror.weight, *case.noise[iteration], SIGMA, *rule
        ),
    )


def by_autograd(case: Case, rule: Rule) -> Course:
    with torch.no_grad():
        output, switches = case.stage.run(case.inputs)

    def gradient_at(iteration: int) -> FeedbackGradient:
        eps, eta = case.noise[iteration]
        values = case.inputs, output, switches, eps.view(case.inputs.shape), eta
        return ldrl_gradient(case.stage, case.mirror, *values, SIGMA, *rule)

    return course(case, gradient_at)


def in_groups(case: Case, rule: Rule, group: int, drawn: list[int] | None = None) -> Course:
    pair = case.pair()

    def draw(first: int, count: int) -> Sequence[Tensor]:
        if drawn is not None:
            drawn.append(count)
        return [torch.cat(parts) for parts in zip(*case.noise[first : first + count], strict=True)]

    weight = pair.products.prepare(pair.weight)
    feedback = case.mirror.weight
    return course(case, ldrl_in_groups(pair, weight, case.clean(), feedback, draw, ITERATIONS, group, SIGMA, *rule))


def assert_same_course(found: Course, expected: Course) -> None:
    assert len(found) == len(expected)
    for (gradient, weight), (wanted, wanted_weight) in zip(found, expected, strict=True):
        assert list(gradient.parameters) == ["weight"]
        for one, other in (
            (gradient.weight, wanted.weight),
            (gradient.loss, wanted.loss),
            (gradient.curvature, wanted.curvature),
            (weight, wanted_weight),
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


RULES = pytest.mark.parametrize(
    "rule",
    list(product((False, True), repeat=2)),
    ids=["noisy", "noisy antithetic", "clean", "clean antithetic"],
)


@RULES
@pytest.mark.parametrize("form", ["paper", "exact"])
@pytest.mark.parametrize("kind", STAGES)
def test_a_course_in_groups_is_the_course_one_by_one(kind: str, form: str, rule: Rule) -> None:
    case = make_case(kind, form)
    single, autograd = one_by_one(case, rule), by_autograd(case, rule)
    assert all((gradient.weight != 0).any() for gradient, _ in single)
    for group in (1, 2, 3, ITERATIONS, ITERATIONS + 2):
        found = in_groups(case, rule, group)
        assert_same_course(found, single)
        assert_same_course(found, autograd)


@pytest.mark.parametrize("kind", ["conv", "conv pooled", "conv overlapping"])
def test_the_layout_of_the_maps_makes_no_difference(kind: str) -> None:
    case = make_case(kind, layout=torch.channels_last)
    assert case.clean().affine.is_contiguous(memory_format=torch.channels_last)
    assert repeated(case.clean(), 3).features.is_contiguous(memory_format=torch.channels_last)
    assert_same_course(in_groups(case, (True, False), 3), by_autograd(case, (True, False)))


def test_float32_stays_float32_and_close() -> None:
    case = make_case("conv pooled")
    expected = in_groups(case, (True, False), 2)
    noise = [(eps.float(), eta.float()) for eps, eta in case.noise]
    single = Case(case.stage.float(), case.mirror.float(), case.inputs.float(), noise)
    for (found, _), (wanted, _) in zip(in_groups(single, (True, False), 2), expected, strict=True):
        assert {found.weight.dtype, found.loss.dtype, found.curvature.dtype} == {torch.float32}
        torch.testing.assert_close(found.weight, wanted.weight.float(), rtol=1e-4, atol=1e-5)


def test_nothing_is_drawn_beyond_the_last_iteration() -> None:
    sizes = {}
    for group in (1, 2, 3, 9):
        sizes[group] = []
        in_groups(make_case("linear"), (True, False), group, sizes[group])
    assert sizes == {1: [1] * 5, 2: [2, 2, 1], 3: [3, 2], 9: [5]}


def test_what_was_used_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the objective lives, no map of a past group does."""
    prepare, maps = first_terms.first_terms, []

    def noted(*given: Any) -> list[Any]:
        found = prepare(*given)
        maps.extend(weakref.ref(each.second) for each in found)
        return found

    monkeypatch.setattr(first_terms, "first_terms", noted)
    case = make_case("conv pooled")
    pair, noise = case.pair(), [torch.cat(parts) for parts in zip(*case.noise[:2], strict=True)]
    weight = pair.products.prepare(pair.weight)
    gradient_at = ldrl_in_groups(pair, weight, case.clean(), case.mirror.weight, lambda *_: noise, 4, 2, SIGMA)
    for iteration in range(3):
        gradient_at(iteration)
    assert [each() is None for each in maps] == [True, True, True, False]


# -- mistakes ----------------------------------------------------------------------------------------------------------


def another_iterations_gradients(patch: pytest.MonkeyPatch) -> None:
    for products in (ConvProducts, LinearProducts):
        right = products.weight_gradients
        patch.setattr(products, "weight_gradients", lambda *given, right=right: list(right(*given))[::-1])


def samples_in_another_order(patch: pytest.MonkeyPatch) -> None:
    """Each sample of the clean pass beside itself, not batch after batch."""

    right = first_terms.repeated

    def interleaved(clean: CleanPass, times: int) -> CleanPass:
        order = torch.arange(times * BATCH).view(times, BATCH).t().flatten()
        return right(clean, times).block(order)

    patch.setattr(first_terms, "repeated", interleaved)


def weight_of_the_groups_start(patch: pytest.MonkeyPatch) -> None:
    """The second term by a weight that is not stepped on within the course."""
    kept: dict[str, Tensor] = {}
    right = first_terms.ldrl_after

    def stale(pair: Any, ready: Any, feedback: Tensor) -> FeedbackGradient:
        return right(pair, ready, kept.setdefault("weight", feedback.detach().clone()))

    patch.setattr(first_terms, "ldrl_after", stale)


def curvature_of_the_group(patch: pytest.MonkeyPatch) -> None:
    right = first_terms.first_terms

    def averaged(*given: Any) -> list[Any]:
        found = right(*given)
        mean = torch.stack([each.curvature for each in found]).mean(0)
        return [each._replace(curvature=mean) for each in found]

    patch.setattr(first_terms, "first_terms", averaged)


@pytest.mark.parametrize("kind", ["linear", "conv pooled", "conv overlapping"])
@pytest.mark.parametrize(
    "plant",
    [
        another_iterations_gradients,
        samples_in_another_order,
        weight_of_the_groups_start,
        curvature_of_the_group,
    ],
)
def test_a_mistake_in_a_group_is_noticed(
    plant: Callable[[pytest.MonkeyPatch], None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(kind)
    expected = one_by_one(case, (True, False))
    assert_same_course(in_groups(case, (True, False), 3), expected)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same_course(in_groups(case, (True, False), 3), expected)


# -- what it costs -----------------------------------------------------------------------------------------------------


def operations(case: Case, group: int) -> dict[str, int]:
    with Operations() as counted:
        in_groups(case, (True, False), group)
    return counted.counts


@pytest.mark.parametrize(("group", "groups"), [(1, 5), (2, 3), (3, 2), (5, 1)])
def test_there_is_one_forward_product_a_group(group: int, groups: int) -> None:
    """And one pass of pooling and unpooling; each iteration is left a transposed product and two weight gradients."""
    found = operations(make_case("conv pooled"), group)
    clean_pass_of_the_batch = 1
    assert found["convolution"] == clean_pass_of_the_batch + groups + ITERATIONS
    assert found["convolution_backward"] == 2 * ITERATIONS
    assert found["max_pool2d_with_indices"] == clean_pass_of_the_batch + groups
    assert found["max_unpool2d"] == clean_pass_of_the_batch + 2 * groups
    assert not {name for name in found if "item" in name or "local_scalar" in name}


def test_the_first_gradients_of_a_linear_stage_are_one_product_a_group() -> None:
    case = make_case("linear")
    assert [operations(case, group)["bmm"] for group in (1, 2, 5)] == [5, 3, 1]
    few, many = operations(case, 5), operations(case, 1)
    products = [sum(each.get(name, 0) for name in ("mm", "addmm")) for each in (few, many)]
    assert products[1] - products[0] == 4  # forward products


def test_groups_are_even_and_keep_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_terms, "GROUP_BYTES", 8 * 100 * 8)  # eight maps of 100 numbers
    maps, small = torch.empty(4, 25, dtype=torch.float64), torch.empty(3)
    assert [group_size(iterations, small, maps) for iterations in (1, 5, 8, 9, 20, 24)] == [1, 5, 8, 5, 7, 8]
    assert group_size(20, torch.empty(801, dtype=torch.float64), small) == 1  # fills it alone
    assert group_size(20, torch.empty(0)) == 20


def test_a_group_of_large_maps_is_a_single_iteration() -> None:
    large = torch.empty(1, device="meta").expand(first_terms.GROUP_BYTES // 4)
    assert group_size(50, large[1:]) == 1
    assert group_size(50, large[: len(large) // 2]) == 2
