"""A stranger's all-convolutional network: strided convolutions, and a 1x1 convolution averaged over positions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bioprop.algorithms import DTP, LDRL, Algorithm, Backprop, DirectFeedbackAlignment, FeedbackAlignment
from bioprop.networks import ConvStage, Network, PooledLinearStage, Stage
from bioprop.testing import NetworkContract
from bioprop.testing.helpers import CLASSES, SHAPE, draw_batch, make_loader, make_trainer


class AllConv(Network):
    """Convolutions of stride 2 in place of pooling, and no hidden linear stage (Springenberg et al., 2015)."""

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int, channels: tuple[int, ...] = (8, 16, 16)
    ) -> None:
        stages: dict[str, Stage] = {}
        shape: tuple[int, ...] = tuple(image_shape)
        for number, width in enumerate(channels, start=1):
            stride = 1 if number == len(channels) else 2
            stages[f"conv{number}"] = ConvStage(shape, width, 3, stride, padding=1, activation="elu")
            shape = stages[f"conv{number}"].output_shape
        stages["head"] = PooledLinearStage(shape, num_classes)
        settings = {"image_shape": list(image_shape), "num_classes": num_classes, "channels": list(channels)}
        super().__init__(stages, settings)


class TestAllConv(NetworkContract):
    def make(self, image_shape: tuple[int, int, int], num_classes: int) -> Network:
        return AllConv(image_shape, num_classes, channels=(3, 4, 5))


def test_the_head_is_a_1x1_convolution_averaged_over_positions() -> None:
    head = PooledLinearStage((4, 5, 3), 10)
    maps = torch.randn(6, 4, 5, 3)
    expected = F.conv2d(maps, head.linear.weight[:, :, None, None], head.linear.bias).mean((2, 3))
    torch.testing.assert_close(head(maps), expected)


@pytest.mark.parametrize("algorithm", [Backprop, FeedbackAlignment, DirectFeedbackAlignment, LDRL, DTP])
def test_the_loss_of_one_batch_falls(algorithm: Callable[..., Algorithm], tmp_path: Path) -> None:
    torch.manual_seed(0)
    feedback = {"feedback_lr": (1e-5, 3e-5, 1e-2)} if algorithm is DTP else {}  # conv2, conv3, head
    model = algorithm(AllConv(SHAPE, CLASSES), optimizer=partial(torch.optim.Adam, lr=0.005), **feedback)
    images, labels = draw_batch(8)
    before = F.cross_entropy(model(images), labels).item()
    make_trainer(tmp_path, max_epochs=60).fit(model, make_loader(1))
    after = F.cross_entropy(model(images), labels).item()
    assert after < 0.75 * before, f"the loss went from {before:.4g} to {after:.4g}"
