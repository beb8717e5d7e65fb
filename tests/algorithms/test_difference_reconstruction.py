"""The DRL family: the contract, and what is each method's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bioprop.algorithms import DDTPRHL, DTPDRL, DDTPControl, DDTPLinear, DifferenceReconstruction
from bioprop.networks import Network
from bioprop.testing import DifferenceReconstructionContract
from bioprop.testing.helpers import (
    CLASSES,
    changed,
    copy_state,
    draw_batch,
    make_loader,
    make_trainer,
    refused,
    small_lenet,
)
from tests.algorithms.plain_models import RESNETS


class TestDTPDRL(DifferenceReconstructionContract):
    operators = ("conv2", "fc1", "fc2")

    def make(self, network: Network, **settings: Any) -> DTPDRL:
        return DTPDRL(network, **settings)


class TestDDTPLinear(DifferenceReconstructionContract):
    def make(self, network: Network, **settings: Any) -> DDTPLinear:
        return DDTPLinear(network, **settings)


class TestDDTPControl(DifferenceReconstructionContract):
    def make(self, network: Network, **settings: Any) -> DDTPControl:
        return DDTPControl(network, **settings)


class TestDDTPRHL(DifferenceReconstructionContract):
    def make(self, network: Network, **settings: Any) -> DDTPRHL:
        return DDTPRHL(network, **({"hidden_units": 40} | settings))


DIRECT = [DDTPLinear, DDTPControl, DDTPRHL]
on_every_direct_method = pytest.mark.parametrize("make", DIRECT)


@on_every_direct_method
def test_direct_feedback_has_no_forward_counterpart(make: type[DifferenceReconstruction]) -> None:
    algorithm = make(small_lenet())
    before = copy_state(algorithm)
    algorithm.symmetrize_feedback()
    assert changed(before, copy_state(algorithm)) == set()
    assert algorithm.feedback_angles() == {}


@on_every_direct_method
@pytest.mark.parametrize("build", RESNETS.values(), ids=RESNETS)
def test_direct_feedback_runs_on_residual_networks(
    make: type[DifferenceReconstruction], build: Any, tmp_path: Path
) -> None:
    """Stages of any kind; batch norm's statistics follow the clean pass alone."""
    algorithm = make(build())
    buffers = {name: value.clone() for name, value in algorithm.network.named_buffers()}
    passes_at = algorithm._phase_1

    def checked(passes: Any) -> Any:
        before = copy_state(algorithm.network)
        losses = passes_at(passes)
        assert changed(before, copy_state(algorithm.network)) == set()
        return losses

    algorithm._phase_1 = checked
    make_trainer(tmp_path, max_epochs=1).fit(algorithm, make_loader(2))
    assert all(not torch.equal(value, buffers[name]) for name, value in algorithm.network.named_buffers())


def test_layer_wise_feedback_refuses_residual_networks() -> None:
    with refused("BasicBlockStage", "DDTPLinear"):
        DTPDRL(RESNETS["resnet"]())


def test_direct_feedback_leads_from_the_output_to_every_hidden_stage() -> None:
    shapes = {name: tuple(map_.weight.shape) for name, map_ in DDTPLinear(small_lenet()).feedback.items()}
    assert shapes == {"conv1": (3 * 8 * 8, CLASSES), "conv2": (4 * 4 * 4, CLASSES), "fc1": (12, CLASSES)}
    algorithm = DDTPRHL(small_lenet(), hidden_units=40)
    shapes = {name: tuple(map_.weight.shape) for name, map_ in algorithm.feedback.items()}
    assert shapes == {"conv1": (3 * 8 * 8, 40), "conv2": (4 * 4 * 4, 40), "fc1": (12, 40)}
    assert tuple(algorithm.hidden.linear.weight.shape) == (40, CLASSES)


def test_a_network_that_is_no_chain_is_refused() -> None:
    with refused("needs a chain of stages, and Linear is none"):
        DDTPLinear(nn.Linear(3, 2))


@pytest.mark.parametrize(("name", "value"), [("hidden_units", 0), ("hidden_units", 2.5)])
def test_the_random_layer_needs_units(name: str, value: Any) -> None:
    with refused(name, str(value)):
        DDTPRHL(small_lenet(), **{name: value})


def test_an_unknown_readout_activation_is_refused() -> None:
    with refused("'sine'", "tanh"):
        DDTPRHL(small_lenet(), readout_activation="sine")


def test_the_random_layer_stays_as_drawn_and_is_saved(tmp_path: Path) -> None:
    algorithm = DDTPRHL(small_lenet(), hidden_units=40, readout_activation="identity")
    before = copy_state(algorithm.hidden)
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(algorithm, make_loader())
    assert changed(before, copy_state(algorithm.hidden)) == set()
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = DDTPRHL.load_from_checkpoint(tmp_path / "one.ckpt")
    assert changed(before, copy_state(loaded.hidden)) == set()
    assert loaded.hparams["readout_activation"] == "identity"
    assert loaded.hparams["hidden_units"] == 40


def test_decoders_can_be_made_symmetric() -> None:
    algorithm = DTPDRL(small_lenet())
    assert list(algorithm.feedback_angles()) == ["conv2", "fc1", "fc2"]
    assert all(45 < angle < 135 for angle in algorithm.feedback_angles().values())
    algorithm.symmetrize_feedback()
    assert all(angle < 1e-5 for angle in algorithm.feedback_angles().values())
    before = copy_state(algorithm.feedback)
    for _, stage in algorithm.network.stages():
        stage.weight.data.add_(1.0)
    assert changed(before, copy_state(algorithm.feedback)) == set()  # a copy, not the same tensor


def test_only_its_own_decoder_gets_a_gradient_from_a_stages_loss() -> None:
    """The decoders above serve as they are: their own gradients do not depend on the losses of those below."""
    steps = []
    for noise in ((0.1, 0.1, 0.1), (0.7, 0.1, 0.1)):
        torch.manual_seed(5)
        algorithm = DTPDRL(small_lenet(), noise=noise, feedback_optimizer=torch.optim.SGD)
        before = copy_state(algorithm.feedback)
        algorithm.train_feedback(draw_batch()[0])
        steps.append({name: value - before[name] for name, value in algorithm.feedback.state_dict().items()})
    assert changed(*steps) == {name for name in steps[0] if name.startswith("conv2.")}
