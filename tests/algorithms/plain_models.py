"""Models as a user would bring them: plain torch, nothing of `bioprop`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.networks import ResNet
from bioprop.testing.helpers import CLASSES, NETWORKS, SHAPE


class ResidualModel(nn.Module):
    """A strided stem, a block with a connection around it, a head; all kinds of geometry."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(SHAPE[0], 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(4, 6, 3, padding="same", groups=2)
        self.second = nn.Conv2d(6, 4, (3, 2), padding=(1, 1), dilation=(1, 2), bias=False)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        state = F.relu(self.norm(self.stem(images)))
        state = F.relu(state + self.second(torch.tanh(self.first(state))))
        return self.head(F.max_pool2d(state, 2).mean((2, 3)))


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(SHAPE[0], 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(96, 12, bias=False),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, CLASSES),
    )


PLAIN: dict[str, Callable[[], nn.Module]] = {"plain sequential": sequential, "plain residual": ResidualModel}
RESNETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(SHAPE, CLASSES, blocks=(1, 1), widths=(4, 6)),
    "resnet without batch norm": lambda: ResNet(SHAPE, CLASSES, blocks=(2,), widths=(4,), batch_norm=False),
}
EVERY: dict[str, Callable[[], nn.Module]] = {**NETWORKS, **RESNETS, **PLAIN}
