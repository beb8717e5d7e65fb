"""Networks of invertible stages."""

import pytest
import torch
import torch.nn.functional as F

from bioprop.errors import UserError
from bioprop.networks import InvertibleMLP, InvertibleStage, build_network

SHAPE = (1, 4, 4)


@pytest.mark.parametrize(
    ("widths", "squares", "spare"),
    [(3, [16, 16, 16], [0, 0, 0]), ((16, 9, 6), [16, 9, 6], [0, 7, 3]), ((12, 5), [12, 5], [4, 7])],
)
def test_it_computes_the_formula(widths: int | tuple[int, ...], squares: list[int], spare: list[int]) -> None:
    network = InvertibleMLP(SHAPE, 5, widths=widths)
    stages = [stage for _, stage in network.stages()]
    assert [tuple(stage.weight.shape) for stage in stages] == [(width, width) for width in squares]
    assert [stage.spare for stage in stages] == spare
    images = torch.randn(3, *SHAPE)
    state = images.flatten(1)
    for stage, width in zip(stages, squares, strict=True):
        torch.nn.init.normal_(stage.linear.bias)
        affine = state[:, :width] @ stage.weight.T + stage.linear.bias
        state = torch.where(affine > 0, affine, 0.1 * affine)
    torch.testing.assert_close(network(images), state[:, :5])


def test_weights_start_orthogonal_and_biases_at_zero() -> None:
    for _, stage in InvertibleMLP(SHAPE, 5, widths=(16, 9)).stages():
        torch.testing.assert_close(stage.weight @ stage.weight.T, torch.eye(len(stage.weight)), rtol=0, atol=1e-5)
        assert stage.linear.bias.abs().max() == 0
    ((_, gaussian),) = InvertibleMLP((1, 20, 20), 5, widths=1, orthogonal=False).stages()
    assert gaussian.weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert (gaussian.weight @ gaussian.weight.T - torch.eye(400)).abs().max() > 0.1


def test_settings_are_described() -> None:
    network = InvertibleMLP(SHAPE, 5, widths=(16, 9), negative_slope=0.3, orthogonal=False, bias=False)
    rebuilt = build_network(network.description())
    rebuilt.load_state_dict(network.state_dict())
    images = torch.randn(3, *SHAPE)
    assert torch.equal(rebuilt(images), network(images))
    assert [name for name, _ in rebuilt.named_parameters()] == ["fc1.linear.weight", "fc2.linear.weight"]


def test_a_slope_of_one_is_a_linear_network() -> None:
    network = InvertibleMLP(SHAPE, 5, widths=2, negative_slope=1.0)
    first, second = (stage.weight for _, stage in network.stages())
    images = torch.randn(3, *SHAPE)
    torch.testing.assert_close(network(images), (images.flatten(1) @ first.T @ second.T)[:, :5])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"widths": (17,)}, "17 units cannot follow 16"),
        ({"widths": (9, 12)}, "12 units cannot follow 9"),
        ({"widths": (9, 4)}, "5 units cannot follow 4"),
        ({"widths": ()}, "widths is empty"),
        ({"widths": 0}, "widths holds 0"),
        ({"widths": (8, -1)}, "widths holds -1"),
        ({"negative_slope": 0.0}, "negative_slope is 0.0"),
        ({"negative_slope": 1.5}, "negative_slope is 1.5"),
    ],
)
def test_what_has_no_inverse_is_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        InvertibleMLP(SHAPE, 5, **settings)
    assert "\n" not in str(caught.value)


def test_a_stage_may_hand_out_fewer_units() -> None:
    stage = InvertibleStage((6,), 6, outputs=2)
    inputs = torch.randn(3, 6)
    assert stage.output_shape == (2,)
    torch.testing.assert_close(stage(inputs), F.leaky_relu(inputs @ stage.weight.T, 0.1)[:, :2])
