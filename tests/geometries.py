"""Small layers of every geometry, drawn by hypothesis, and how its tests run."""

from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from bioprop.functional.pooling import Pool
from bioprop.networks import ConvStage, LinearStage, Network, Stage

ACTIVATIONS = ["elu", "relu", "tanh", "leaky_relu", "identity"]
POOLS = [None, Pool(2, 2), Pool(3, 3), Pool(2, 3), Pool(3, 2, 1), Pool(3, 1, 1), Pool(2, 1)]


def few(examples: int) -> Any:
    """The same few examples in every run."""
    ignored = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    return settings(
        max_examples=examples,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=ignored,
    )


@st.composite
def conv_geometries(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a `ConvStage` that fit together; a third of the maps are at most 2x2."""
    largest = draw(st.sampled_from([2, 6, 7]))
    height, width = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    kernel, stride, padding = (draw(st.sampled_from(values)) for values in ([1, 3, 5], [1, 1, 2, 3], [0, 1, 2]))
    sizes = [(side + 2 * padding - kernel) // stride + 1 for side in (height, width)]
    pools = [pool for pool in POOLS if pool is None or min(pool.output_size(*sizes)) > 0]
    fits = min(sizes) > 0
    return {
        "input_shape": (draw(st.integers(1, 3)), height, width),
        "out_channels": draw(st.integers(1, 3)),
        "kernel_size": kernel if fits else 1,
        "stride": stride if fits else 1,
        "padding": padding if fits else 0,
        "pool": draw(st.sampled_from(pools)) if fits else None,
    }


@st.composite
def stages(draw: st.DrawFn, bias: bool | None = None) -> Stage:
    """A convolution (four times in five) or a linear stage."""
    common = {
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "bias": draw(st.booleans()) if bias is None else bias,
    }
    if draw(st.integers(0, 4)):
        return ConvStage(**draw(conv_geometries()), **common)
    return LinearStage(draw(st.sampled_from([(5,), (2, 3, 1)])), draw(st.integers(1, 4)), **common)


@st.composite
def networks(draw: st.DrawFn, bias: bool | None = None) -> Network:
    """Three stages, the middle one of any geometry, for images of one channel."""
    middle = draw(stages(bias))
    below: Stage
    if len(middle.input_shape) == 3:
        channels, *size = middle.input_shape
        below = ConvStage((1, *size), channels, 1, activation="tanh")
    else:
        below = LinearStage((1, 2, 2), middle.input_shape[0], "tanh")
    top = LinearStage(middle.output_shape, 3, "identity", bias is not False)
    return Network({"below": below, "middle": middle, "top": top}, {})
