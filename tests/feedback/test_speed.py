"""The options of speed: what they compute, what they refuse, and what a run does with them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bioprop.algorithms import DTP, LDRL, TargetAlgorithm
from bioprop.cli import main
from bioprop.feedback.speed import Speed
from bioprop.functional.pooling import Pool
from bioprop.networks import ConvStage, LinearStage, Network
from bioprop.testing.helpers import draw_batch, small_lenet
from tests.test_cli import LDRL_TINY

INDEPENDENT = {"second_noise": "independent", "noise": 0.1, "feedback_lr": 0.05}
RULES: dict[str, tuple[Callable[..., TargetAlgorithm], int, int]] = {
    "independent": (partial(LDRL, **INDEPENDENT), 2, 2),  # W and V^T; two weight gradients
    "echo": (LDRL, 2, 1),  # W and V
    "expected": (partial(LDRL, second_noise="expected"), 1, 1),
    "DTP": (DTP, 2, 1),
}
EVERY_ONE = pytest.mark.parametrize("algorithm", [rule for rule, *_ in RULES.values()], ids=RULES)
EVERY = pytest.mark.parametrize(("algorithm", "forward", "gradients"), RULES.values(), ids=RULES)


class Operations(TorchDispatchMode):
    """Counts what is computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def two_conv_stages() -> Network:
    below = ConvStage((1, 8, 8), 4, 3, padding=1)
    middle = ConvStage((4, 8, 8), 5, 3, padding=1, pool=Pool(3, 2, 1))
    return Network({"below": below, "middle": middle, "top": LinearStage(middle.output_shape, 3, "identity")}, {})


def operations(algorithm: Callable[..., TargetAlgorithm], iterations: int) -> dict[str, int]:
    made = algorithm(two_conv_stages(), iterations=(iterations, 0))
    images = torch.randn(6, 1, 8, 8)
    made.train_feedback(images)  # what is done once only
    with Operations() as counted:
        made.train_feedback(images)
    return counted.counts


@EVERY
def test_an_iteration_is_a_few_products_and_waits_for_nothing(
    algorithm: Callable[..., TargetAlgorithm], forward: int, gradients: int
) -> None:
    few, many = operations(algorithm, 2), operations(algorithm, 7)
    extra = {name: (count - few.get(name, 0)) / 5 for name, count in many.items()}
    of_layers = {name: number for name, number in extra.items() if "conv" in name and number}
    assert of_layers == {"convolution": forward, "convolution_backward": gradients}
    assert not {name for name, number in extra.items() if number and ("item" in name or "local_scalar" in name)}
    assert not [name for name, number in extra.items() if number and name in ("mm", "addmm", "linear", "bmm")]


@EVERY_ONE
def test_closed_forms_keep_no_graph(algorithm: Callable[..., TargetAlgorithm]) -> None:
    made, saved = algorithm(small_lenet(), iterations=2), []
    images, labels = draw_batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape), lambda shape: shape):
        losses, gradients = made._learn(images, labels)
    assert saved == []
    assert not any(each.requires_grad for each in [*losses.values(), *gradients.forward.values(), gradients.logits])
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in made.parameters())


@EVERY_ONE
@pytest.mark.filterwarnings("error")
def test_feedback_trains_where_gradients_are_off(algorithm: Callable[..., TargetAlgorithm]) -> None:
    ends = []
    for around in (torch.enable_grad(), torch.no_grad(), torch.inference_mode(False)):
        torch.manual_seed(1)
        made = algorithm(small_lenet(), iterations=2)
        with around:
            made.train_feedback(draw_batch()[0])
        ends.append([parameter.detach() for parameter in made.feedback.parameters()])
    for other in ends[1:]:
        assert all(torch.equal(found, wanted) for found, wanted in zip(other, ends[0], strict=True))


@EVERY_ONE
def test_bfloat16_is_close_and_leaves_float32(algorithm: Callable[..., TargetAlgorithm]) -> None:
    ends: list[tuple[list[Tensor], Tensor]] = []
    for reduced in (False, True):
        torch.manual_seed(1)
        rules = {} if algorithm is DTP else {"noise": 0.1, "feedback_step": "sgd", "feedback_lr": 0.01}
        made = algorithm(small_lenet(), iterations=1, speed=Speed(bfloat16=reduced), **rules)
        before = [mirror.weight.detach().clone() for mirror in made.feedback.values()]
        losses = made.train_feedback(draw_batch(32)[0])
        weights = [mirror.weight.detach() for mirror in made.feedback.values()]
        momenta = [state["momentum_buffer"] for state in made.feedback_training.optimizer.state.values()]
        assert {each.dtype for each in [*weights, *momenta, *losses.values()]} == {torch.float32}
        changes = [after - start for after, start in zip(weights, before, strict=True)]
        ends.append((changes, torch.stack(list(losses.values()))))
    (exact, losses), (reduced_changes, reduced_losses) = ends
    for found, wanted in zip(reduced_changes, exact, strict=True):
        assert 0 < (found - wanted).norm() < 0.03 * wanted.norm()
    torch.testing.assert_close(reduced_losses, losses, rtol=0.02, atol=1e-3)


def test_speed_is_set_from_the_command_line_and_free_to_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    first = main(["fit", *LDRL_TINY, "--model.speed.bfloat16=true", "--trainer.max_epochs=1"])
    assert first.model.feedback_training.speed == Speed(bfloat16=True)
    path = first.trainer.checkpoint_callback.last_model_path
    assert LDRL.load_from_checkpoint(path).feedback_training.speed == Speed()
    resumed = main(["fit", *LDRL_TINY, "--model.speed.closed_form=false", "--trainer.max_epochs=2", "--ckpt_path=last"])
    assert resumed.model.feedback_training.speed == Speed(closed_form=False)
    assert resumed.trainer.global_step == 2 * first.trainer.global_step
