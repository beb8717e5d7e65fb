"""How many iterations, on which images, along which noise, and how large a step: all from sizes."""

from collections.abc import Callable
from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bioprop.feedback.losses import curvature_by_autograd, echo_gradient
from bioprop.feedback.noise import ALONE, Peers, Probing, along_activities, scale_of
from bioprop.feedback.training import normalized_step
from bioprop.functional.pooling import Pool
from bioprop.networks import ConvStage, LinearStage, Mirror, Stage, build_mirror
from tests.feedback.given_noise import rule_of
from tests.geometries import few

# -- sizes, by hand ----------------------------------------------------------------------------------------------------


def peers(size: int) -> Peers:
    """Of equal rows, so that means and gathered rows are known."""
    return Peers(size, 0, lambda tensors: tensors, lambda rows: rows.repeat_interleave(size, 0))


def probing(batch: int, fan_in: int, positions: int, **settings: object) -> Probing:
    return Probing(torch.ones(batch, 5), fan_in, positions, **settings)


@pytest.mark.parametrize(
    ("batch", "fan_in", "positions", "images", "along"),
    [
        (128, 27, 256, 8, False),  # one image would do
        (128, 1152, 64, 40, False),  # 36 images, in eights
        (128, 2304, 16, 128, False),  # 288 images, but sixteen positions
        (128, 2304, 4, 128, True),  # r = 4.5
        (128, 2304, 5, 128, True),  # r = 3.6
        (128, 2304, 6, 128, False),  # r = 3
        (128, 32, 1, 64, False),  # a linear stage: half the batch
        (128, 64, 1, 128, False),
        (128, 65, 1, 128, True),
        (5, 2, 1, 5, False),  # fewer images than eight
        (2, 1, 1, 2, False),
        (1, 1, 1, 1, True),
    ],
)
def test_images_and_directions_follow_from_the_sizes(
    batch: int, fan_in: int, positions: int, images: int, along: bool
) -> None:
    found = probing(batch, fan_in, positions)
    assert found.ratio == pytest.approx(fan_in / (batch * positions))
    assert found.images == images
    assert [found.is_along(draw) for draw in range(4)] == [False, along, False, along]
    assert [found.shape(draw) for draw in range(2)] == [(images, 5), None if along else (images, 5)]


def test_integrated_out_it_takes_the_whole_batch_and_never_the_activities() -> None:
    for fan_in in (3, 3000):
        found = probing(20, fan_in, 1, echo=False)
        assert found.images == 20
        assert not any(found.is_along(draw) for draw in range(4))
        assert found.shape(3) == (20, 5)


def test_iterations_that_are_given_take_the_whole_batch_and_turn_in_turn() -> None:
    found = probing(20, 6, 1, whole=True)
    assert found.images == 20
    assert not any(found.is_along(draw) for draw in range(5))
    found = probing(20, 100, 1, whole=True)
    assert [found.is_along(draw) for draw in range(5)] == [False, True, False, True, False]
    assert [found.shape(draw) for draw in range(5)] == [(20, 5), None, (20, 5), None, (20, 5)]


def test_all_samples_of_an_iteration_are_of_one_kind() -> None:
    found = probing(20, 100, 1, samples=3)
    assert [found.is_along(draw) for draw in range(6)] == [False] * 3 + [True] * 3
    assert found.shape(2) == (20, 5)


def test_several_processes_share_the_sizes_of_the_whole_batch() -> None:
    alone, shared = probing(128, 1152, 64), probing(32, 1152, 64, peers=peers(4))
    assert shared.ratio == alone.ratio
    assert 4 * shared.images == alone.images
    assert shared.damping(0) == alone.damping(0)
    alone, shared = probing(128, 4000, 1), probing(32, 4000, 1, peers=peers(4))
    assert shared.images == 32
    assert shared.is_along(1)
    assert alone.is_along(1)
    assert [shared.damping(draw) for draw in (0, 1)] == [alone.damping(draw) for draw in (0, 1)]


def test_the_damping_is_the_curvature_of_a_single_sample() -> None:
    """White: ``2 sigma^2 fan_in / samples``, times the windows over a position; ten times it without an echo."""
    sigma = 0.1
    assert probing(20, 8, 1, noise=sigma).damping(0) == pytest.approx(2 * sigma**2 * 8 / 16)  # of 20 images
    assert probing(20, 8, 1, noise=sigma, whole=True).damping(0) == pytest.approx(2 * sigma**2 * 8 / 20)
    assert probing(20, 8, 1, noise=sigma, whole=True, samples=4).damping(2) == pytest.approx(2 * sigma**2 * 8 / 80)
    assert probing(20, 8, 1, overlap=2.25, noise=sigma).damping(0) == pytest.approx(2 * sigma**2 * 2.25 * 8 / 16)
    assert probing(20, 10, 1, echo=False, noise=sigma).damping(0) == pytest.approx(2 * sigma**2 * 100 / 20)


def test_along_the_activities_it_is_what_orthonormal_rows_can_do_together() -> None:
    """``2 sigma^2 features positions / batch``, here 5 features; times half the positions a window chooses from."""
    assert probing(20, 500, 3, noise=0.1).damping(1) == pytest.approx(2 * 0.1**2 * 5 * 3 / 20)
    assert probing(20, 500, 3, area=4.0, noise=0.1).damping(1) == pytest.approx(2 * 0.1**2 * 5 * 6 / 20)
    curvature = torch.tensor([0.5, 0.0])
    asked = probing(20, 500, 3, noise=0.1)
    torch.testing.assert_close(asked.damped(curvature, 1), torch.full((2,), asked.damping(1)))
    torch.testing.assert_close(asked.damped(curvature, 0), curvature + asked.damping(0))


def test_noise_is_a_hundredth_of_the_activities_root_mean_square() -> None:
    inputs = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    assert scale_of(inputs).item() == pytest.approx(sqrt(50 / 4))
    assert float(Probing(inputs, 2, 1).sigma) == pytest.approx(0.01 * sqrt(50 / 4))
    assert float(Probing(0 * inputs, 2, 1).sigma) == pytest.approx(1e-5)  # a dead stage needs noise, too
    assert Probing(inputs, 2, 1, noise=0.3).sigma == 0.3
    shared = Peers(2, 0, lambda tensors: [tensor / 2 for tensor in tensors], ALONE.gather)  # the other's are zero
    assert scale_of(inputs, shared).item() == pytest.approx(sqrt(50 / 8))


def test_white_noise_is_the_normals_times_sigma() -> None:
    found = Probing(torch.ones(3, 2), 2, 1, noise=0.5, whole=True)
    normals = torch.randn(3, 2)
    assert torch.equal(found.noise(normals.clone()), 0.5 * normals)


def test_each_process_has_its_rows_of_the_basis() -> None:
    inputs = torch.randn(6, 9, dtype=torch.float64)
    whole = Probing(inputs, 60, 1, noise=0.1).noise(None)
    for rank in range(2):
        shared = Peers(2, rank, lambda tensors: tensors, lambda rows: inputs)
        part = Probing(inputs[rank::2], 60, 1, noise=0.1, peers=shared).noise(None)
        assert torch.equal(part, whole[rank::2])


# -- white noise: least mean squares ----------------------------------------------------------------------------------


def step_of(mirror: Mirror, stage: Stage, inputs: Tensor, asked: Probing, draw: int, normals: Tensor | None) -> None:
    """One iteration, by autograd."""
    with torch.no_grad():
        output, switches = stage.run(inputs)
    eps = torch.zeros_like(inputs)
    eps[: asked.images] = asked.noise(normals)
    found = echo_gradient(stage, mirror, inputs, output, switches, eps)
    share = len(inputs) / asked.images
    parameters = {name: share * each for name, each in found.parameters.items()}
    curvature = curvature_by_autograd(mirror, output, switches, asked.sigma**2, asked.images, by_taps=False)
    damped = found._replace(parameters=parameters, curvature={"weight": asked.damped(curvature, draw)})
    normalized_step(dict(mirror.named_parameters()), damped, None)


@pytest.mark.parametrize(("fan_in", "batch"), [(30, 10), (20, 20), (12, 48)])
def test_the_squared_error_falls_by_what_least_mean_squares_promises(fan_in: int, batch: int) -> None:
    """By ``r / (1 + r)`` on a linear stage, and what samples of four moments add; over 300 random feedback weights."""
    stage = LinearStage((fan_in,), 5, "identity").double()
    mirror, inputs = build_mirror(stage, "exact").double(), torch.randn(batch, fan_in, dtype=torch.float64)
    asked, ratios = Probing(inputs, fan_in, 1, noise=1e-2, whole=True), []
    for _ in range(300):
        torch.nn.init.normal_(mirror.weight)
        before = (mirror.weight - stage.weight).square().sum()
        step_of(mirror, stage, inputs, asked, 0, torch.randn(batch, fan_in, dtype=torch.float64))
        ratios.append(((mirror.weight - stage.weight).square().sum() / before).item())
    expected = asked.ratio / (1 + asked.ratio) + 1 / (1 + asked.ratio) ** 2 / batch
    assert sum(ratios) / len(ratios) == pytest.approx(expected, rel=0.03)


# -- noise along the activities ---------------------------------------------------------------------------------------

SIGMA = 0.1


def lengths(features: int) -> float:
    return SIGMA * sqrt(features)


def test_its_rows_are_orthonormal_and_as_long_as_white_noise() -> None:
    inputs = torch.randn(6, 40, dtype=torch.float64)
    rows = along_activities(inputs, SIGMA) / lengths(40)
    assert (rows @ rows.t() - torch.eye(6, dtype=torch.float64)).norm() < 1e-3  # the ridge


def test_they_span_what_the_activities_span() -> None:
    inputs = torch.randn(6, 3, 4, 2, dtype=torch.float64)
    rows = along_activities(inputs, SIGMA)
    assert rows.shape == inputs.shape
    onto = torch.linalg.pinv(inputs.flatten(1)) @ inputs.flatten(1)
    torch.testing.assert_close(rows.flatten(1) @ onto, rows.flatten(1))
    assert torch.linalg.matrix_rank(rows.flatten(1)) == 6


INPUTS: dict[str, Callable[[], Tensor]] = {
    "random": lambda: torch.randn(8, 12),
    "more images than features": lambda: torch.randn(30, 12),
    "all the same": lambda: torch.ones(8, 12),
    "zero": lambda: torch.zeros(8, 12),
    "one image": lambda: torch.randn(1, 12),
    "one image among zeros": lambda: torch.eye(8, 12)[:1].repeat(8, 1) * torch.eye(8)[:, :1],
    "nearly the same": lambda: 1 + 1e-5 * torch.randn(8, 12),
    "huge": lambda: 1e15 * torch.randn(8, 12),
    "tiny": lambda: 1e-15 * torch.randn(8, 12),
    "of all sizes": lambda: torch.randn(8, 12) * 10.0 ** torch.arange(-6, 2)[:, None],
}


@pytest.mark.parametrize("draw", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_bounded_whatever_the_activities(draw: Callable[[], Tensor], dtype: torch.dtype) -> None:
    """No direction is longer than a row of an orthonormal basis."""
    rows = along_activities(draw().to(dtype), SIGMA) / lengths(12)
    assert rows.isfinite().all()
    assert torch.linalg.matrix_norm(rows.double(), 2) < 1.01


def error_after_a_step_along_the_activities(
    batch: int, features: int, activation: str, error: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Probing]:
    """``V - W`` before and after."""
    stage = LinearStage((features,), 4, activation).double()
    mirror, inputs = build_mirror(stage, "exact").double(), torch.randn(batch, features, dtype=torch.float64)
    asked = Probing(inputs, features, 1, noise=1e-4)
    before = error(inputs)
    with torch.no_grad():
        mirror.weight.copy_(stage.weight + before)
    step_of(mirror, stage, inputs, asked, 1, None)
    return before, (mirror.weight - stage.weight).detach(), asked


def within_the_span(inputs: Tensor) -> Tensor:
    return torch.randn(4, len(inputs), dtype=torch.float64) @ inputs


@pytest.mark.parametrize(("batch", "features"), [(4, 8), (4, 40), (4, 1000)])
def test_one_step_removes_an_error_within_their_span(batch: int, features: int) -> None:
    """But for the ridge."""
    before, after, _ = error_after_a_step_along_the_activities(batch, features, "identity", within_the_span)
    assert after.norm() < 1e-3 * before.norm()


def test_what_lies_outside_their_span_stays() -> None:
    def outside(inputs: Tensor) -> Tensor:
        error = torch.randn(4, inputs.shape[1], dtype=torch.float64)
        return error - error @ torch.linalg.pinv(inputs) @ inputs

    before, after, _ = error_after_a_step_along_the_activities(4, 40, "identity", outside)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-9)


@few(60)
@given(
    batch=st.integers(1, 8),
    more=st.integers(1, 30),
    activation=st.sampled_from(["identity", "elu", "tanh", "leaky_relu", "relu"]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_a_step_never_makes_a_units_error_larger(
    batch: int, more: int, activation: str, scale: float, seed: int
) -> None:
    """Whatever the slopes: units that are dead, saturated, or linear for some images alone."""
    torch.manual_seed(seed)
    stage = LinearStage((batch + more,), 4, activation).double()
    mirror = build_mirror(stage, "exact").double()
    inputs = scale * torch.randn(batch, batch + more, dtype=torch.float64)
    asked = Probing(inputs, batch + more, 1, noise=1e-7 * scale)  # no kink nearby
    before = (mirror.weight - stage.weight).detach()
    step_of(mirror, stage, inputs, asked, 1, None)
    after = (mirror.weight - stage.weight).detach()
    assert (after.norm(dim=1) <= before.norm(dim=1) * (1 + 1e-5)).all()


def test_a_larger_step_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probing, "damped", lambda self, curvature, draw: 0.3 * curvature)
    before, after, _ = error_after_a_step_along_the_activities(4, 40, "identity", within_the_span)
    assert after.norm() > before.norm()


@pytest.mark.parametrize("pool", [None, Pool(2, 2), Pool(3, 2, 1)], ids=["not pooled", "pooled", "overlapping windows"])
def test_nor_on_convolutions_of_random_images(pool: Pool | None) -> None:
    for _ in range(20):
        stage = ConvStage((60, 4, 4), 3, 3, padding=1, activation="elu", pool=pool).double()
        mirror, inputs = build_mirror(stage, "exact").double(), torch.randn(4, 60, 4, 4, dtype=torch.float64)
        size = stage.output_shape[1] * stage.output_shape[2]
        asked = rule_of("echo", 1e-5).probing(inputs, mirror.weight, torch.empty(1, 1, size), 16, pool)
        assert asked.is_along(1)
        before = (mirror.weight - stage.weight).detach()
        step_of(mirror, stage, inputs, asked, 1, None)
        after = (mirror.weight - stage.weight).detach()
        assert after.norm() < before.norm()


def test_nor_where_one_pattern_moves_from_image_to_image() -> None:
    """Orthogonal as images, the same patch at the places that the windows choose: the worst that pooling can do."""
    stage = ConvStage((8, 2, 2), 1, 1, activation="identity", pool=Pool(2, 2), bias=False).double()
    mirror, pattern = build_mirror(stage, "exact").double(), torch.randn(8, dtype=torch.float64)
    inputs = torch.zeros(4, 8, 4, dtype=torch.float64)
    inputs[range(4), :, range(4)] = pattern
    with torch.no_grad():
        stage.weight.copy_(pattern.view_as(stage.weight))
        mirror.weight.copy_(2 * stage.weight)
    asked = rule_of("echo", 1e-5).probing(inputs.view(4, 8, 2, 2), mirror.weight, torch.empty(1, 1, 1), 4, stage.pool)
    step_of(mirror, stage, inputs.view(4, 8, 2, 2), asked, 1, None)
    assert (mirror.weight - stage.weight).norm() <= stage.weight.norm() * (1 + 1e-3)
