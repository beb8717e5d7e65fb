"""L-DRL as published and as its authors' program computes it (Ernoult et al., ICML 2022): every gradient by autograd.

The rule is that of `ldrl.py`. What differs is published: the second noise ``eta`` is a draw of its own; the feedback
weights take steps of SGD with momentum, at a learning rate, a noise and a number of iterations for each stage; the
noisy output is unpooled by its own switches; and G has ELU itself for its activation, after unpooling.

A stage may be any conv layer that keeps the size of its map, with any pooling, or a linear layer. `benchmarks/bench.py`
measures the speed of the package against this page: layouts and noise are torch's defaults.

    python -m examples.ldrl_published
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common import Result, output_error, step_weights, train

Activation = Callable[[Tensor], Tensor]
Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


class Stage(nn.Module):
    """A conv or linear layer, its activation, its max-pooling, and the feedback layer that leads back (None at n = 1).

    The pooling returns its switches; there may be none. The activation serves both directions.
    """

    def __init__(
        self, layer: nn.Module, feedback: nn.Module | None, pool: nn.MaxPool2d | None, activation: Activation
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
        back: Tensor = self.feedback(self.activation(outputs)).view(shape)
        return back

    def unpool(self, outputs: Tensor, switches: Tensor, shape: torch.Size) -> Tensor:
        """Put values back to where the switches point; where windows overlap, the last window's stays."""
        # the convolutions keep the size of the map
        maps = outputs.new_zeros(*outputs.shape[:2], shape[2] * shape[3])
        return maps.scatter(2, switches.flatten(2), outputs.flatten(2)).view(*outputs.shape[:2], *shape[2:])


class PublishedLDRL:
    """Feedback training and forward step.

    Args:
        stages: from the input to the output.
        beta: step of the output target.
        noise: standard deviation for each of the stages 2..N.
        feedback_lr: learning rate of the feedback weights for each of the stages 2..N.
        iterations: feedback iterations a batch for each of the stages 2..N.
        momentum: of the feedback weights' SGD.
        optimizer: makes the optimizer of the forward weights, which is handed the gradient of the local losses:
            ``beta`` times as large as that of BP.
        draw: draws noise like a tensor, of a standard deviation.
        released: run the clean pass of a stage again in every iteration, as the authors' program does to have its
            switches where its unpooling looks for them; changes the cost alone.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        beta: float,
        noise: Sequence[float],
        feedback_lr: Sequence[float],
        iterations: Sequence[int],
        momentum: float,
        optimizer: Optimizer,
        draw: Callable[[Tensor, float], Tensor] = lambda like, sigma: sigma * torch.randn_like(like),
        released: bool = False,
    ) -> None:
        self.stages, self.beta, self.noise, self.iterations = stages, beta, noise, iterations
        self.draw, self.released = draw, released
        self.feedback_optimizers = [
            torch.optim.SGD(stage.feedback.parameters(), lr=lr, momentum=momentum)
            for stage, lr in zip(stages[1:], feedback_lr, strict=True)
            if stage.feedback is not None
        ]
        self.weights: list[Tensor] = [parameter for stage in stages for parameter in stage.layer.parameters()]
        self.optimizer = optimizer(self.weights)

    def logits(self, images: Tensor) -> Tensor:
        """Return ``s^N``."""
        for stage in self.stages:
            images, _ = stage.run(images)
        return images

    @torch.no_grad()
    def run(self, images: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return ``s^0 .. s^N`` and the switches of all stages."""
        states: list[Tensor] = [images]
        switches: list[Tensor | None] = []
        for stage in self.stages:
            state, chosen = stage.run(states[-1])
            states.append(state)
            switches.append(chosen)
        return states, switches

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train the feedback weights, then the forward weights, on one batch."""
        states, switches = self.run(images)
        for number in range(1, len(self.stages)):
            self.train_stage(number, states[number], states[number + 1], switches[number])
        step_weights(self.optimizer, self.weights, self.local_gradients(images, labels))

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

    def local_gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Phase 2: targets from the output down, and the gradient of one local loss a stage."""
        states, switches = self.run(images)
        targets = [states[-1] - self.beta * output_error(states[-1], labels)]
        with torch.no_grad():
            for number in range(len(self.stages) - 1, 0, -1):
                stage, shape = self.stages[number], states[number].shape
                at_target = stage.back(targets[0], switches[number], shape)
                targets.insert(0, states[number] + at_target - stage.back(states[number + 1], switches[number], shape))
        loss = torch.zeros((), dtype=images.dtype)
        for stage, inputs, target in zip(self.stages, states[:-1], targets, strict=True):
            loss = loss + 0.5 * (stage.run(inputs)[0] - target).square().flatten(1).sum(1).mean()
        return list(torch.autograd.grad(loss, self.weights))

    def gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Return the same over beta, in units of the gradient of BP."""
        return [gradient / self.beta for gradient in self.local_gradients(images, labels)]


def main(epochs: int = 10) -> Result:
    """Train, and print the result."""
    torch.manual_seed(0)
    pool = nn.MaxPool2d(2, return_indices=True)
    stages = [
        Stage(nn.Conv2d(1, 16, 3, padding=1, bias=False), None, pool, F.elu),
        Stage(
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.ConvTranspose2d(32, 16, 3, padding=1, bias=False),
            pool,
            F.elu,
        ),
        Stage(nn.Linear(128, 10, bias=False), nn.Linear(10, 128, bias=False), None, lambda values: values),
    ]
    lr = 0.02 / 0.7
    method = PublishedLDRL(
        stages,
        beta=0.7,
        noise=(0.4, 0.08),
        feedback_lr=(1e-3, 0.1),
        iterations=(20, 20),
        momentum=0.9,
        optimizer=lambda weights: torch.optim.SGD(weights, lr=lr, momentum=0.9),
    )
    return train(method, epochs)


if __name__ == "__main__":
    main()
