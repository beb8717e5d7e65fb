"""Direct feedback alignment: the output error reaches every stage at once."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from bioprop.algorithms.base import Algorithm, Gradients
from bioprop.algorithms.remedies import Remedies
from bioprop.errors import UserError
from bioprop.functional.gradients import stage_gradients
from bioprop.networks.network import Network


class DirectFeedbackAlignment(Algorithm):
    """Fixed random matrices from the output error straight to every stage (Nokland, NeurIPS 2016).

    The error of stage n is ``e B^n`` with ``e = dL/ds^N`` (``softmax(s^N) - onehot(y)``), in the shape of the stage's
    output; the stage turns it into gradients of its own weights. No error flows between stages. On a conv stage ``B^n``
    is dense, one entry for each class and each unit of the (pooled) map, as Nokland has it for all kinds of layers.

    Args:
        network: the forward network: a chain of stages.
        constrain_norm: hold the norm of every forward weight at its initial value (Moskovitz et al., 2018).
        batch_manhattan: update by the sign of the gradient (Liao et al., 2016).
        optimizer: makes the optimizer of the forward weights.
        settings: the other arguments of `Algorithm`.

    Raises:
        UserError: if the network is not a chain of stages.
    """

    recordable = True

    def __init__(
        self,
        network: Network,
        constrain_norm: bool = False,
        batch_manhattan: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4),
        **settings: Any,
    ) -> None:
        super().__init__(network, optimizer, **settings)
        if not isinstance(network, Network):
            raise UserError(
                f"direct feedback alignment sends errors to stages, and {type(network).__name__} has none: make it a "
                "bioprop.networks.Network"
            )
        self.network: Network
        self.remedies = Remedies(network, constrain_norm, batch_manhattan)
        *hidden, (_, output) = network.stages()
        self.backward_weights = nn.ParameterDict()
        for name, stage in hidden:
            units = torch.Size(stage.output_shape).numel()
            # entries of size 1/sqrt(units): the error of every stage is as long as the output's, whatever its size
            matrix = torch.randn(output.output_shape[0], units) * units**-0.5
            self.backward_weights[name] = nn.Parameter(matrix, requires_grad=False)

    def _gradients(self, images: Tensor, labels: Tensor) -> Gradients:
        outputs, inputs = [], images
        with torch.enable_grad():
            for _, stage in self.network.stages():
                outputs.append(stage(inputs.detach()))  # no graph leads from one stage to another
                inputs = outputs[-1]
        logits = inputs.detach()
        error = self.output_loss.gradient(logits, labels) / len(images)  # of the mean loss
        self.observe([output.detach() for output in outputs[:-1]], error)
        projected = self.projected(error, labels)
        errors = [
            (projected @ self.backward_weights[name]).view_as(output)
            for (name, _), output in zip(self.network.stages()[:-1], outputs[:-1], strict=True)
        ]
        gradients = stage_gradients(self.network, outputs, [*errors, error])
        return Gradients(gradients, logits)

    def observe(self, outputs: Sequence[Tensor], error: Tensor) -> None:
        """Take note of a pass, where matrices learn from it; nothing here.

        Args:
            outputs: activations of the hidden stages, from the input to the output.
            error: ``e / batch``, ``[batch, classes]``.
        """

    def projected(self, error: Tensor, labels: Tensor) -> Tensor:
        """Return the signal that the matrices send to the hidden stages: the output error.

        Args:
            error: ``e / batch``, ``[batch, classes]``.
            labels: ``[batch]``.

        Returns:
            ``[batch, classes]``.
        """
        return error

    def _direction(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.remedies.direction(gradients)

    def _step_forward_weights(self, gradients: dict[str, Tensor]) -> None:
        super()._step_forward_weights(gradients)
        self.remedies.hold_norms(self.network)
