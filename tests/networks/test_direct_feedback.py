"""Direct feedback and decoders: shapes, equations, drawing, and differences that keep their digits."""

import pytest
import torch
from torch import Tensor

from bioprop.errors import UserError
from bioprop.functional.pooling import Pool
from bioprop.networks import ConvStage, LinearStage, ResNet, Stage
from bioprop.networks.direct_feedback import Decoder, RandomHiddenLayer, ReadOut


def double_normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_a_read_out_is_its_equation() -> None:
    read_out = ReadOut(5, (2, 3, 4), "tanh", bias=True).double()
    torch.nn.init.normal_(read_out.bias)
    z, d = double_normal(6, 5), double_normal(6, 5)
    expected = torch.tanh(z @ read_out.weight.t() + read_out.bias)
    torch.testing.assert_close(read_out(z), expected.view(6, 2, 3, 4))
    torch.testing.assert_close(read_out.difference(z, d), read_out(z + d) - read_out(z))


def test_a_linear_read_out_keeps_the_digits_of_a_small_step() -> None:
    """In float32, subtracting two mapped values would keep half of them."""
    read_out, step = ReadOut(5, (7,), bias=True), 1e-5 * torch.randn(6, 5)
    exact = step.double() @ read_out.weight.double().t()
    found = read_out.difference(torch.randn(6, 5), step).double()
    assert (found - exact).norm() < 1e-6 * exact.norm()


def test_weights_are_drawn_by_xaviers_rule_and_biases_are_zero() -> None:
    read_out = ReadOut(300, (20, 5, 5), "tanh", bias=True)
    assert read_out.weight.shape == (500, 300)
    assert float(read_out.weight.detach().std()) == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert read_out.bias.abs().max() == 0
    assert ReadOut(3, (4,)).bias is None
    decoder = Decoder(LinearStage((300,), 500, "tanh"), LinearStage((3,), 300, "tanh"))
    assert float(decoder.weight.detach().std()) == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert all(value.abs().max() == 0 for name, value in decoder.named_parameters() if name.endswith("bias"))


def test_the_random_hidden_layer_is_fixed_and_keeps_the_digits_of_a_small_step() -> None:
    hidden = RandomHiddenLayer(5, 1000)
    assert not any(parameter.requires_grad for parameter in hidden.parameters())
    assert float(hidden.linear.weight.abs().max()) == pytest.approx(5**-0.5, rel=0.01)
    z, d = torch.randn(6, 5), 1e-5 * torch.randn(6, 5)
    found = hidden.difference(z, d).double()
    hidden.double()
    exact = hidden(z.double() + d.double()) - hidden(z.double())
    assert (found - exact).norm() < 1e-6 * exact.norm()
    torch.testing.assert_close(hidden(z.double()), torch.tanh(hidden.linear(z.double())))


STAGES: dict[str, tuple[Stage, Stage]] = {
    "linear": (LinearStage((7,), 4, "identity"), LinearStage((3,), 7, "tanh")),
    "conv": (
        ConvStage((3, 6, 6), 4, 3, padding=1, activation="tanh", pool=Pool(3, 2, 1)),
        ConvStage((2, 6, 6), 3, 3, padding=1, activation="tanh"),
    ),
    "strided conv": (ConvStage((3, 8, 8), 4, 3, stride=2, activation="elu"), ConvStage((1, 8, 8), 3, 1)),
    "without bias": (LinearStage((7,), 4, "tanh", bias=False), LinearStage((3,), 7, "tanh")),
}


@pytest.mark.parametrize(("stage", "below"), STAGES.values(), ids=STAGES)
def test_a_decoder_is_the_transposed_layer_and_then_the_activation_below(stage: Stage, below: Stage) -> None:
    """``rho^{-1}(g(y)) - c`` is the adjoint of the stage's layer and pooling, for ``Q = W``."""
    decoder, stage = Decoder(stage, below).double(), stage.double()
    with torch.no_grad():
        decoder.weight.copy_(stage.weight)
        for name, value in decoder.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(value)
    states = double_normal(2, *stage.input_shape).requires_grad_()
    _, switches = stage.run(states)
    y = double_normal(2, *stage.output_shape)
    affine = stage.affine(states)
    if switches is not None:
        affine = affine.flatten(2).gather(2, switches.flatten(2)).view(2, *stage.output_shape)
    (adjoint,) = torch.autograd.grad(affine, states, y)
    before = decoder.mirror(y, switches) - decoder.mirror(torch.zeros_like(y), switches)
    torch.testing.assert_close(before, adjoint)
    rho = {"tanh": torch.tanh, "elu": torch.nn.functional.elu}[below.activation]
    torch.testing.assert_close(decoder(y, switches), rho(decoder.mirror(y, switches)))
    d = double_normal(2, *stage.output_shape)
    torch.testing.assert_close(decoder.difference(y, d, switches), decoder(y + d, switches) - decoder(y, switches))


def test_a_stage_without_a_layer_of_its_own_is_refused() -> None:
    (_, stem), (_, block), *_ = ResNet((1, 8, 8), 3, blocks=(1,), widths=(2,)).stages()
    with pytest.raises(UserError, match="BasicBlockStage"):
        Decoder(block, stem)
