"""The plain twin that speed-ups are measured against computes what the package computes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.arithmetic import count_gigaflop
from benchmarks.settings import Setting
from benchmarks.twins import assert_equal, plain_twin
from bioprop.errors import UserError
from bioprop.networks import LeNet, SimpleVGG
from examples.ldrl_published import PublishedLDRL

SETTINGS = {
    # windows overlap
    "lenet": Setting(
        network=partial(LeNet, (3, 16, 16), 10, channels=(4, 5), hidden=12),
        batch=8,
        beta=0.7,
        noise=(0.4, 0.3, 0.1),
        feedback_lr=(1e-3, 2e-3, 3e-2),
        iterations=(3, 2, 1),
    ),
    # the last map is 2x2, smaller than the kernel
    "vgg": Setting(
        network=partial(SimpleVGG, (3, 16, 16), 10, channels=(4, 5, 6, 7)),
        batch=8,
        beta=0.7,
        noise=(0.4, 0.3, 0.2, 0.1),
        feedback_lr=(1e-3, 2e-3, 3e-3, 3e-2),
        iterations=(2, 3, 1, 2),
    ),
    "vgg without bias": Setting(
        network=partial(SimpleVGG, (1, 8, 8), 5, channels=(4, 5), bias=False),
        batch=8,
        beta=0.5,
        noise=(0.4, 0.3),
        feedback_lr=(1e-3, 3e-2),
        iterations=(2, 2),
    ),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_plain_closed_form_and_autograd_train_alike(setting: Setting) -> None:
    assert_equal(setting)


def test_as_released_the_clean_pass_is_run_again_and_changes_nothing() -> None:
    setting = SETTINGS["lenet"]
    images, labels = setting.draw()
    twins: list[PublishedLDRL] = []
    gigaflop: list[float] = []
    for released in (False, True):
        algorithm = setting.ldrl().double()
        plain = plain_twin(setting, algorithm, released)
        torch.manual_seed(1)
        gigaflop.append(count_gigaflop(partial(plain.step, images.double(), labels)))
        twins.append(plain)
    for once, again in zip(*(each.stages for each in twins), strict=True):
        assert all(torch.equal(*pair) for pair in zip(once.parameters(), again.parameters(), strict=True))
    # 8 images; conv2: 5x4 kernels of 5x5 at 8x8 places, 3 times; fc1: 80 to 12 units, twice; fc2: 12 to 10 units
    again = 2 * 8 * (3 * 5 * 4 * 25 * 64 + 2 * 80 * 12 + 12 * 10) / 1e9
    assert gigaflop[1] - gigaflop[0] == pytest.approx(again)


def flip_target(plain: PublishedLDRL) -> None:
    plain.beta = -plain.beta


def negate_back(number: int) -> Callable[[PublishedLDRL], None]:
    def change(plain: PublishedLDRL) -> None:
        stage = plain.stages[number]
        back = stage.back

        def negated(outputs: Tensor, switches: Tensor | None, shape: torch.Size) -> Tensor:
            return -back(outputs, switches, shape)

        stage.back = negated

    return change


def forget_momentum(plain: PublishedLDRL) -> None:
    for optimizer in plain.feedback_optimizers:
        optimizer.param_groups[0]["momentum"] = 0.0


def add_overlapping_values(plain: PublishedLDRL) -> None:
    def unpool(outputs: Tensor, switches: Tensor, shape: torch.Size) -> Tensor:
        maps = outputs.new_zeros(*outputs.shape[:2], shape[2] * shape[3])
        return maps.scatter_add(2, switches.flatten(2), outputs.flatten(2)).view(*outputs.shape[:2], *shape[2:])

    plain.stages[1].unpool = unpool


@pytest.mark.parametrize(
    ("change", "weight"),
    [
        (flip_target, "conv1's weight"),
        (negate_back(1), "conv1's weight"),
        (negate_back(3), "fc2's feedback weight"),
        (forget_momentum, "fc1's feedback weight"),
        (add_overlapping_values, "conv2's feedback weight"),
    ],
    ids=["output target", "feedback of conv2", "feedback of fc2", "momentum", "unpooling"],
)
def test_a_mistake_in_the_twin_is_noticed(change: Callable[[PublishedLDRL], None], weight: str) -> None:
    with pytest.raises(UserError, match="not the same method") as raised:
        assert_equal(SETTINGS["lenet"], change)
    assert weight in str(raised.value)


def test_a_stage_that_the_twin_lacks_is_refused() -> None:
    setting = replace(SETTINGS["lenet"], network=partial(LeNet, (3, 16, 16), 10, activation="tanh"))

    with pytest.raises(UserError, match="no stage like this"):
        assert_equal(setting)
