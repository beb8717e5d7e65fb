"""Short trainings on real images, outside of Lightning: what becomes of loss and angles."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.learners import algorithm_learner
from bioprop.algorithms import LDRL, Algorithm, Backprop
from bioprop.callbacks.alignment import alignment_to_backprop
from bioprop.datamodules import ImageFolder
from bioprop.networks import LeNet, Network, SimpleVGG

#: Networks by name; the narrow SimpleVGG has a quarter of the channels.
NETWORKS: dict[str, Callable[..., Network]] = {
    "lenet": LeNet,
    "narrow simplevgg": partial(SimpleVGG, channels=(32, 32, 64, 64, 128)),
}


@dataclass(frozen=True)
class Training:
    """Settings of one training.

    Attributes:
        data_dir: an image folder of 32x32 photographs.
        network: one of `NETWORKS`.
        settings: arguments of `LDRL`; None for BP.
        lr: learning rate of SGD with momentum 0.9 and decay 1e-4.
        batch: images in a batch.
        batches: number of batches that are trained on.
        marks: batches after which angles are measured.
        seed: seed of weights, noise and order.
    """

    data_dir: str
    network: str
    settings: Mapping[str, Any] | None
    lr: float = 0.02
    batch: int = 128
    batches: int = 100
    marks: tuple[int, ...] = ()
    seed: int = 0

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> Algorithm:
        """Build the algorithm; weights and feedback weights follow from the seed."""
        torch.manual_seed(self.seed)
        network = NETWORKS[self.network](image_shape, num_classes)
        optimizer = partial(torch.optim.SGD, lr=self.lr, momentum=0.9, weight_decay=1e-4)
        if self.settings is None:
            return Backprop(network, optimizer=optimizer)
        return LDRL(network, optimizer=optimizer, **self.settings)


@dataclass
class Course:
    """Result of one training.

    Attributes:
        diverged: the batch in which a weight or the loss was infinite; None if none was.
        loss: mean cross-entropy on 1,000 validation images at the end; infinite if it diverged.
        overall: degrees between the whole update and the BP gradient, by number of the batch.
        stages: the same for each stage, by number of the batch.
    """

    diverged: int | None = None
    loss: float = float("inf")
    overall: dict[int, float] = field(default_factory=dict)
    stages: dict[int, dict[str, float]] = field(default_factory=dict)


def load(training: Training) -> tuple[ImageFolder, Sequence[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Load the training batches, in an order that follows from the seed, and the validation images.

    Raises:
        UserError: as `ImageFolder` does.
    """
    data = ImageFolder(
        training.data_dir,
        batch_size=training.batch,
        normalization="cifar10",
        limit_train=10_000,
        limit_val=1_000,
        seed=training.seed,
    )
    data.setup("fit")
    batches: list[tuple[Tensor, Tensor]] = []
    while len(batches) < training.batches:
        batches += [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
    held = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    images, labels = (torch.cat(parts) for parts in zip(*held, strict=True))
    return data, batches[: training.batches], (images, labels)


def train(training: Training) -> Course:
    """Train on one thread, and measure.

    Args:
        training: settings.
    """
    torch.set_num_threads(1)
    data, batches, (images, labels) = load(training)
    algorithm = training.build(data.image_shape, data.num_classes)
    step, course = algorithm_learner(algorithm).step, Course()
    for number, batch in enumerate(batches, start=1):
        step(*batch)
        if not all(bool(parameter.isfinite().all()) for parameter in algorithm.parameters()):
            course.diverged = number
            return course
        if number in training.marks:
            found = alignment_to_backprop(algorithm, *batch)
            angles = {name: float(each.angle) for name, each in found.items()}
            course.overall[number] = angles.pop("overall")
            course.stages[number] = angles
    with torch.no_grad():
        logits = torch.cat([algorithm(part) for part in images.split(250)])
    loss = float(algorithm.output_loss.mean(logits, labels))
    course.loss, course.diverged = (loss, None) if loss < float("inf") else (float("inf"), training.batches)
    return course
