"""The closed form by tiles against the loss's own gradient, and when it is chosen."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bioprop.functional.tiled_feedback as module
from bioprop.functional.feedback_losses import FeedbackGradient, ldrl_gradient
from bioprop.functional.pooling import Pool
from bioprop.functional.speed import Speed
from bioprop.functional.tiled_feedback import TiledFeedback
from bioprop.functional.winograd import MOST_TAPS
from bioprop.networks import ConvStage, LinearStage, Stage, build_mirror
from bioprop.networks.layer_pairs import tiled_layer, tiled_where_it_pays
from tests.geometries import ACTIVATIONS, POOLS, few

SIGMA, BATCH = 0.3, 6
OVERLAPPING = Pool(3, 2, 1)
COMPILED = Speed(compile=True)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a `ConvStage` of stride 1, and of the rule."""
    taps = draw(st.sampled_from(range(1, MOST_TAPS + 1)))
    padding = draw(st.integers(0, taps - 1))
    height, width = (draw(st.integers(max(1, taps - 2 * padding), 9)) for _ in range(2))
    sizes = [side + 2 * padding - taps + 1 for side in (height, width)]
    pools = [pool for pool in POOLS if pool is None or min(pool.output_size(*sizes)) > 0]
    return {
        "input_shape": (draw(st.integers(1, 3)), height, width),
        "out_channels": draw(st.integers(1, 3)),
        "kernel_size": taps,
        "padding": padding,
        "pool": draw(st.sampled_from(pools)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "bias": draw(st.booleans()),
        "form": draw(st.sampled_from(["paper", "exact"])),
        "clean_switches": draw(st.booleans()),
        "antithetic": draw(st.booleans()),
        "blocks": draw(st.sampled_from([1, 2, 3, 6])),
    }


def images(noise: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Noise of a block as the other implementations take it."""
    return noise.view(*shape, -1).permute(3, 0, 1, 2)


def both(
    stage: ConvStage,
    form: str = "paper",
    rule: tuple[bool, bool] = (False, False),
    blocks: int = 1,
    compile: bool = False,
) -> tuple[FeedbackGradient, FeedbackGradient]:
    """The gradient by tiles and the loss's own, on the same inputs and noise, in the stage's precision."""
    mirror, dtype = build_mirror(stage, form).to(stage.weight.dtype), stage.weight.dtype
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "_block", lambda batch, size: batch // blocks)
        inputs = torch.randn(BATCH, *stage.input_shape, dtype=dtype)
        affine = stage.affine(inputs)
        output, switches = stage.activate(affine)
        tiled = TiledFeedback(tiled_layer(stage, mirror), stage.weight, affine, compile)
        noise = [SIGMA * torch.randn(shape, dtype=dtype) for shape in tiled.noise_shapes()]
        assert len(noise) == 2 * blocks
        found = tiled.gradient(mirror.weight, noise, SIGMA, *rule)
    eps = torch.cat([images(each, stage.input_shape) for each in noise[::2]])
    eta = torch.cat([images(each, stage.output_shape) for each in noise[1::2]])
    return found, ldrl_gradient(stage, mirror, inputs, output, switches, eps, eta, SIGMA, *rule)


def assert_same(found: FeedbackGradient, wanted: FeedbackGradient, tolerance: float) -> None:
    for name in ("weight", "loss", "curvature"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one - other).norm() <= tolerance * max(other.norm(), wanted.curvature.norm()), name


@few(150)
@given(cases())
def test_tiles_give_the_gradient_of_the_loss(case: dict[str, Any]) -> None:
    form, rule = case.pop("form"), (case.pop("clean_switches"), case.pop("antithetic"))
    blocks = case.pop("blocks")
    assert_same(*both(ConvStage(**case).double(), form, rule, blocks), 1e-11)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("input_tiles", lambda maps, tiling: module.input_tiles(maps.flip(1), tiling)),
        ("feedback_kernels", lambda weight, tiling: module.kernel_tiles(weight.transpose(0, 1), tiling)),
        ("weight_gradients", lambda one, other, tiling: (module.join_kernels(one, tiling),) * 2),
        ("retile", lambda products, size, tiling: [-each for each in module.retile(products, size, tiling)]),
        ("unpool", lambda values, switches, stage: stage.unpool(values, torch.zeros_like(switches))),
    ],
)
def test_a_planted_mistake_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str, fault: Any) -> None:
    stage = ConvStage((2, 8, 8), 3, 3, padding=1, pool=Pool(2, 2)).double()
    monkeypatch.setattr(module, "_passes", lambda *key: module.TilePasses(**{name: fault}))
    with pytest.raises(AssertionError):
        assert_same(*both(stage), 1e-3)


def test_blocks_are_equal_parts_that_stay_in_the_cache() -> None:
    assert module._block(128, module.BLOCK_BYTES // 64) == 64
    assert module._block(128, module.BLOCK_BYTES // 200) == 128
    assert module._block(90, module.BLOCK_BYTES // 40) == 30
    assert module._block(97, module.BLOCK_BYTES // 40) == 97
    assert module._block(4 * 97, module.BLOCK_BYTES // 40) == 97
    assert module._block(6, 2 * module.BLOCK_BYTES) == 1


def wide(channels: int = 64, taps: int = 3, size: int = 8, **more: Any) -> ConvStage:
    return ConvStage((channels, size, size), channels, taps, **({"padding": taps // 2} | more))


def test_tiles_are_for_wide_layers_that_are_compiled() -> None:
    for stage in (wide(), wide(taps=5, pool=OVERLAPPING), wide(size=4)):
        assert tiled_where_it_pays(stage, build_mirror(stage, "paper"), COMPILED) is not None
        assert tiled_where_it_pays(stage, build_mirror(stage, "paper"), Speed()) is None


@pytest.mark.parametrize(
    "stage",
    [wide(channels=32), wide(stride=2), wide(taps=7), wide(padding=3), wide(size=2), LinearStage((64,), 64, "elu")],
    ids=["narrow", "stride", "large kernel", "wide border", "2x2 map", "linear"],
)
def test_other_layers_keep_their_products(stage: Stage) -> None:
    assert tiled_where_it_pays(stage, build_mirror(stage, "paper"), COMPILED) is None


def test_bfloat16_keeps_its_products_where_they_are_faster() -> None:
    reduced = Speed(compile=True, bfloat16=True)
    for stage, by_tiles in ((wide(size=8), False), (wide(size=4), True)):
        assert (tiled_where_it_pays(stage, build_mirror(stage, "paper"), reduced) is not None) == by_tiles


@pytest.mark.slow  # a compiler takes its time
@pytest.mark.parametrize(("pool", "rule"), [(Pool(2, 2), (False, False)), (OVERLAPPING, (True, True))])
def test_compiled_passes_compute_the_same(pool: Pool, rule: tuple[bool, bool]) -> None:
    stage = ConvStage((16, 8, 8), 32, 3, padding=1, pool=pool)
    assert_same(*both(stage, rule=rule, blocks=2, compile=True), 1e-5)
