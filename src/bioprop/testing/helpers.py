"""Small networks, batches and trainers for tests, and comparisons of weights bit for bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bioprop.algorithms import Algorithm
from bioprop.errors import UserError
from bioprop.functional.pooling import Pool
from bioprop.networks import MLP, ConvStage, LeNet, LinearStage, Network, SimpleVGG

Batch = tuple[Tensor, Tensor]
Weights = dict[str, Tensor]
SHAPE, CLASSES = (1, 16, 16), 10

#: Reminders of Lightning that say nothing about a few batches in memory.
WITHOUT_REMINDERS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "You defined a `validation_step` but have no `val_dataloader`",
        "The '.*_dataloader' does not have many workers",
        "The number of training batches .* is smaller than the logging interval",
        ".*LeafSpec.* is deprecated:FutureWarning",
    )
]


@contextmanager
def from_one_seed() -> Iterator[None]:
    """Start from the same random state, whatever ran before, and leave none behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2022)
        yield


class Strided(Network):
    """A user's own chain: a strided conv stage without pooling, a pooled one, and the output."""

    def __init__(self) -> None:
        stem = ConvStage(SHAPE, 3, 3, stride=2, padding=1, activation="tanh")
        body = ConvStage(stem.output_shape, 4, 3, padding=1, activation="leaky_relu", pool=Pool(2, 2))
        super().__init__({"stem": stem, "body": body, "out": LinearStage(body.output_shape, CLASSES, "identity")}, {})


NETWORKS: dict[str, Callable[[], Network]] = {
    "mlp": lambda: MLP(SHAPE, CLASSES, hidden=(12, 9)),
    "mlp of one stage": lambda: MLP(SHAPE, CLASSES, hidden=()),
    "mlp without bias": lambda: MLP(SHAPE, CLASSES, hidden=(12,), activation="relu", bias=False),
    "lenet": lambda: LeNet(SHAPE, CLASSES, channels=(3, 4), hidden=12),
    "vgg": lambda: SimpleVGG(SHAPE, CLASSES, channels=(3, 4, 5)),
    "strided": Strided,
}
on_every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


def small_lenet() -> Network:
    """Make a LeNet of 3 and 4 channels and 12 hidden units."""
    return NETWORKS["lenet"]()


def draw_batch(count: int = 8, seed: int = 0) -> Batch:
    """Draw white-noise images ``[count, 1, 16, 16]`` and labels ``[count]``, from a seed of their own."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, *SHAPE, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)


def make_loader(batches: int = 3, size: int = 8) -> DataLoader[Any]:
    """Give 8 images a batch, or batches of another size out of as many images, in the same order every epoch."""
    return DataLoader(TensorDataset(*draw_batch(8 * batches)), batch_size=size, shuffle=False)


def make_trainer(folder: Path, **settings: Any) -> Trainer:
    """Make a trainer on the CPU that writes nothing; ``settings`` win over that."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return Trainer(**(quiet | settings))


def copy_state(module: nn.Module) -> Weights:
    """Copy all parameters and buffers, by name."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before: Weights, after: Weights) -> set[str]:
    """Return the names of the tensors that are not bit for bit the same."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@contextmanager
def refused(*named: str) -> Iterator[None]:
    """Expect a UserError of one sentence that contains all of ``named``."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in named if part not in message] == [], message


def sgd(lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 1e-4) -> Callable[..., torch.optim.Optimizer]:
    """Return a function that makes SGD of a list of parameters."""
    return partial(torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=weight_decay)


def cosine(epochs: int) -> Callable[..., torch.optim.lr_scheduler.LRScheduler]:
    """Return a function that makes a cosine schedule of an optimizer."""
    return partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)


class KilledError(Exception):
    """Ends a run where nothing was prepared for it."""


class KillAfter(Callback):
    """Ends a run in the step after so many batches."""

    def __init__(self, batches: int | None) -> None:
        self.batches = batches

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.batches:
            raise KilledError


class Handed(Callback):
    """Keeps the gradients that the forward optimizer was handed for its first step."""

    def __init__(self) -> None:
        self.gradients: Weights = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for name, parameter in cast(nn.Module, pl_module.network).named_parameters():
            self.gradients.setdefault(name, cast(Tensor, parameter.grad).clone())


class Phases(Callback):
    """Records the names of the tensors that each phase of a step changed."""

    def __init__(self, algorithm: Algorithm, phases: tuple[str, str, str]) -> None:
        self.course: list[tuple[str, set[str]]] = []
        for phase in phases:
            setattr(algorithm, phase, self.recorded(algorithm, phase))

    def recorded(self, algorithm: Algorithm, phase: str) -> Callable[..., Any]:
        run = getattr(algorithm, phase)

        def wrapped(*args: Any) -> Any:
            before = copy_state(algorithm)
            result = run(*args)
            self.course.append((phase, changed(before, copy_state(algorithm))))
            return result

        return wrapped
