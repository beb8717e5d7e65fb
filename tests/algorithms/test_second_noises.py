"""L-DRL by each second noise: forward stages as black boxes, settings that follow from the sizes, what it learns."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import LDRL, ParallelLDRL, ldrl
from bioprop.callbacks.alignment import alignment_to_backprop
from bioprop.feedback.noise import Probing
from bioprop.functional.pooling import Pool
from bioprop.networks import (
    MLP,
    ConvStage,
    LeNet,
    Network,
    SimpleVGG,
    Stage,
    StageOutput,
    build_mirror,
)
from bioprop.testing.helpers import CLASSES, NETWORKS, SHAPE, Batch, copy_state, draw_batch, refused, small_lenet

INDEPENDENT: dict[str, Any] = {"second_noise": "independent", "noise": 0.1, "feedback_lr": 0.05, "iterations": 2}
RULES: dict[str, dict[str, Any]] = {
    "echo": {},
    "echo with numbers": {"noise": 0.1, "feedback_lr": 0.05, "iterations": 3},
    "expected": {"second_noise": "expected"},
    "independent": INDEPENDENT,
}

# -- a forward stage is a black box -----------------------------------------------------------------------------------


class BlackBox(Stage):
    """Runs, and has nothing to read: no weight, no activation, no layer."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.input_shape, self.output_shape = stage.input_shape, stage.output_shape
        kept = deepcopy(stage)
        self._answer = lambda inputs: kept.run(inputs)

    def run(self, inputs: Tensor) -> StageOutput:
        return self._answer(inputs)


def conv_network() -> Network:
    below = ConvStage((1, 8, 8), 3, 3, padding=1, activation="tanh")
    middle = ConvStage((3, 8, 8), 4, 3, padding=1, activation="elu", pool=Pool(3, 2, 1))
    above = ConvStage((4, 4, 4), 5, 4, activation="elu")  # fan-in of 64, and a single position
    return Network({"below": below, "middle": middle, "above": above}, {})


def linear_network() -> Network:
    return MLP((1, 8, 8), 3, hidden=(12, 9))


def trained(algorithm: LDRL) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        algorithm.train_feedback(torch.randn(10, 1, 8, 8, generator=generator, dtype=torch.float64))
    return copy_state(algorithm.feedback)


@pytest.mark.parametrize("build", [conv_network, linear_network], ids=["conv", "linear"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_no_forward_weight_is_ever_read(
    rules: dict[str, Any], build: Callable[[], Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build().double()
    (name, below), *upper = network.stages()
    boxes = {each: BlackBox(stage) for each, stage in upper}
    hidden = Network({name: below} | boxes, {})
    assert not [each for each, _ in hidden.named_parameters() if not each.startswith(name)]
    twins: dict[Stage, Stage] = {boxes[each]: stage for each, stage in upper}
    monkeypatch.setattr(ldrl, "build_mirror", lambda stage, form: build_mirror(twins.get(stage, stage), form))
    ends = []
    for given in (network, hidden):
        torch.manual_seed(3)
        algorithm = LDRL(given, **rules).double()
        before = copy_state(algorithm.feedback)
        ends.append(trained(algorithm))
    assert list(ends[0]) == list(ends[1])
    for each, weight in ends[0].items():
        torch.testing.assert_close(ends[1][each], weight, rtol=1e-9, atol=1e-11)
        assert "weight" not in each or (weight - before[each]).norm() > 1e-3 * before[each].norm()


# -- settings that follow from the sizes ------------------------------------------------------------------------------

BUILDS: dict[str, Callable[..., Network]] = {
    "mlp": lambda **given: MLP(SHAPE, CLASSES, hidden=(40, 9), **given),
    "lenet": lambda **given: LeNet(SHAPE, CLASSES, channels=(3, 4), hidden=12, **given),
    "vgg": lambda **given: SimpleVGG(SHAPE, CLASSES, channels=(3, 4, 5), **given),
}
IMAGES: dict[str, Callable[[int], Tensor]] = {
    "random": lambda count: torch.randn(count, *SHAPE),
    "huge": lambda count: 1e4 * torch.randn(count, *SHAPE),
    "tiny": lambda count: 1e-4 * torch.randn(count, *SHAPE),
    "all the same": lambda count: torch.ones(count, *SHAPE),
    "zero": lambda count: torch.zeros(count, *SHAPE),
    "one image among zeros": lambda count: torch.randn(count, *SHAPE) * (torch.arange(count) == 0).view(-1, 1, 1, 1),
}
AUTO: dict[str, dict[str, Any]] = {
    "echo": {},
    "paper": {"mirror": "paper"},
    "expected": {"second_noise": "expected"},
}


def assert_stays_bounded(algorithm: LDRL, draw: Callable[[int], Tensor]) -> None:
    """Over batches of 8, 3 and 1; no feedback weight as a whole grows past what it and its counterpart had."""
    before = copy_state(algorithm.feedback)
    for size in (8, 8, 3, 1, 1, 8, 3):
        losses = algorithm.train_feedback(draw(size))
        assert all(loss.isfinite() for loss in losses.values())
    for name, stage, mirror in algorithm.mirrored_stages():
        start = before[f"{name}.weight"].norm() + stage.weight.norm()
        assert mirror.weight.isfinite().all()
        assert mirror.weight.norm() < 2 * start, name


@pytest.mark.parametrize("rules", AUTO.values(), ids=AUTO)
@pytest.mark.parametrize("draw", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_feedback_stays_bounded_whatever_the_activities(
    build: Callable[..., Network], draw: Callable[[int], Tensor], rules: dict[str, Any]
) -> None:
    assert_stays_bounded(LDRL(build(bias=False), **rules), draw)


@pytest.mark.parametrize("activation", ["elu", "relu"])
@pytest.mark.parametrize("dead", [1, None], ids=["one unit", "every unit"])
@pytest.mark.parametrize("rules", AUTO.values(), ids=AUTO)
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_dead_units_take_no_giant_steps(
    build: Callable[..., Network], rules: dict[str, Any], dead: int | None, activation: str
) -> None:
    algorithm = LDRL(build(activation=activation), **rules)
    for _, stage in algorithm.network.stages():
        with torch.no_grad():
            stage.bias[:dead] = -100.0
    assert_stays_bounded(algorithm, IMAGES["random"])


def test_without_the_damping_they_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probing, "damping", lambda self, draw: 0.0)
    with pytest.raises(AssertionError):
        test_dead_units_take_no_giant_steps(BUILDS["mlp"], {}, 1, "relu")


def test_noise_is_put_on_as_many_images_as_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """LeNet's second stage needs 10 of 24 (in eights), its third and its fourth all that there are."""
    asked: dict[int, list[tuple[int, bool]]] = {}
    noise = Probing.noise

    def seen(self: Probing, normals: Tensor | None) -> Tensor:
        made = noise(self, normals)
        asked.setdefault(self._inputs[0].numel(), []).append((len(made), normals is None))
        return made

    monkeypatch.setattr(Probing, "noise", seen)
    algorithm, iterations = LDRL(small_lenet()), []
    with algorithm.observe_feedback(iterations.append):
        algorithm.train_feedback(draw_batch(24)[0])
    conv2, fc1, fc2 = 3 * 8 * 8, 4 * 4 * 4, 12
    assert asked == {conv2: 2 * [(16, False)], fc1: [(24, False), (24, True)], fc2: 2 * [(24, False)]}
    assert [(event.stage, event.iteration) for event in iterations] == [
        (stage, iteration) for stage in ("conv2", "fc1", "fc2") for iteration in (0, 1)
    ]


@pytest.mark.parametrize("cls", [LDRL, ParallelLDRL])
@pytest.mark.parametrize(
    ("second_noise", "expected"),
    [("echo", {"conv2": 2, "fc1": 2, "fc2": 2}), ("expected", {"conv2": 4, "fc1": 22, "fc2": 4})],
)
def test_each_stage_takes_the_iterations_of_its_own_sizes(
    cls: type[LDRL], second_noise: str, expected: dict[str, int]
) -> None:
    """With 3 images: fc1 has 64 inputs, a ratio of 21.3."""
    algorithm, counts = cls(small_lenet(), second_noise=second_noise), Counter[str]()
    with algorithm.observe_feedback(lambda event: counts.update([event.stage])):
        algorithm.train_feedback(draw_batch(3)[0])
    assert counts == expected


def test_several_samples_are_averaged() -> None:
    """For each of both iterations, and the curvature with its damping alike."""
    torch.manual_seed(1)
    algorithm = ParallelLDRL(MLP(SHAPE, CLASSES, hidden=(40,)), samples=3).double()
    images = draw_batch()[0].double()
    (name, stage, mirror), clean = algorithm.mirrored_stages()[0], algorithm.clean_passes(images)[1]
    gradient_at = algorithm.feedback_training.objective(name, stage, mirror, clean, algorithm.streams.noise(0, images))
    start, expected = mirror.weight.detach().clone(), mirror.weight.detach().clone()
    with torch.no_grad():
        for iteration in range(2):
            mirror.weight.copy_(expected)
            draws = [gradient_at(3 * iteration + sample) for sample in range(3)]
            gradient = sum(each.parameters["weight"] for each in draws) / 3
            expected = expected - gradient / (sum(each.curvature["weight"] for each in draws) / 3)[:, None]
        mirror.weight.copy_(start)
    algorithm.train_feedback(images)
    assert (expected - start).norm() > 1e-3 * start.norm()
    torch.testing.assert_close(mirror.weight.detach(), expected, rtol=1e-12, atol=1e-14)


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "independent": (
        {"second_noise": "independent"},
        ("noise, feedback_lr, iterations: auto", "independent noise needs numbers", "noise: 0.1"),
    ),
    "independent without noise": (
        {"second_noise": "independent", "feedback_lr": 0.1, "iterations": 2},
        ("noise: auto follows from the sizes for second_noise echo and expected",),
    ),
    "sgd": ({"feedback_step": "sgd"}, ("feedback_lr: auto is a normalized step", "sgd", "such as 0.01")),
    "unknown": ({"second_noise": "ecko"}, ("second_noise 'ecko' is not known", "independent, expected, echo")),
    "misspelt noise": ({"noise": "atuo"}, ("noise is 'atuo'", "auto, a number, or one number a stage")),
    "misspelt rate": ({"feedback_lr": "Auto"}, ("feedback_lr is 'Auto'", "auto, a number")),
    "misspelt iterations": ({"iterations": "two"}, ("iterations is 'two'", "auto, a number")),
    "noisy switches": ({"switches": "noisy"}, ("switches noisy", "second_noise echo", "use switches: clean")),
    "noisy switches, expected": (
        {"switches": "noisy", "second_noise": "expected"},
        ("switches noisy", "second_noise expected", "second_noise: independent"),
    ),
    "auto for one stage": ({"noise": (0.1, "auto", 0.1)}, ("noise holds 'auto'", "a finite number")),
}


@pytest.mark.parametrize("cls", [LDRL, ParallelLDRL])
@pytest.mark.parametrize(("settings", "named"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    settings: dict[str, Any], named: tuple[str, ...], cls: type[LDRL]
) -> None:
    with refused(*named):
        cls(small_lenet(), **settings)


def test_settings_left_to_the_algorithm_are_recorded_as_such() -> None:
    algorithm = LDRL(small_lenet(), noise=0.1)
    assert algorithm.hparams["second_noise"] == "echo"
    assert algorithm.hparams["noise"] == 0.1
    assert algorithm.hparams["feedback_lr"] == algorithm.hparams["iterations"] == "auto"


# -- what it learns ----------------------------------------------------------------------------------------------------


def angle_after(batches: int, seed: int, images: Callable[[int], Batch], lr: float = 0.0, **rules: Any) -> float:
    """Degrees from the update to BP's after training on fresh batches, from random feedback."""
    torch.manual_seed(seed)
    algorithm = LDRL(NETWORKS["lenet"](), beta=0.01, **rules)
    for batch in range(batches):
        algorithm.train_feedback(images(batch)[0])
    return float(alignment_to_backprop(algorithm, *images(batches))["overall"].angle)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_echo_turns_the_update_further_at_less_cost(seed: int, make_smooth_batch: Callable[..., Batch]) -> None:
    def images(batch: int) -> Batch:
        return make_smooth_batch(32, SHAPE, seed=1000 * seed + batch)

    echo, start = angle_after(30, seed, images), angle_after(0, seed, images)
    independent = angle_after(30, seed, images, **(INDEPENDENT | {"iterations": 5}))
    assert start > 40
    assert echo < 0.5 * independent < 0.5 * start


def loss_after(algorithm: LDRL, lr: float, batches: Callable[[int], Batch]) -> float:
    """The mean over the last 10 of 60 batches."""
    optimizer = torch.optim.SGD(algorithm.network.parameters(), lr=lr, momentum=0.9)
    losses: list[Tensor] = []
    for batch in range(60):
        images, labels = batches(batch)
        _, gradients = algorithm._learn(images, labels)
        for name, parameter in algorithm.network.named_parameters():
            parameter.grad = gradients.forward[name]
        optimizer.step()
        losses.append(torch.nn.functional.cross_entropy(algorithm(images), labels).detach())
    return float(torch.stack(losses[-10:]).mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_it_follows_a_learning_rate_that_independent_noise_does_not(
    seed: int, make_smooth_batch: Callable[..., Batch]
) -> None:
    templates, _ = make_smooth_batch(CLASSES, SHAPE, seed=99)

    def batches(batch: int) -> Batch:
        noise, labels = make_smooth_batch(32, SHAPE, CLASSES, seed=1000 * seed + batch)
        return templates[labels] + 0.7 * noise, labels

    def trained_by(**rules: Any) -> float:
        torch.manual_seed(seed)
        network = LeNet(SHAPE, CLASSES, channels=(6, 8), hidden=24)
        return loss_after(LDRL(network, beta=0.05, **rules), 0.03, batches)

    echo, independent = trained_by(), trained_by(**(INDEPENDENT | {"iterations": 5}))
    assert echo < 0.3
    assert not independent < 2.0
