"""L-DRL's training step as its formulas stand: every loss formed by calling F and G, every gradient by autograd.

Written for clarity, as a researcher would write it first; it is what `benchmarks/bench.py` measures speed-ups against.
Networks, weights, switches and hyperparameters are those of `bioprop`; nothing of its mathematics is used. Layouts and
noise are torch's defaults.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Draws noise like a tensor, of the given standard deviation.
Draw = Callable[[Tensor, float], Tensor]


class PlainStage(nn.Module):
    """A layer, its activation, its max-pooling if any, and a feedback layer of its own that leads back.

    Args:
        layer: convolution or linear layer.
        feedback: transposed convolution or linear layer; None for the first stage.
        pool: max-pooling that returns its switches, or None.
        activation: after the layer; and, before the feedback layer, the one of the feedback path.
    """

    def __init__(
        self,
        layer: nn.Module,
        feedback: nn.Module | None,
        pool: nn.MaxPool2d | None,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.layer, self.feedback, self.pool, self.activation = layer, feedback, pool, activation

    def run(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute ``F(inputs)`` and the switches."""
        if isinstance(self.layer, nn.Linear):
            return self.activation(self.layer(inputs.flatten(1))), None
        maps = self.activation(self.layer(inputs))
        return (maps, None) if self.pool is None else self.pool(maps)

    def back(self, outputs: Tensor, switches: Tensor | None, shape: torch.Size) -> Tensor:
        """Compute ``G(outputs)``, in the shape of the stage's inputs: unpool, activation, feedback layer."""
        assert self.feedback is not None
        if switches is not None:
            outputs = self.unpool(outputs, switches, shape)
        back: Tensor = self.feedback(self.activation(outputs))
        return back.view(shape)

    def unpool(self, outputs: Tensor, switches: Tensor, shape: torch.Size) -> Tensor:
        """Put values back to where the switches point; where windows overlap, the last window's stays."""
        # the convolutions keep the size of the map
        maps = outputs.new_zeros(*outputs.shape[:2], shape[2] * shape[3])
        return maps.scatter(2, switches.flatten(2), outputs.flatten(2)).view(*outputs.shape[:2], *shape[2:])


class PlainLDRL:
    """Feedback training and forward step, as published (Ernoult et al., 2022).

    Args:
        stages: from the input to the output.
        beta: step of the output target.
        noise: standard deviation, stages 2..N.
        feedback_lr: learning rates, stages 2..N.
        iterations: feedback iterations, stages 2..N.
        momentum: of the feedback weights' SGD.
        optimizer: makes the optimizer of the forward weights.
        draw: draws noise.
        released: run the clean pass of a stage again in every iteration, as the authors' program does to have its
            switches where its unpooling looks for them.
    """

    def __init__(
        self,
        stages: Sequence[PlainStage],
        beta: float,
        noise: Sequence[float],
        feedback_lr: Sequence[float],
        iterations: Sequence[int],
        momentum: float,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        draw: Draw = lambda like, sigma: sigma * torch.randn_like(like),
        released: bool = False,
    ) -> None:
        self.released = released
        self.stages, self.beta, self.noise, self.iterations, self.draw = stages, beta, noise, iterations, draw
        self.feedback_optimizers = [
            torch.optim.SGD(stage.feedback.parameters(), lr=lr, momentum=momentum)
            for stage, lr in zip(stages[1:], feedback_lr, strict=True)
            if stage.feedback is not None
        ]
        self.optimizer = optimizer([parameter for stage in stages for parameter in stage.layer.parameters()])

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train the feedback weights, then the forward weights, on one batch."""
        self.train_feedback(images)
        self.train_forward(images, labels)

    def run(self, images: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return ``s^0 .. s^N`` and the switches of all stages."""
        states: list[Tensor] = [images]
        switches: list[Tensor | None] = []
        with torch.no_grad():
            for stage in self.stages:
                state, chosen = stage.run(states[-1])
                states.append(state)
                switches.append(chosen)
        return states, switches

    def train_feedback(self, images: Tensor) -> None:
        """Phase 1: some iterations for every stage above the first."""
        states, switches = self.run(images)
        for number in range(1, len(self.stages)):
            self.train_stage(number, states[number], states[number + 1], switches[number])

    def train_stage(self, number: int, inputs: Tensor, output: Tensor, switches: Tensor | None) -> None:
        """Phase 1 of one stage."""
        stage, sigma = self.stages[number], self.noise[number - 1]
        optimizer = self.feedback_optimizers[number - 1]
        for _ in range(self.iterations[number - 1]):
            eps, eta = self.draw(inputs, sigma), self.draw(output, sigma)
            with torch.no_grad():
                noisy, noisy_switches = stage.run(inputs + eps)
                if self.released:
                    output, switches = stage.run(inputs)
            clean = stage.back(output, switches, inputs.shape)
            first = eps * (stage.back(noisy, noisy_switches, inputs.shape) - clean)
            second = (stage.back(output + eta, switches, inputs.shape) - clean) ** 2
            loss = (-2 * first + second).flatten(1).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def train_forward(self, images: Tensor, labels: Tensor) -> None:
        """Phase 2: targets from the output down, one local loss a stage, one step."""
        states, switches = self.run(images)
        onehot = F.one_hot(labels, states[-1].shape[1]).to(images.dtype)
        targets = [states[-1] - self.beta * (states[-1].softmax(1) - onehot)]
        with torch.no_grad():
            for number in range(len(self.stages) - 1, 0, -1):
                stage, shape = self.stages[number], states[number].shape
                at_target = stage.back(targets[0], switches[number], shape)
                targets.insert(0, states[number] + at_target - stage.back(states[number + 1], switches[number], shape))
        loss = torch.zeros((), dtype=images.dtype)
        for stage, inputs, target in zip(self.stages, states[:-1], targets, strict=True):
            loss = loss + 0.5 * (stage.run(inputs)[0] - target).square().flatten(1).sum(1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
