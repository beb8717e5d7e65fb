"""The promises of every network, as a test suite to inherit."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bioprop.algorithms import LDRL, Algorithm, Backprop, FeedbackAlignment
from bioprop.networks import Network, build_mirror, build_network
from bioprop.testing.helpers import WITHOUT_REMINDERS, changed, copy_state, from_one_seed, make_trainer, refused


class NetworkContract(ABC):
    """Promises of every network: a test class inherits them all and overrides `make`.

    Attributes:
        image_shape: (channels, height, width) of the images, in pixels.
        num_classes: number of classes.
        has_mirrors: whether every stage but the first has a feedback mirror; if not, target propagation refuses.
    """

    pytestmark: ClassVar = [
        *WITHOUT_REMINDERS,
        # torch's own forward-mode differentiation compiles its rules in a way that it deprecates
        pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    ]
    image_shape: tuple[int, int, int] = (1, 16, 16)
    num_classes = 10
    has_mirrors = True

    @abstractmethod
    def make(self, image_shape: tuple[int, int, int], num_classes: int) -> Network:
        """Make the network."""

    def made(self) -> Network:
        """Make the network for the suite's images."""
        return self.make(self.image_shape, self.num_classes)

    def draw_images(self, count: int = 8) -> Tensor:
        """Draw white-noise images, ``[count, channels, height, width]``."""
        return torch.randn(count, *self.image_shape)

    @pytest.fixture(autouse=True)
    def _from_one_seed(self) -> Iterator[None]:
        with from_one_seed():
            yield

    def test_each_stage_takes_what_the_one_below_hands_out(self) -> None:
        network, state = self.made(), self.draw_images()
        assert len(network.stages()) == len(network)
        for name, stage in network.stages():
            assert tuple(state.shape[1:]) == tuple(stage.input_shape), name
            again = stage(state)
            state = stage.run(state).output
            assert tuple(state.shape[1:]) == tuple(stage.output_shape), name
            torch.testing.assert_close(again, state)

    def test_logits_are_one_number_for_each_class_and_depend_on_the_image(self) -> None:
        logits = self.made()(self.draw_images())
        assert logits.shape == (8, self.num_classes)
        assert logits.isfinite().all()
        assert logits.std(0).min() > 0

    def test_it_is_built_again_from_its_description(self) -> None:
        network = self.made()
        rebuilt = build_network(json.loads(json.dumps(network.description())))
        assert type(rebuilt) is type(network)
        assert rebuilt.description() == network.description()
        rebuilt.load_state_dict(network.state_dict())
        images = self.draw_images()
        assert torch.equal(rebuilt.eval()(images), network.eval()(images))

    def test_exact_mirrors_with_copied_weights_are_transposed_jacobians(self) -> None:
        """``J_G v = J_F^T v`` for a random ``v`` at every stage: forward mode for G, whose unpooling needs it."""
        if not self.has_mirrors:
            return  # the refusal is tested below
        network, state = self.made().double(), self.draw_images().double()
        for place, (_, stage) in enumerate(network.stages()):
            inputs = state.detach().requires_grad_()
            clean = stage.run(inputs)
            state = clean.output.detach()
            if place == 0:
                continue
            mirror = build_mirror(stage, "exact").double()
            with torch.no_grad():
                for forward, feedback in mirror.pairs(stage):
                    feedback.copy_(forward)
            outputs = state - 1e-3 * (state == 0)  # dead units of ReLU sit on its kink
            v = torch.randn_like(outputs)
            (expected,) = torch.autograd.grad(clean.output, inputs, v)
            found: Tensor = torch.func.jvp(partial(mirror, switches=clean.switches), (outputs,), (v,))[1]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("algorithm", [Backprop, FeedbackAlignment, LDRL])
    def test_a_step_trains_every_weight(self, algorithm: Callable[..., Algorithm], tmp_path: Path) -> None:
        network = self.made()
        before = copy_state(network)
        if algorithm is LDRL and not self.has_mirrors:
            with refused():
                algorithm(network)
            return
        data = TensorDataset(self.draw_images(), torch.arange(8) % self.num_classes)
        loader: DataLoader[Any] = DataLoader(data, batch_size=8)
        make_trainer(tmp_path, max_epochs=1).fit(algorithm(network), loader)
        after = copy_state(network)
        assert {name for name, _ in network.named_parameters()} <= changed(before, after)
        assert all(value.isfinite().all() for value in after.values())
