"""Stages whose activations are standardised over the batch."""

import torch
from torch import Tensor

from bioprop.errors import UserError
from bioprop.functional.differences import STD_FLOOR, standardize
from bioprop.networks.stages import LinearStage, Stage, StageOutput

#: How far the running statistics move towards those of a batch, as in torch's batch norm.
MOMENTUM = 0.1


class StandardizedStage(Stage):
    """``(rho(W x + b) - mean) / (std + 1e-12)``, for each unit over the batch (Shibuya et al., AAAI 2023).

    Batch norm without weights of its own, after the activation. In training, mean and standard deviation are those of
    the batch and the gradient flows through them. In evaluation they are running means (ours: the authors' program
    takes the batch's there too, which makes a prediction depend on the images it happens to share a batch with).

    Args:
        layer: the layer and its activation.
    """

    def __init__(self, layer: LinearStage) -> None:
        super().__init__()
        self.layer = layer
        self.input_shape, self.output_shape = layer.input_shape, layer.output_shape
        self.register_buffer("running_mean", torch.zeros(layer.output_shape))
        self.register_buffer("running_std", torch.ones(layer.output_shape))
        self.running_mean: Tensor
        self.running_std: Tensor

    @property
    def weight(self) -> Tensor:
        """The forward weight that a feedback weight of this stage is the counterpart of."""
        return self.layer.weight

    def run(self, inputs: Tensor) -> StageOutput:
        """Compute the stage and, in training, move its running statistics; there are no switches.

        Raises:
            UserError: in training, if there is a single sample, which has no standard deviation.
        """
        values = self.layer(inputs)
        if not self.training:
            return StageOutput((values - self.running_mean) / (self.running_std + STD_FLOOR), None)
        if len(values) < 2:
            raise UserError("a batch of 1 image cannot be standardised: use a batch size of at least 2")
        with torch.no_grad():
            self.running_mean.lerp_(values.mean(0), MOMENTUM)
            self.running_std.lerp_(values.std(0), MOMENTUM)
        return StageOutput(standardize(values), None)
