"""Gradient clipping for every algorithm."""

from typing import Any, Literal

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from bioprop.errors import UserError


class GradientClipping(Callback):
    """Clip what the forward weights step along, as Lightning does for algorithms that it steps itself.

    Feedback weights learn by losses of their own, and are left alone. ``--trainer.gradient_clip_val`` makes it.

    Args:
        value: greatest norm of all gradients together, or greatest size of an entry; above 0.
        algorithm: ``norm`` or ``value``.

    Raises:
        UserError: if ``value`` is not above 0.
    """

    def __init__(self, value: float, algorithm: Literal["norm", "value"] = "norm") -> None:
        if value <= 0:
            raise UserError(f"gradient_clip_val is {value}, but it must be above 0: leave it out to clip nothing")
        self.value = value
        self.clip: Any = nn.utils.clip_grad_norm_ if algorithm == "norm" else nn.utils.clip_grad_value_

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clip, where the step is that of the forward weights, whose optimizer comes first."""
        if optimizer is trainer.optimizers[0]:
            self.clip([each for group in optimizer.param_groups for each in group["params"]], self.value)
