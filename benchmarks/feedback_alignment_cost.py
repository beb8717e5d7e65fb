"""What a batch costs under each rule of feedback alignment, as a ratio to BP's in the same run.

    python benchmarks/feedback_alignment_cost.py

Every round times one training step (feedback phase, gradients, optimizer) of each algorithm in turn on the same batch
of noise images, LeNet; the figures are medians over the rounds.
"""

from statistics import median
from time import perf_counter
from typing import get_args

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from bioprop.algorithms import Algorithm, Backprop, DirectFeedbackAlignment, FeedbackAlignment
from bioprop.algorithms.feedback_alignment import Rule
from bioprop.networks import LeNet


def measure(batch_size: int = 128, rounds: int = 11, threads: int = 2) -> None:
    """Time and print the table.

    Args:
        batch_size: images in a batch, 3x32x32.
        rounds: timed rounds, after two that are not.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    algorithms: dict[str, Algorithm] = {"BP": Backprop(LeNet((3, 32, 32), 10))}
    for rule in get_args(Rule):
        algorithms[rule] = FeedbackAlignment(LeNet((3, 32, 32), 10), rule=rule)
    algorithms["DFA"] = DirectFeedbackAlignment(LeNet((3, 32, 32), 10))
    steps = {name: _step(algorithm) for name, algorithm in algorithms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = perf_counter()
            step(images, labels)
            if turn >= 2:
                seconds[name].append(perf_counter() - start)
    table = Table("algorithm", "ms per batch", "ratio to BP", title=f"LeNet, batch {batch_size}, {threads} threads")
    for name, times in seconds.items():
        table.add_row(name, f"{1000 * median(times):.1f}", f"{median(times) / median(seconds['BP']):.2f}")
    Console().print(table)


def _step(algorithm: Algorithm):  # type: ignore[no-untyped-def]
    """A whole training step outside Lightning, whose overhead is the same for all."""
    optimizers, _ = algorithm.configure_optimizers()

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        algorithm.train_feedback(images, labels)
        gradients = algorithm._gradients(images, labels).forward
        for name, parameter in algorithm.network.named_parameters():
            parameter.grad = gradients[name]
        optimizers[0].step()
        if isinstance(algorithm, FeedbackAlignment) and algorithm.rule == "kolen_pollack":
            algorithm._step_kolen_pollack(gradients)

    return step


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
