"""The angle table of Ernoult et al. (ICML 2022): how feedback training turns the update towards the BP gradient.

One batch of 256 CIFAR-10 images, bias-free LeNet, beta 0.4655; the feedback of every stage is drawn, made symmetric, or
trained by L-DRL for 5000 iterations (sigma 0.2, 0.2, 0.1). Needs an image folder of 32x32 photographs:

    python benchmarks/angle_table.py --data_dir data/images

The published length takes about an hour on one core; --iterations 500 shows the trend in minutes.
"""

import csv
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from bioprop.algorithms import LDRL
from bioprop.callbacks.alignment import alignment_to_backprop
from bioprop.datamodules import ImageFolder
from bioprop.networks import LeNet

COLUMNS = ("mirror", "switches", "feedback", "seed", "iterations", "conv1", "conv2", "fc1", "fc2")


def measure(
    data_dir: str,
    mirror: Literal["paper", "exact"] = "paper",
    switches: Literal["noisy", "clean"] = "noisy",
    feedback_step: Literal["sgd", "normalized"] = "sgd",
    feedback_lr: tuple[float, ...] = (1e-4, 2.5e-3, 1e-2),
    iterations: int = 5000,
    report_every: int = 500,
    seeds: int = 1,
    output: Path = Path("runs/angle_table.csv"),
) -> None:
    """Measure and print the table, adding a row to the output at every report.

    Args:
        data_dir: folder with train/<class>/*.
        mirror: form of the feedback operator.
        switches: whose switches unpool the noisy output.
        feedback_step: sgd as published (momentum 0.9), or normalized.
        feedback_lr: learning rate of conv2, fc1, fc2; one value for all with normalized.
        iterations: feedback iterations a stage.
        report_every: iterations between two rows of the trained table.
        seeds: number of seeds, each with its own weights and noise.
        output: CSV file to add to.
    """
    data = ImageFolder(data_dir, batch_size=256, normalization="cifar10", limit_train=256, limit_val=10)
    data.setup("fit")
    # a batch is one epoch here: its order does not matter
    images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    table = Table(*COLUMNS, title="angle to the BP gradient, degrees")
    output.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        torch.manual_seed(seed)
        network = LeNet(data.image_shape, data.num_classes, bias=False)
        algorithm = LDRL(
            network,
            beta=0.4655,
            second_noise="independent",
            noise=(0.2, 0.2, 0.1),
            feedback_lr=feedback_lr if len(feedback_lr) > 1 else feedback_lr[0],
            iterations=report_every,
            switches=switches,
            mirror=mirror,
            feedback_step=feedback_step,
        )
        drawn = {name: value.clone() for name, value in algorithm.state_dict().items()}

        def report(feedback: str, done: int, algorithm: LDRL = algorithm, seed: int = seed) -> None:
            angles = alignment_to_backprop(algorithm, images, labels)
            row = [mirror, switches, feedback, seed, done]
            row += [f"{float(angles[stage].angle):.2f}" for stage in COLUMNS[5:]]
            is_new = not output.exists()
            with output.open("a", newline="") as file:
                csv.writer(file).writerows([COLUMNS, row] if is_new else [row])
            table.add_row(*map(str, row))

        report("random", 0)
        algorithm.symmetrize_feedback()
        report("symmetric", 0)
        algorithm.load_state_dict(drawn)
        for done in range(report_every, iterations + 1, report_every):
            algorithm.train_feedback(images)
            report("trained", done)
    Console().print(table)


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
