"""Models as users write them: what feedback alignment takes as it is, and what it refuses in a sentence."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bioprop.algorithms import Backprop, FeedbackAlignment
from bioprop.networks import Network
from bioprop.networks.resnet import BasicBlockStage, PooledLinearStage
from bioprop.testing.helpers import SHAPE, draw_batch, make_loader, make_trainer, refused


class HeadFirst(nn.Module):
    """Registers its output layer before the others, and a layer it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.body = nn.Linear(256, 8)
        self.spare = nn.Linear(5, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images.flatten(1)).relu())


@pytest.mark.parametrize("cls", [Backprop, FeedbackAlignment])
def test_order_of_registration_and_unused_layers_do_not_matter(
    cls: Callable[..., Backprop | FeedbackAlignment], tmp_path: Path
) -> None:
    algorithm = cls(HeadFirst())
    before = algorithm.network.spare.weight.clone()
    images, labels = draw_batch(24)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(algorithm, DataLoader(TensorDataset(images, labels % 3), batch_size=8))
    assert "train/accuracy" in trainer.callback_metrics
    assert "train/accuracy_top5" not in trainer.callback_metrics  # three classes
    assert torch.equal(algorithm.network.spare.weight, before)


def test_layers_whose_weight_none_can_stand_in_for_are_refused() -> None:
    attention = nn.MultiheadAttention(8, 2)
    with refused("layer 2.out_proj belongs to an attention that hides its products"):
        FeedbackAlignment(nn.Sequential(nn.Flatten(), nn.Linear(256, 8), attention))


def test_a_model_without_layers_is_refused() -> None:
    with refused("Flatten has no Linear or Conv layer to align"):
        FeedbackAlignment(nn.Flatten())


def test_a_first_stage_of_several_layers_has_backward_matrices_inside() -> None:
    block = BasicBlockStage(SHAPE, 3, 1, "relu", True)
    network = Network({"block": block, "out": PooledLinearStage(block.output_shape, 10)}, {})
    assert "block.conv2" in dict(FeedbackAlignment(network).layers())


def test_kolen_pollack_leaves_frozen_layers_as_they_are(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 10))
    model[3].requires_grad_(False)
    before = model[3].weight.clone()
    algorithm = FeedbackAlignment(model, rule="kolen_pollack", decay=0.1)
    make_trainer(tmp_path, max_epochs=1).fit(algorithm, make_loader())
    assert torch.equal(model[3].weight, before)
