"""The networks: shapes, names, published sizes, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.functional.pooling import Pool
from bioprop.networks import MLP, ConvStage, LeNet, LinearStage, Network, SimpleVGG, build_network

RGB, GREY = (3, 32, 32), (1, 16, 16)
BUILDS: dict[str, Callable[[], Network]] = {
    "mlp": lambda: MLP(GREY, 7, hidden=(6, 5), activation="tanh"),
    "mlp of one stage": lambda: MLP(GREY, 7, hidden=(), bias=False),
    "lenet": lambda: LeNet(GREY, 7, channels=(3, 4), hidden=5, activation="relu"),
    "lenet of one conv stage": lambda: LeNet(RGB, 7, channels=(3,), hidden=5, bias=False),
    "vgg": lambda: SimpleVGG(RGB, 7, channels=(2, 3, 4, 3, 2)),
    "vgg of two conv stages": lambda: SimpleVGG(GREY, 7, channels=(2, 3), activation="leaky_relu"),
}
all_networks = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def draw_images(network: Network, count: int = 3) -> Tensor:
    return torch.randn(count, *network.settings["image_shape"])


def assert_one_sentence(message: str) -> None:
    assert "\n" not in message
    assert ". " not in message
    assert 20 < len(message) < 250


@all_networks
def test_stages_fit_together(build: Callable[[], Network]) -> None:
    network = build()
    state = draw_images(network)
    for _, stage in network.stages():
        assert tuple(state.shape[1:]) == tuple(stage.input_shape)
        state = stage(state)
        assert tuple(state.shape[1:]) == tuple(stage.output_shape)
    assert state.shape == (3, 7)


@all_networks
def test_a_network_is_a_plain_module(build: Callable[[], Network]) -> None:
    network = build()
    images = draw_images(network)
    logits = network(images)
    assert isinstance(network, nn.Sequential)
    assert len(network) == len(network.stages())
    assert torch.equal(network[1:](network[:1](images)), logits)
    assert torch.equal(network[-1](network[:-1](images)), logits)
    assert isinstance(network[:1], nn.Sequential)
    assert network[0] is network.stages()[0][1]
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@all_networks
def test_the_description_builds_the_same_architecture(build: Callable[[], Network]) -> None:
    network = build()
    rebuilt = build_network(network.description())
    assert type(rebuilt) is type(network)
    rebuilt.load_state_dict(network.state_dict())
    images = draw_images(network)
    assert torch.equal(rebuilt(images), network(images))
    assert rebuilt.description() == network.description()


@all_networks
def test_a_description_survives_a_checkpoint_of_plain_data(build: Callable[[], Network], tmp_path: Any) -> None:
    network = build()
    torch.save(network.description(), tmp_path / "description.pt")
    loaded = torch.load(tmp_path / "description.pt", weights_only=True)
    assert loaded == network.description()
    assert build_network(loaded).description() == network.description()


@pytest.mark.parametrize("class_path", ["os.system", "torch.nn.Linear", "bioprop.networks.lenet.AlexNet"])
def test_a_description_of_another_class_is_refused(class_path: str) -> None:
    with pytest.raises(UserError, match=class_path) as caught:
        build_network({"class_path": class_path, "init_args": {}})
    assert_one_sentence(str(caught.value))


def test_a_users_own_network_can_be_described() -> None:
    class Tiny(Network):
        def __init__(self, classes: int) -> None:
            super().__init__({"only": LinearStage((1, 2, 2), classes, "identity")}, {"classes": classes})

    rebuilt = build_network(Tiny(4).description())
    assert type(rebuilt) is Tiny
    assert rebuilt(torch.zeros(2, 1, 2, 2)).shape == (2, 4)


@pytest.mark.parametrize(
    ("network", "names"),
    [
        (LeNet(RGB, 10), ["conv1.conv", "conv2.conv", "fc1.linear", "fc2.linear"]),
        (SimpleVGG(RGB, 10), [*(f"conv{n}.conv" for n in range(1, 6)), "fc.linear"]),
        (MLP(RGB, 10, hidden=(4, 4)), ["fc1.linear", "fc2.linear", "fc3.linear"]),
        (MLP(RGB, 10, hidden=()), ["fc1.linear"]),
    ],
    ids=["lenet", "vgg", "mlp", "mlp of one stage"],
)
def test_parameter_names(network: Network, names: list[str]) -> None:
    expected = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    assert [name for name, _ in network.named_parameters()] == expected
    assert list(network.state_dict()) == expected
    assert [name for name, _ in network.stages()] == [name.split(".")[0] for name in names]


@pytest.mark.parametrize(
    ("build", "sizes", "parameters"),
    [
        (LeNet, [(32, 16, 16), (64, 8, 8), (512,), (10,)], 2_156_490),
        (SimpleVGG, [(128, 16, 16), (128, 8, 8), (256, 4, 4), (256, 2, 2), (512, 1, 1), (10,)], 2_221_706),
    ],
)
def test_the_published_sizes_are_the_defaults(
    build: type[Network], sizes: list[tuple[int, ...]], parameters: int
) -> None:
    network = build(RGB, 10)
    assert [stage.output_shape for _, stage in network.stages()] == sizes
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert network.settings["activation"] == "elu"


def test_lenet_computes_what_its_paper_describes() -> None:
    network = LeNet(RGB, 10, channels=(3, 4), hidden=5)
    images = torch.randn(2, *RGB)
    parameters = dict(network.named_parameters())

    def affine(name: str) -> tuple[Tensor, Tensor]:
        return parameters[f"{name}.weight"], parameters[f"{name}.bias"]

    state = F.max_pool2d(F.elu(F.conv2d(images, *affine("conv1.conv"), padding=2)), 3, 2, 1)
    state = F.max_pool2d(F.elu(F.conv2d(state, *affine("conv2.conv"), padding=2)), 3, 2, 1)
    state = F.linear(F.elu(F.linear(state.flatten(1), *affine("fc1.linear"))), *affine("fc2.linear"))
    torch.testing.assert_close(network(images), state)


def test_simple_vgg_computes_what_its_paper_describes() -> None:
    network = SimpleVGG(RGB, 10, channels=(3, 4))
    state = images = torch.randn(2, *RGB)
    *convolutions, (weight, bias) = zip(*[iter(network.parameters())] * 2, strict=True)
    for conv_weight, conv_bias in convolutions:
        state = F.max_pool2d(F.elu(F.conv2d(state, conv_weight, conv_bias, padding=1)), 2)
    torch.testing.assert_close(network(images), F.linear(state.flatten(1), weight, bias))


@pytest.mark.parametrize("build", [LeNet, SimpleVGG, MLP])
def test_without_bias_there_are_only_weights(build: type[Network]) -> None:
    names = [name for name, _ in build(RGB, 10, bias=False).named_parameters()]
    assert names
    assert all(name.endswith(".weight") for name in names)


@pytest.mark.parametrize("size", [(16, 16), (31, 32), (1, 1)])
def test_images_too_small_for_the_vgg_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"SimpleVGG's conv\d does not fit its input .* empty map") as caught:
        SimpleVGG((3, *size), 10)
    assert_one_sentence(str(caught.value))


@pytest.mark.parametrize(("kernel_size", "pool"), [(9, None), (3, Pool(7, 7)), (9, Pool(2, 2))])
def test_a_stage_that_leaves_an_empty_map_is_refused(kernel_size: int, pool: Pool | None) -> None:
    with pytest.raises(UserError, match="stem does not fit its input of 8x8 pixels"):
        ConvStage((1, 8, 8), 2, kernel_size, pool=pool, name="stem")


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: MLP((3, 32), 10), "MLP: image_shape"),
        (lambda: MLP((3, 0, 32), 10), "MLP: image_shape holds 0"),
        (lambda: MLP(RGB, 1), "MLP: num_classes is 1"),
        (lambda: MLP(RGB, 10, hidden=(5, -2)), "MLP: hidden holds -2"),
        (lambda: LeNet(RGB, 10, channels=(3, 0)), "LeNet: channels holds 0"),
        (lambda: LeNet(RGB, 10, hidden=0), "LeNet: hidden holds 0"),
        (lambda: SimpleVGG(RGB, 10, channels=(0,)), "SimpleVGG: channels holds 0"),
        (lambda: MLP(RGB, 10, activation="gelu"), "activation 'gelu'"),
        (lambda: LeNet(RGB, 10, activation="gelu"), "activation 'gelu'"),
    ],
)
def test_impossible_sizes_are_refused_by_name(build: Callable[[], Network], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        build()
    assert_one_sentence(str(caught.value))


def test_a_stage_hands_out_the_switches_of_its_own_pass() -> None:
    stage = ConvStage((1, 8, 8), 2, 3, padding=1, pool=Pool(2, 2))
    first, second = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    kept = stage.run(first)
    assert not torch.equal(stage.run(second).switches, kept.switches)
    assert torch.equal(stage.run(first).switches, kept.switches)
    assert torch.equal(stage(first), kept.output)
    assert not stage.state_dict().keys() - {"conv.weight", "conv.bias"}
    assert ConvStage((1, 8, 8), 2, 3).run(first).switches is None
    assert LinearStage((1, 8, 8), 2, "elu").run(first).switches is None


def test_a_chain_refuses_what_is_no_stage_and_what_does_not_fit() -> None:
    first, last = LinearStage((3, 8, 8), 16, "tanh"), LinearStage((16,), 10, "identity")
    with pytest.raises(UserError, match="squash is a Softsign, but a Network is a chain of stages"):
        Network({"fc1": first, "squash": nn.Softsign(), "fc2": last}, {})
    with pytest.raises(UserError, match=r"stage fc2 takes inputs of shape \(17,\), but fc1 hands out \(16,\)"):
        Network({"fc1": first, "fc2": LinearStage((17,), 10, "identity")}, {})
