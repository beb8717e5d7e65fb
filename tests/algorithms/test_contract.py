"""The contract suites notice what they are for: algorithms with one promise broken each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bioprop.algorithms import LDRL
from bioprop.feedback.noise import NoiseStream
from bioprop.networks import Network, StagePass
from bioprop.testing import TargetPropagationContract
from bioprop.testing.helpers import NETWORKS


class MovesWeights(LDRL):
    """Nudges a forward weight while it trains feedback."""

    def _train_feedback(self, passes: Sequence[StagePass]) -> dict[str, Tensor]:
        self.network[0].weight.data.mul_(1.001)
        return super()._train_feedback(passes)


class TrainsFeedbackTwice(LDRL):
    """Moves feedback weights in phase 2."""

    def _step_forward_weights(self, gradients: dict[str, Tensor]) -> None:
        super()._step_forward_weights(gradients)
        with torch.no_grad():
            self.feedback["fc1"].weight.mul_(1.001)


class GlobalNoise(NoiseStream):
    """Noise of whatever the global generator draws next."""

    def draw(self, sigma: float, *shapes: Sequence[int]) -> list[Tensor]:
        return [sigma * torch.randn(*shape, dtype=self.dtype) for shape in shapes]


class DrawsFromTheGlobalGenerator(LDRL):
    """Takes its noise from wherever the global generator happens to stand."""

    def __init__(self, network: Network, **settings: Any) -> None:
        super().__init__(network, **settings)
        self.streams.noise = lambda place, like, *_: GlobalNoise(torch.Generator(), like.dtype)


class RepeatsItsNoise(LDRL):
    """Draws the same noise for every batch."""

    def __init__(self, network: Network, **settings: Any) -> None:
        super().__init__(network, **settings)
        self.streams.noise = lambda place, like, *_: NoiseStream(torch.Generator().manual_seed(place), like.dtype)


class StepsRaw(LDRL):
    """Steps the forward optimizer behind Lightning's back."""

    def _step_forward_weights(self, gradients: dict[str, Tensor]) -> None:
        for name, parameter in self.network.named_parameters():
            parameter.grad = gradients[name]
        self.optimizers(use_pl_optimizer=False).step()


class KeepsBeta(LDRL):
    """Hands the optimizer the gradients of the local losses, which carry ``beta``, not those in units of BP's."""

    def _step_forward_weights(self, gradients: dict[str, Tensor]) -> None:
        super()._step_forward_weights({name: self.beta * gradient for name, gradient in gradients.items()})


class LosesFeedback(LDRL):
    """Keeps its feedback weights out of the checkpoint, as plain attributes would be."""

    def state_dict(self, *args: Any, **settings: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **settings)
        return {name: value for name, value in state.items() if not name.startswith("feedback.")}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=False, assign=assign)


class SharesWeights(LDRL):
    """Symmetric feedback that is the forward weight itself."""

    def symmetrize_feedback(self) -> None:
        for _, stage, mirror in self.mirrored_stages():
            mirror.weight = stage.weight


def suite_of(algorithm: type[LDRL]) -> TargetPropagationContract:
    class Suite(TargetPropagationContract):
        def make(self, network: Network, **settings: Any) -> LDRL:
            return algorithm(network, **({"iterations": 2} | settings))

    return Suite()


Check = Callable[[TargetPropagationContract, Path], None]
BROKEN: list[tuple[type[LDRL], Check]] = [
    (MovesWeights, lambda suite, _: suite.test_phase_1_trains_every_feedback_weight()),
    (MovesWeights, lambda suite, at: suite.test_phase_1_leaves_forward_weights_and_phase_2_feedback_weights(at)),
    (TrainsFeedbackTwice, lambda suite, at: suite.test_phase_1_leaves_forward_weights_and_phase_2_feedback_weights(at)),
    (DrawsFromTheGlobalGenerator, lambda suite, at: suite.test_the_same_seed_gives_the_same_weights(at)),
    (DrawsFromTheGlobalGenerator, lambda suite, at: suite.test_a_resumed_run_equals_the_uninterrupted_one(at)),
    (RepeatsItsNoise, lambda suite, _: suite.test_every_batch_draws_noise_of_its_own()),
    (StepsRaw, lambda suite, at: suite.test_global_step_counts_batches(at)),
    (KeepsBeta, lambda suite, at: suite.test_the_forward_optimizer_is_handed_the_forward_gradients(at)),
    (LosesFeedback, lambda suite, at: suite.test_a_checkpoint_brings_everything_back(NETWORKS["lenet"], at)),
    (LosesFeedback, lambda suite, at: suite.test_a_resumed_run_equals_the_uninterrupted_one(at)),
    (SharesWeights, lambda suite, at: suite.test_symmetric_feedback_is_a_copy(NETWORKS["lenet"], at)),
]


@pytest.mark.parametrize(("algorithm", "check"), BROKEN, ids=[kind.__name__ for kind, _ in BROKEN])
def test_a_broken_promise_is_noticed(algorithm: type[LDRL], check: Check, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check(suite_of(algorithm), tmp_path)
    check(suite_of(LDRL), tmp_path)
