"""The options of speed: what they compute, what they refuse, and what a run does with them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bioprop.algorithms import DTP, LDRL, LayerwiseFeedback
from bioprop.cli import main
from bioprop.errors import UserError
from bioprop.functional.compiled import compiled
from bioprop.functional.pooling import Pool, gather_less, last_windows, max_pool, overwriting_places, unpool
from bioprop.functional.speed import Speed
from bioprop.networks import ConvStage, LinearStage, Network
from tests.algorithms.contract import draw_batch, small_lenet
from tests.test_cli import LDRL_TINY

BOTH = pytest.mark.parametrize(("algorithm", "products"), [(LDRL, 4), (DTP, 3)])


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


def operations(algorithm: type[LayerwiseFeedback], iterations: int) -> dict[str, int]:
    made = algorithm(two_conv_stages(), iterations=(iterations, 0))
    images = torch.randn(6, 1, 8, 8)
    made.train_feedback(images)  # what is done once only
    with Operations() as counted:
        made.train_feedback(images)
    return counted.counts


@BOTH
def test_an_iteration_is_a_few_products_and_waits_for_nothing(
    algorithm: type[LayerwiseFeedback], products: int
) -> None:
    few, many = operations(algorithm, 2), operations(algorithm, 7)
    extra = {name: (count - few.get(name, 0)) / 5 for name, count in many.items()}
    of_layers = {name: number for name, number in extra.items() if "conv" in name and number}
    assert of_layers == {"convolution": 2, "convolution_backward": products - 2}
    assert not {name for name, number in extra.items() if number and ("item" in name or "local_scalar" in name)}
    assert not [name for name, number in extra.items() if number and name in ("mm", "addmm", "linear", "bmm")]


@BOTH
def test_closed_forms_keep_no_graph(algorithm: type[LayerwiseFeedback], products: int) -> None:
    made, saved = algorithm(small_lenet(), iterations=2), []
    images, labels = draw_batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape), lambda shape: shape):
        losses, gradients = made._learn(images, labels)
    assert saved == []
    assert not any(each.requires_grad for each in [*losses.values(), *gradients.forward.values(), gradients.logits])
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in made.parameters())


@BOTH
@pytest.mark.filterwarnings("error")
def test_feedback_trains_where_gradients_are_off(algorithm: type[LayerwiseFeedback], products: int) -> None:
    ends = []
    for around in (torch.enable_grad(), torch.no_grad(), torch.inference_mode(False)):
        torch.manual_seed(1)
        made = algorithm(small_lenet(), iterations=2)
        with around:
            made.train_feedback(draw_batch()[0])
        ends.append([parameter.detach() for parameter in made.feedback.parameters()])
    for other in ends[1:]:
        assert all(torch.equal(found, wanted) for found, wanted in zip(other, ends[0], strict=True))


@BOTH
def test_bfloat16_is_close_and_leaves_float32(algorithm: type[LayerwiseFeedback], products: int) -> None:
    ends: list[tuple[list[Tensor], Tensor]] = []
    for reduced in (False, True):
        torch.manual_seed(1)
        rules = {} if algorithm is DTP else {"feedback_step": "sgd"}
        made = algorithm(small_lenet(), iterations=1, speed=Speed(bfloat16=reduced), **rules)
        before = [mirror.weight.detach().clone() for mirror in made.feedback.values()]
        losses = made.train_feedback(draw_batch(32)[0])
        weights = [mirror.weight.detach() for mirror in made.feedback.values()]
        momenta = [state["momentum_buffer"] for state in made._feedback_optimizer.state.values()]
        assert {each.dtype for each in [*weights, *momenta, *losses.values()]} == {torch.float32}
        changes = [after - start for after, start in zip(weights, before, strict=True)]
        ends.append((changes, torch.stack(list(losses.values()))))
    (exact, losses), (reduced_changes, reduced_losses) = ends
    for found, wanted in zip(reduced_changes, exact, strict=True):
        assert 0 < (found - wanted).norm() < 0.03 * wanted.norm()
    torch.testing.assert_close(reduced_losses, losses, rtol=0.02, atol=1e-3)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and no-such-compiler is not found") as caught:
        LDRL(small_lenet(), speed=Speed(compile=True))
    assert len(str(caught.value).splitlines()) == 1
    LDRL(small_lenet())  # who does not compile needs none


def test_compiling_without_a_compiler_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises((SystemExit, UserError)) as caught:
        main(["fit", *LDRL_TINY, "--model.speed.compile=true", "--trainer.max_epochs=1"])
    said = str(caught.value) if caught.type is UserError else capsys.readouterr().err
    assert caught.type is UserError or caught.value.code == 2
    assert "no-such-compiler is not found" in said
    assert len(said.strip().splitlines()) == 1


def test_speed_is_set_from_the_command_line_and_free_to_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    first = main(["fit", *LDRL_TINY, "--model.speed.bfloat16=true", "--trainer.max_epochs=1"])
    assert first.model.speed == Speed(bfloat16=True)
    path = first.trainer.checkpoint_callback.last_model_path
    assert LDRL.load_from_checkpoint(path).speed == Speed()
    resumed = main(["fit", *LDRL_TINY, "--model.speed.closed_form=false", "--trainer.max_epochs=2", "--ckpt_path=last"])
    assert resumed.model.speed == Speed(closed_form=False)
    assert resumed.trainer.global_step == 2 * first.trainer.global_step


@pytest.mark.slow  # a compiler takes its time
@pytest.mark.parametrize("pool", [Pool(2, 2), Pool(3, 2, 1)], ids=str)
def test_compiled_unpooling_is_the_eager_one(pool: Pool) -> None:
    pooled, switches = max_pool(torch.randn(3, 4, 7, 9), pool)
    less, places = torch.randn(3, 4, 7, 9), overwriting_places(switches, pool)
    found = compiled(gather_less)(pooled * last_windows(switches, pool), switches, less, pool, (7, 9))
    torch.testing.assert_close(found, unpool(pooled, places, pool, (7, 9)) - less, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_run_trains() -> None:
    torch.manual_seed(1)
    algorithm = LDRL(small_lenet(), iterations=20, feedback_lr=0.1, speed=Speed(compile=True))
    before = algorithm.feedback_angles()
    for seed in range(3):
        algorithm.train_feedback(draw_batch(64, seed)[0])
    assert all(angle < before[name] - 5 for name, angle in algorithm.feedback_angles().items())


@pytest.mark.parametrize("pool", [Pool(2, 2), Pool(3, 2, 1), Pool(3, 1, 1), Pool(2, 3)], ids=str)
def test_what_is_compiled_is_the_eager_unpooling(pool: Pool) -> None:
    pooled, switches = max_pool(torch.randn(3, 4, 7, 9, dtype=torch.float64), pool)
    less, places = torch.randn(3, 4, 7, 9, dtype=torch.float64), overwriting_places(switches, pool)
    found = gather_less(pooled * last_windows(switches, pool), switches, less, pool, (7, 9))
    torch.testing.assert_close(found, unpool(pooled, places, pool, (7, 9)) - less, rtol=1e-14, atol=1e-14)


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(values: Tensor) -> Tensor:
        raise torch._dynamo.exc.TorchDynamoException("backend='inductor' raised:\nno disk space\n\nSet A=1 for more")

    monkeypatch.setattr(torch, "compile", lambda twin, dynamic: fail)
    with pytest.raises(UserError, match=r"the compiler failed \(backend='inductor' raised: no disk space\): leave"):
        compiled(lambda values: values.sin())(torch.randn(3))
