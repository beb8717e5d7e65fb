"""Stages that standardise their activations over the batch."""

import pytest
import torch

from bioprop.errors import UserError
from bioprop.networks import MLP, LinearStage, StandardizedStage, build_network


def stage_and_images() -> tuple[StandardizedStage, torch.Tensor]:
    return StandardizedStage(LinearStage((6,), 4, "tanh")).double(), torch.randn(7, 6, dtype=torch.float64)


def test_training_standardises_by_the_batch() -> None:
    stage, images = stage_and_images()
    values = torch.tanh(images @ stage.weight.T + stage.layer.bias)
    mean = values.sum(0) / 7
    std = (((values - mean) ** 2).sum(0) / 6).sqrt()
    torch.testing.assert_close(stage(images), (values - mean) / (std + 1e-12))
    torch.testing.assert_close(stage.running_mean, 0.1 * mean)
    torch.testing.assert_close(stage.running_std, 0.9 + 0.1 * std)


def test_evaluation_does_not_depend_on_the_rest_of_the_batch() -> None:
    stage, images = stage_and_images()
    for _ in range(200):
        stage(images)
    trained = stage(images)
    stage.eval()
    kept = {name: value.clone() for name, value in stage.state_dict().items()}
    torch.testing.assert_close(stage(images), trained, rtol=1e-6, atol=1e-6)  # the averages have arrived
    torch.testing.assert_close(stage(images[:1]), stage(images)[:1])
    assert all(torch.equal(value, kept[name]) for name, value in stage.state_dict().items())


def test_the_statistics_are_saved() -> None:
    names = set(StandardizedStage(LinearStage((6,), 4, "tanh")).state_dict())
    assert names == {"layer.linear.weight", "layer.linear.bias", "running_mean", "running_std"}


def test_a_single_image_is_refused_in_training() -> None:
    stage, images = stage_and_images()
    with pytest.raises(UserError, match="a batch of 1 image cannot be standardised: use a batch size of at least 2"):
        stage(images[:1])


def test_the_mlp_standardises_its_hidden_stages() -> None:
    network = MLP((1, 3, 3), 5, hidden=(8, 7), activation="tanh", standardize=True)
    assert [type(stage).__name__ for _, stage in network.stages()] == ["StandardizedStage"] * 2 + ["LinearStage"]
    rebuilt = build_network(network.description())
    rebuilt.load_state_dict(network.state_dict())
    images = torch.randn(4, 1, 3, 3)
    assert torch.equal(rebuilt(images), network(images))
    whole = MLP((1, 3, 3), 5, hidden=(8, 7), standardize="all")
    assert [type(stage).__name__ for _, stage in whole.stages()] == ["StandardizedStage"] * 3
    with pytest.raises(UserError, match="standardize is 'output': choose true"):
        MLP((1, 3, 3), 5, standardize="output")
    assert not any(isinstance(stage, StandardizedStage) for _, stage in MLP((1, 3, 3), 5).stages())
