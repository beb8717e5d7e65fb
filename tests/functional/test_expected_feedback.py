"""The expected L-DRL loss against the mean of sampled ones, formed by autograd from the formula of the loss."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bioprop.errors import UserError
from bioprop.functional import expected_feedback
from bioprop.functional.expected_feedback import ExpectedLoss, check_covered, expected_loss, normals_shape
from bioprop.functional.expected_steps import expected_gradient
from bioprop.functional.feedback_losses import FeedbackGradient
from bioprop.functional.gaussian_moments import Moments
from bioprop.functional.pool_windows import ConvGeometry, WindowClasses, window_classes
from bioprop.functional.pooling import Pool
from bioprop.functional.precision import bfloat16_products
from tests.functional.plain_ldrl import PLAIN, PlainStage

ONE_PIXEL = ConvGeometry((1, 1), 1)
VGG_LIKE = ConvGeometry((6, 5), 3, 1, 1, Pool(2, 2))
POOLED = {
    "one window": ConvGeometry((2, 2), 3, 1, 1, Pool(2, 2)),
    "stride 2, padded pool": ConvGeometry((8, 7), 3, 2, 2, Pool(2, 2, 1)),
    "gaps between windows": ConvGeometry((6, 5), 2, 1, 0, Pool(2, 3)),
}
OVERLAPPING = {
    "kernel 5, pool 3": ConvGeometry((5, 5), 5, 1, 2, Pool(3, 2, 1)),
    "kernel 2, pool 3": ConvGeometry((4, 6), 2, 1, 1, Pool(3, 2)),
}
UNPOOLED = {
    "stride 1": ConvGeometry((4, 3), 3, 1, 1),
    "stride 2": ConvGeometry((6, 4), 3, 2, 1),
    "every second": ConvGeometry((5, 5), 3, 1, 0, Pool(1, 2)),
}
SIGMA, BATCH, ROUNDS = 0.5, 3, 16


def make_stage(geometry: ConvGeometry, form: str, activation: str = "elu") -> PlainStage:
    """Two units and channels; of one pixel, a linear stage."""
    dtype = torch.float64
    shape = (2, 5) if geometry == ONE_PIXEL else (2, 2, geometry.kernel_size, geometry.kernel_size)
    scale = (2.0 / torch.Size(shape[1:]).numel()) ** 0.5
    weight, feedback = scale * torch.randn(shape, dtype=dtype), scale * torch.randn(shape, dtype=dtype)
    inputs = torch.randn(BATCH, shape[1], *(() if len(shape) == 2 else geometry.input_size), dtype=dtype)
    return PlainStage(weight, torch.randn(2, dtype=dtype), feedback, inputs, activation, form, geometry)


def prepare(
    stage: PlainStage,
    clean_switches: bool = False,
    copies: int = 1,
    sigma: float = SIGMA,
    normals: Tensor | None = None,
) -> ExpectedLoss:
    inputs = stage.inputs.repeat(copies, *[1] * (stage.inputs.dim() - 1))
    shape = normals_shape(len(inputs), stage.geometry)
    if normals is None and shape is not None:
        normals = torch.randn(shape, dtype=torch.float64)
    output, switches = stage.run(inputs)
    settings = sigma, stage.activation, stage.form, stage.geometry, clean_switches
    return expected_loss(stage.weight, stage.feedback, stage.affine(inputs), output, switches, *settings, normals)


class Comparison(NamedTuple):
    """Sampled and expected gradients, losses and curvatures: mean over rounds and its variance, as one vector each."""

    sampled: Tensor
    expected: Tensor
    variance: Tensor

    @property
    def t(self) -> Tensor:
        """Differences in units of their standard error, of entries that are not 0 by construction."""
        assert torch.equal(self.sampled[self.variance == 0], self.expected[self.variance == 0])
        return ((self.sampled - self.expected) / self.variance.sqrt())[self.variance > 0]

    @property
    def resolution(self) -> float:
        """Standard error over all entries, relative to what is compared."""
        return (self.variance.sum().sqrt() / self.expected.norm()).item()


def as_vector(gradient: Tensor, loss: Tensor, curvature: Tensor) -> Tensor:
    return torch.cat([gradient.flatten(), loss.view(1), curvature])


def compare(stage: PlainStage, sampled_by: bool, expected_by: bool, copies: int) -> Comparison:
    """Both say whether the clean switches unpool the noisy output; smaller maps want more copies of the batch."""
    copies = int(copies / torch.Size(stage.geometry.map_size).numel() ** 0.5)
    sampled, expected = [], []
    for _ in range(ROUNDS):
        sampled.append(as_vector(*stage.sample(SIGMA, sampled_by, copies)))
        found = expected_gradient(prepare(stage, expected_by, copies // 3), stage.feedback)
        expected.append(as_vector(found.weight, found.loss, found.curvature))
    rounds = torch.stack(sampled), torch.stack(expected)
    variance = sum((each.var(0) / ROUNDS for each in rounds), torch.tensor(0.0))
    return Comparison(rounds[0].mean(0), rounds[1].mean(0), variance)


def assert_agrees(stage: PlainStage, clean_switches: bool) -> None:
    found = compare(stage, clean_switches, clean_switches, 9000)
    assert found.resolution < 0.025
    assert found.t.square().mean() < 2.5  # 1.15 if both agree, as the standard errors are estimates themselves
    assert found.t.abs().max() < 6


def assert_differs(stage: PlainStage, sampled_by: bool, expected_by: bool) -> None:
    assert compare(stage, sampled_by, expected_by, 3000).t.square().mean() > 5


switches = pytest.mark.parametrize("clean_switches", [False, True], ids=["noisy", "clean"])


@switches
@pytest.mark.parametrize("form", ["paper", "exact"])
def test_stage_like_those_of_simple_vgg(form: str, clean_switches: bool) -> None:
    assert_agrees(make_stage(VGG_LIKE, form), clean_switches)


@switches
@pytest.mark.parametrize("geometry", [*POOLED.values(), *OVERLAPPING.values()], ids=[*POOLED, *OVERLAPPING])
def test_pooled_stage_by_geometry(geometry: ConvGeometry, clean_switches: bool) -> None:
    assert_agrees(make_stage(geometry, "exact"), clean_switches)


@pytest.mark.parametrize(
    ("activation", "form", "clean_switches"),
    [
        ("elu", "paper", False),
        ("relu", "paper", False),
        ("relu", "exact", True),
        ("leaky_relu", "paper", True),
        ("tanh", "paper", True),
        ("tanh", "exact", False),
        ("identity", "exact", False),
        ("identity", "paper", True),
    ],
)
def test_pooled_stage_by_activation(activation: str, form: str, clean_switches: bool) -> None:
    assert_agrees(make_stage(POOLED["one window"], form, activation), clean_switches)


@pytest.mark.parametrize(("name", "form"), [("stride 1", "exact"), ("stride 2", "paper"), ("every second", "exact")])
def test_unpooled_stage(name: str, form: str) -> None:
    assert_agrees(make_stage(UNPOOLED[name], form), clean_switches=False)


@pytest.mark.parametrize(("activation", "form"), PLAIN)
def test_linear_stage(activation: str, form: str) -> None:
    assert_agrees(make_stage(ONE_PIXEL, form, activation), clean_switches=False)


# -- exact cases ------------------------------------------------------------------------------------------------------


def test_without_activation_the_gradient_is_the_distance_from_the_forward_weight() -> None:
    stage = make_stage(ONE_PIXEL, "exact", "identity")
    found = expected_gradient(prepare(stage), stage.feedback)
    difference = stage.feedback - stage.weight
    torch.testing.assert_close(found.weight, 2 * SIGMA**2 * difference, rtol=1e-12, atol=1e-14)
    expected = SIGMA**2 * (difference.square().sum() - stage.weight.square().sum())
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.curvature, torch.full((2,), 2 * SIGMA**2, dtype=torch.float64))


def test_without_activation_a_convolution_counts_the_places_of_each_tap() -> None:
    """Of a 3x3 kernel on 4x3 pixels the corner taps see 6 places, the middle one all 12."""
    stage = make_stage(UNPOOLED["stride 1"], "exact", "identity")
    places = torch.tensor([[6.0, 9, 6], [8, 12, 8], [6, 9, 6]], dtype=torch.float64)
    found = expected_gradient(prepare(stage), stage.feedback)
    expected = 2 * SIGMA**2 * places * (stage.feedback - stage.weight)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-10)


@switches
def test_attraction_by_quasi_random_noise(clean_switches: bool) -> None:
    """``A`` of one window and channel to 2 percent, both sides from the same number of points of a Sobol sequence."""
    stage, count = make_stage(POOLED["one window"], "exact"), 2**16
    stage = PlainStage(stage.weight[:1, :1], stage.bias[:1], 0 * stage.weight[:1, :1], stage.inputs[:1, :1], *stage[4:])
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=1).draw(count, dtype=torch.float64)
    z = torch.special.ndtri(points.clamp(1e-9, 1 - 1e-9))
    eps, (y, clean) = SIGMA * z.view(count, 1, 2, 2), stage.run(stage.inputs)
    noisy, noisy_switches = stage.run(stage.inputs + eps)
    chosen = clean.expand_as(noisy_switches) if clean_switches else noisy_switches
    change = stage.features(noisy, chosen) - stage.features(y, clean)
    V = stage.feedback.clone().requires_grad_()
    (expected,) = torch.autograd.grad((eps * stage.back(change, V)).sum() / count, V)
    found = prepare(stage, clean_switches, count, normals=z.view(1, count, 4, 1, 1)).A / count
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * expected.abs().max().item())


# -- mutations --------------------------------------------------------------------------------------------------------


def without_border(geometry: ConvGeometry, axis: int, *kind: Any) -> WindowClasses:
    """Let all windows be like one in the middle of an image without end."""
    right = window_classes(geometry, axis, *kind)
    endless = geometry._replace(input_size=(60, 60))
    middle = window_classes(endless, axis, *kind)
    inner = middle.shared[middle.of_window[len(middle.of_window) // 2]]
    return WindowClasses(right.of_window * 0, torch.ones_like(right.members[:1]), inner.unsqueeze(0))


def mutate(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    response, moments = expected_feedback._switching_response, expected_feedback.feature_moments

    def without_means(*args: Any) -> Moments:
        return Moments(0 * moments(*args).mean, moments(*args).variance)

    def means_twice(*args: Any) -> Moments:
        mean, variance = moments(*args)
        return Moments(mean, variance + mean**2)

    replacement: dict[str, tuple[str, Any]] = {
        "no border": ("window_classes", without_border),
        "places swapped": ("_switching_response", lambda *args: response(*args).mT),
        "wrong sign": ("_switching_response", lambda *args: -response(*args)),
        "places apart": ("_switching_response", lambda *args: response(*args).diagonal(dim1=-2, dim2=-1).diag_embed()),
        "no means": ("feature_moments", without_means),
        "means twice": ("feature_moments", means_twice),
    }
    monkeypatch.setattr(expected_feedback, *replacement[name])


@pytest.mark.parametrize("mutation", ["no border", "places swapped", "wrong sign", "places apart", "no means"])
def test_a_mutated_expectation_is_noticed(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By clean switches; by noisy ones places may be swapped, as ``T`` is the mean Hessian of a function of ``c``."""
    stage = make_stage(VGG_LIKE, "paper", "relu" if mutation == "no means" else "elu")
    mutate(monkeypatch, mutation)
    assert_differs(stage, True, True)


@pytest.mark.parametrize("mutation", ["no border", "wrong sign", "places apart"])
def test_a_mutated_expectation_is_noticed_by_noisy_switches(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, mutation)
    assert_differs(make_stage(VGG_LIKE, "exact"), False, False)


def test_counting_means_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, "means twice")
    assert_differs(make_stage(ONE_PIXEL, "exact", "relu"), False, False)


@switches
def test_the_switches_of_the_other_pass_are_noticed(clean_switches: bool) -> None:
    assert_differs(make_stage(VGG_LIKE, "exact"), clean_switches, not clean_switches)


# -- what else is promised --------------------------------------------------------------------------------------------


@switches
def test_one_sample_tells_far_more_than_one_of_the_plain_gradient(clean_switches: bool) -> None:
    """8 channels of 6x6 pixels: the variance is ten times smaller by noisy switches, by clean ones more."""
    geometry, dtype = ConvGeometry((6, 6), 3, 1, 1, Pool(2, 2)), torch.float64
    weight, inputs = torch.randn(8, 8, 3, 3, dtype=dtype) / 8, torch.randn(32, 8, 6, 6, dtype=dtype)
    stage = PlainStage(weight, weight[:, 0, 0, 0], 0 * weight, inputs, "elu", "exact", geometry)
    plain = [stage.sample(0.3, clean_switches, 1)[0] for _ in range(10)]
    expected = [prepare(stage, clean_switches, sigma=0.3).A / len(inputs) for _ in range(10)]
    gain = torch.stack(plain).var(0).sum() / (4 * torch.stack(expected).var(0).sum())
    assert gain > (100 if clean_switches else 8)


def test_samples_are_averaged() -> None:
    stage = make_stage(VGG_LIKE, "exact")
    normals = torch.randn(normals_shape(BATCH, VGG_LIKE, samples=2), dtype=torch.float64)
    both, first, second = (prepare(stage, normals=each).A for each in (normals, normals[:1], normals[1:]))
    torch.testing.assert_close(both, (first + second) / 2)


def arguments(stage: PlainStage, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    output, chosen = stage.run(stage.inputs)
    tensors = [stage.weight, stage.feedback, stage.affine(stage.inputs), output]
    return [*(each.to(dtype) for each in tensors), chosen]


@switches
@pytest.mark.parametrize("geometry", [VGG_LIKE, POOLED["one window"], ONE_PIXEL], ids=["conv", "one window", "linear"])
def test_preparing_leaves_no_trace(geometry: ConvGeometry, clean_switches: bool) -> None:
    stage = make_stage(geometry, "exact")
    given = [
        each.to(memory_format=torch.channels_last) if each.dim() == 4 else each
        for each in arguments(stage)
        if each is not None
    ]
    before, state = [each.clone() for each in given], torch.get_rng_state()
    shape = normals_shape(BATCH, geometry)
    normals = None if shape is None else torch.ones(shape, dtype=torch.float64)
    prepared = expected_loss(
        *given[:4], given[4] if shape else None, SIGMA, "elu", "exact", geometry, clean_switches, normals
    )
    expected_gradient(prepared, stage.feedback)
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(each.requires_grad for each in prepared if isinstance(each, Tensor))


@switches
def test_memory_format_autocast_and_precision_change_nothing(clean_switches: bool) -> None:
    stage = make_stage(POOLED["one window"], "exact")
    normals = torch.randn(normals_shape(BATCH, stage.geometry), dtype=torch.float64)
    settings = SIGMA, "elu", "exact", stage.geometry, clean_switches, normals
    plain = expected_gradient(expected_loss(*arguments(stage), *settings), stage.feedback).weight
    last = [each.to(memory_format=torch.channels_last) for each in arguments(stage)]
    torch.testing.assert_close(expected_gradient(expected_loss(*last, *settings), stage.feedback).weight, plain)
    with torch.autocast("cpu", torch.bfloat16), bfloat16_products():
        prepared = expected_loss(*arguments(stage, torch.float32), *settings)
    single = expected_gradient(prepared, stage.feedback.float()).weight
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), plain, rtol=1e-4, atol=1e-5)


@switches
def test_kernels_that_see_nothing_or_little_are_finite(clean_switches: bool) -> None:
    """A kernel of zeros; and one pixel seen from four places, whose noise is the same but for its size."""
    stage = make_stage(ConvGeometry((1, 1), 3, 1, 2, Pool(2, 1)), "exact")
    stage.weight[0] = 0.0
    found = expected_gradient(prepare(stage, clean_switches), stage.feedback).weight
    assert found.isfinite().all()
    assert prepare(stage, clean_switches).A[0].abs().max() == 0.0


def test_one_pixel_seen_from_four_places() -> None:
    assert_agrees(make_stage(ConvGeometry((1, 1), 2, 1, 1, Pool(2, 2)), "exact"), clean_switches=False)


def test_overlapping_windows_that_overwrite_are_refused() -> None:
    stage = make_stage(OVERLAPPING["kernel 5, pool 3"], "exact")
    with pytest.raises(UserError, match=r"^conv1 pools 3 pixels every 2, .* use mirror 'exact'"):
        check_covered("conv1", stage.geometry, "paper")
    with pytest.raises(UserError, match="use mirror 'exact'"):
        prepare(stage._replace(form="paper"))
    for geometry, form in ((stage.geometry, "exact"), (VGG_LIKE, "paper"), (ONE_PIXEL, "paper")):
        check_covered("conv1", geometry, form)


def test_a_pooled_stage_needs_normals() -> None:
    stage = make_stage(VGG_LIKE, "exact")
    with pytest.raises(ValueError, match="normals"):
        expected_loss(*arguments(stage), SIGMA, "elu", "exact", VGG_LIKE, True, None)
    assert normals_shape(BATCH, VGG_LIKE) == (1, BATCH, 4, 3, 2)
    assert normals_shape(BATCH, UNPOOLED["stride 2"]) is None


def test_the_gradient_is_a_feedback_gradient() -> None:
    stage = make_stage(ONE_PIXEL, "exact")
    found = expected_gradient(prepare(stage), stage.feedback)
    assert isinstance(found, FeedbackGradient)
    assert found.bias is None
