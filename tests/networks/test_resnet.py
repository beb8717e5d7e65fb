"""Residual networks for small images: shapes, published sizes, arithmetic, refusals."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.algorithms import DTP, LDRL, Backprop, DirectFeedbackAlignment, FeedbackAlignment
from bioprop.errors import UserError
from bioprop.networks import (
    BlockMirror,
    Network,
    PooledLinearMirror,
    PooledLinearStage,
    ResNet,
    ResNet18,
    ResNet34,
    StemMirror,
    StemStage,
    build_network,
)

RGB, SHAPE = (3, 32, 32), (1, 16, 16)
NARROW, WIDE = (16, 32, 64), (64, 128, 256, 512)


def small_resnet(**settings: Any) -> ResNet:
    return ResNet(SHAPE, 10, **({"blocks": (1, 2), "widths": (4, 6)} | settings))


def count_by_formula(blocks: tuple[int, ...], widths: tuple[int, ...]) -> int:
    """Convolutions without bias, batch norm's two per channel, 1x1 shortcuts at each change of width."""
    total, below = 3 * 9 * widths[0] + 2 * widths[0], widths[0]
    for count, width in zip(blocks, widths, strict=True):
        for _ in range(count):
            total += 9 * below * width + 9 * width * width + 4 * width
            total += below * width + 2 * width if below != width else 0
            below = width
    return total + 10 * below + 10


@pytest.mark.parametrize(
    ("blocks", "widths", "layers", "parameters"),
    [
        ((2, 2, 2, 2), WIDE, 18, 11_173_962),
        ((3, 4, 6, 3), WIDE, 34, 21_282_122),
        ((3, 3, 3), NARROW, 20, 272_474),
        ((9, 9, 9), NARROW, 56, 855_770),
    ],
    ids=["ResNet-18", "ResNet-34", "ResNet-20", "ResNet-56"],
)
def test_published_sizes(blocks: tuple[int, ...], widths: tuple[int, ...], layers: int, parameters: int) -> None:
    with torch.device("meta"):  # 21 million weights need not be drawn to be counted
        network = ResNet(RGB, 10, blocks, widths)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert parameters == count_by_formula(blocks, widths)
    weighted = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(weighted) == layers


def test_the_defaults_are_resnet_20() -> None:
    settings = ResNet(RGB, 10).settings
    assert (settings["blocks"], settings["widths"]) == ([3, 3, 3], [16, 32, 64])
    assert (settings["activation"], settings["batch_norm"]) == ("relu", True)


@pytest.mark.parametrize(
    ("size", "sides"), [((32, 32), [(32, 32), (16, 16), (8, 8)]), ((15, 9), [(15, 9), (8, 5), (4, 3)])]
)
def test_every_group_but_the_first_halves_the_image(size: tuple[int, int], sides: list[tuple[int, int]]) -> None:
    network = ResNet((3, *size), 7, blocks=(2, 1, 2), widths=(4, 5, 6))
    full, half, quarter = ((width, *side) for width, side in zip((4, 5, 6), sides, strict=True))
    expected = [full, full, full, half, quarter, quarter, (7,)]
    names = ["stem", "block1_1", "block1_2", "block2_1", "block3_1", "block3_2", "fc"]
    assert [name for name, _ in network.stages()] == names
    state = torch.randn(2, 3, *size)
    for (_, stage), shape in zip(network.stages(), expected, strict=True):
        assert tuple(state.shape[1:]) == tuple(stage.input_shape)
        state = stage(state)
        assert tuple(state.shape[1:]) == tuple(stage.output_shape) == shape


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_it_computes_what_its_paper_describes(batch_norm: bool, activation: str) -> None:
    network = small_resnet(batch_norm=batch_norm, activation=activation).double()
    parameters, rho = dict(network.named_parameters()), getattr(F, activation)
    images = torch.randn(4, *SHAPE, dtype=torch.float64)

    def conv(state: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        weight = parameters[f"{name}.weight"]
        state = F.conv2d(state, weight, parameters.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)
        if not batch_norm:
            return state
        mean, variance = state.mean((0, 2, 3), keepdim=True), state.var((0, 2, 3), correction=0, keepdim=True)
        scale, shift = (parameters[f"{norm}.{kind}"].view(-1, 1, 1) for kind in ("weight", "bias"))
        return (state - mean) / (variance + 1e-5).sqrt() * scale + shift

    def block(state: Tensor, name: str, stride: int, projected: bool) -> Tensor:
        branch = rho(conv(state, f"{name}.conv1", f"{name}.norm1", stride))
        branch = conv(branch, f"{name}.conv2", f"{name}.norm2")
        across = conv(state, f"{name}.shortcut.0", f"{name}.shortcut.1", stride) if projected else state
        return rho(across + branch)

    state = rho(conv(images, "stem.conv", "stem.norm"))
    state = block(state, "block1_1", 1, projected=False)
    state = block(state, "block2_1", 2, projected=True)
    state = block(state, "block2_2", 1, projected=False)
    expected = F.linear(state.mean((2, 3)), parameters["fc.linear.weight"], parameters["fc.linear.bias"])
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


def test_without_batch_norm_every_convolution_has_a_bias_and_there_are_no_buffers() -> None:
    normalised, bare = small_resnet(), small_resnet(batch_norm=False)
    convolutions = [[m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (normalised, bare)]
    assert len(convolutions[0]) == len(convolutions[1]) == 8
    assert all(layer.bias is None for layer in convolutions[0])
    assert all(layer.bias is not None for layer in convolutions[1])
    assert sum(isinstance(m, nn.BatchNorm2d) for m in normalised.modules()) == 8
    assert not any(isinstance(m, nn.BatchNorm2d) for m in bare.modules())
    assert list(bare.buffers()) == []


def test_the_description_builds_the_same_architecture(tmp_path: Any) -> None:
    network = small_resnet(activation="tanh", batch_norm=False)
    torch.save(network.description(), tmp_path / "description.pt")
    rebuilt = build_network(torch.load(tmp_path / "description.pt", weights_only=True))
    assert type(rebuilt) is ResNet
    assert rebuilt.description() == network.description()
    rebuilt.load_state_dict(network.state_dict())
    images = torch.randn(2, *SHAPE)
    assert torch.equal(rebuilt(images), network(images))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"blocks": (3, 3, 3, 3)}, "ResNet: blocks (3, 3, 3, 3) and widths (4, 6) must be of the same length"),
        ({"widths": (4,)}, "ResNet: blocks (1, 2) and widths (4,) must be of the same length"),
        ({"blocks": (), "widths": ()}, "ResNet: blocks () and widths () must be of the same length"),
        ({"blocks": (1, 0)}, "ResNet: blocks holds 0"),
        ({"widths": (-4, 6)}, "ResNet: widths holds -4"),
        ({"activation": "gelu"}, "activation 'gelu'"),
    ],
)
def test_impossible_settings_are_refused_in_a_sentence(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        small_resnet(**settings)
    message = str(caught.value)
    assert named in message
    assert "\n" not in message
    assert ". " not in message


@pytest.mark.parametrize("cls", [LDRL, DTP])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_target_propagation_has_a_mirror_for_every_stage_but_the_first(cls: type, batch_norm: bool) -> None:
    algorithm = cls(small_resnet(batch_norm=batch_norm))
    kinds = {name: type(mirror) for name, _, mirror in algorithm.mirrored_stages()}
    blocks = dict.fromkeys(["block1_1", "block2_1", "block2_2"], BlockMirror)
    assert kinds == blocks | {"fc": PooledLinearMirror}


def test_a_stem_further_up_has_a_mirror_too() -> None:
    below = StemStage(SHAPE, 3, "elu", batch_norm=True)
    above = StemStage(below.output_shape, 4, "elu", batch_norm=True)
    output = PooledLinearStage(above.output_shape, 10)
    algorithm = LDRL(Network({"below": below, "above": above, "out": output}, {}))
    assert isinstance(algorithm.feedback["above"], StemMirror)


@pytest.mark.parametrize(("cls", "blocks"), [(ResNet18, (2, 2, 2, 2)), (ResNet34, (3, 4, 6, 3))])
def test_the_named_sizes_are_the_published_ones(cls: type[ResNet], blocks: tuple[int, ...], tmp_path: Any) -> None:
    with torch.device("meta"):
        network, expected = cls(RGB, 10, activation="elu"), ResNet(RGB, 10, blocks, WIDE, "elu")
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    assert shapes == {name: value.shape for name, value in expected.state_dict().items()}
    settings = {"image_shape": [3, 32, 32], "num_classes": 10, "activation": "elu", "batch_norm": True}
    assert network.settings == settings
    with torch.device("meta"):
        rebuilt = build_network(network.description())
    assert type(rebuilt) is cls
    assert {name: value.shape for name, value in rebuilt.state_dict().items()} == shapes


@pytest.mark.parametrize("cls", [Backprop, FeedbackAlignment, DirectFeedbackAlignment, LDRL, DTP])
def test_forward_gradients_move_no_statistics_of_batch_norm(cls: type) -> None:
    algorithm = cls(small_resnet())
    before = {name: buffer.clone() for name, buffer in algorithm.network.named_buffers()}
    images, labels = torch.randn(4, *SHAPE), torch.arange(4)
    assert algorithm.network.training
    algorithm.forward_gradients(images, labels)
    after = dict(algorithm.network.named_buffers())
    assert len(before) == 3 * 8
    assert all(torch.equal(after[name], value) for name, value in before.items())
    algorithm.network(images)  # while a pass in training mode does
    assert not any(torch.equal(after[name], value) for name, value in before.items())
