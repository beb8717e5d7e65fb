"""Angles between an algorithm's updates and the BP gradient, or the update of Gauss-Newton targets."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from bioprop.algorithms.base import Algorithm
from bioprop.algorithms.evaluation import Batch
from bioprop.distributed import gather_rows
from bioprop.errors import UserError
from bioprop.functional.angles import angle_degrees, flatten_all, norm_ratio
from bioprop.functional.gauss_newton import gauss_newton_gradients
from bioprop.functional.gradients import backprop_gradients, evaluating, preserve_state
from bioprop.functional.precision import float32_products
from bioprop.networks.network import Network, named_stages

#: Name, beside those of the stages, under which the mean angle over the hidden stages is logged.
HIDDEN = "hidden_stages"


class Alignment(NamedTuple):
    """Angle (degrees) and norm ratio of an update to a reference, as float64 scalars."""

    angle: Tensor
    norm_ratio: Tensor


def alignment_to_backprop(algorithm: Algorithm, images: Tensor, labels: Tensor) -> dict[str, Alignment]:
    """Compare `forward_gradients` with the BP gradient of the algorithm's own loss on one batch; changes nothing.

    The updates are those of the precision in force (under torch's autocast: bfloat16 products), the BP gradient is in
    the weights' own.

    Args:
        algorithm: algorithm whose updates are compared.
        images: ``[batch, channels, height, width]``.
        labels: ``[batch]``.

    Returns:
        The alignment of each stage that is not frozen, all of its parameters taken as one vector, and that of all
        stages as ``overall``.
    """
    updates = algorithm.forward_gradients(images, labels)
    with preserve_state(algorithm), float32_products(images.device):
        gradients, _ = backprop_gradients(algorithm.network, images, labels, algorithm.output_loss.mean)
    return _align_stages(algorithm, updates, gradients)


def alignment_to_gauss_newton(
    algorithm: Algorithm, images: Tensor, labels: Tensor, damping: float
) -> dict[str, Alignment]:
    """Compare `forward_gradients` with the update that damped Gauss-Newton targets make; changes nothing.

    The network is looked at as in evaluation: where its samples act on each other (batch norm in training), there is
    no Jacobian of a single sample.

    Args:
        algorithm: algorithm whose updates are compared.
        images: ``[batch, channels, height, width]``.
        labels: ``[batch]``.
        damping: the damping ``lambda`` of `bioprop.functional.gauss_newton.gauss_newton_direction`, above 0.

    Returns:
        As `alignment_to_backprop`.

    Raises:
        UserError: if the network is no chain of stages.
    """
    network = algorithm.network
    if not isinstance(network, Network):
        raise UserError(
            f"Gauss-Newton targets belong to stages, and {type(network).__name__} has none: make it a "
            "bioprop.networks.Network, or leave alignment.gauss_newton_damping out"
        )
    updates = algorithm.forward_gradients(images, labels)
    with preserve_state(algorithm), evaluating(network), float32_products(images.device):
        stages = [stage for _, stage in network.stages()]
        gradient = algorithm.output_loss.gradient
        reference = gauss_newton_gradients(network, stages, images, labels, damping, gradient)
    return _align_stages(algorithm, updates, reference)


def _align_stages(
    algorithm: Algorithm, updates: Mapping[str, Tensor], references: Mapping[str, Tensor]
) -> dict[str, Alignment]:
    trained = [
        stage for stage, _ in named_stages(algorithm.network) if any(n.startswith(f"{stage}.") for n in references)
    ]
    return {stage: _align(updates, references, f"{stage}.") for stage in trained} | {
        "overall": _align(updates, references, "")
    }


def _align(updates: Mapping[str, Tensor], references: Mapping[str, Tensor], prefix: str) -> Alignment:
    names = [name for name in references if name.startswith(prefix)]
    update, reference = (flatten_all(tensors[name] for name in names) for tensors in (updates, references))
    return Alignment(angle_degrees(update, reference), norm_ratio(update, reference))


def hidden_stages(network: nn.Module) -> list[str]:
    """Name the stages that get their error through feedback: all but the output stage, which has it from the loss.

    The last child of a plain module that holds several layers with weights counts too: its lower layers are hidden.
    """
    stages = named_stages(network)
    top = [layer for _, stage in stages[-1:] for layer in stage.modules() if [*layer.parameters(recurse=False)]]
    holds_hidden = len(top) > 1 and not isinstance(network, Network)
    return [name for name, _ in (stages if holds_hidden else stages[:-1])]


class AlignmentToBackprop(Callback):
    """Log the angle and the norm ratio between an algorithm's update and the BP gradient.

    Before training and after each epoch, on the first images of the validation set, as they are (not augmented):
    ``angle/<stage>`` in degrees, their mean over the hidden stages as ``angle/hidden_stages`` (the output stage is left
    out, since every algorithm trains it by the gradient itself), and ``angle/overall`` of all stages taken as one
    vector, the output included; ``norm_ratio/<stage>`` and ``norm_ratio/overall``. The same to the update by damped
    Gauss-Newton targets (Meulemans et al., 2020), where asked for, as ``angle_gn/...`` and ``norm_ratio_gn/...``, at
    the price of one more backward pass for each class.

    Args:
        max_images: most images that the held batch has; also no more than a validation batch has.
        every_n_epochs: epochs from one measurement to the next; 0 never measures.
        gauss_newton_damping: damping of the Gauss-Newton targets to compare with too, above 0; None leaves them out.

    Raises:
        UserError: if a number is out of its range.
    """

    def __init__(
        self, max_images: int = 256, every_n_epochs: int = 1, gauss_newton_damping: float | None = None
    ) -> None:
        if max_images < 1:
            raise UserError(f"alignment.max_images is {max_images}, but it must be at least 1")
        if every_n_epochs < 0:
            raise UserError(f"alignment.every_n_epochs is {every_n_epochs}, but it must be at least 0 (0: never)")
        if gauss_newton_damping is not None and not 0.0 < gauss_newton_damping < float("inf"):
            raise UserError(
                f"alignment.gauss_newton_damping is {gauss_newton_damping}, but it must be a number above 0, or null"
            )
        self.max_images = max_images
        self.every_n_epochs = every_n_epochs
        self.gauss_newton_damping = gauss_newton_damping
        self._held: Batch | None = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hold the first validation batch, which is on the device and normalised by now."""
        if batch_idx == 0:
            images, labels = (gather_rows(tensor) for tensor in batch)  # the same ones, however many processes
            self._held = images[: self.max_images], labels[: self.max_images]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before the first update: as epoch -1, straight to the logger, since no epoch has begun."""
        if self.every_n_epochs and trainer.global_step == 0 and trainer.logger:
            values = {name: float(value) for name, value in self._measure(trainer, pl_module).items()}
            if values:
                trainer.logger.log_metrics(values | {"epoch": -1}, step=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure once the epoch's last update is done."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            # the same in every process
            pl_module.log_dict(self._measure(trainer, pl_module), sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """The held batch: a resumed run may measure before it validates."""
        return {"held": self._held} if self.every_n_epochs and self._held else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the held batch of a checkpoint."""
        self._held = state_dict.get("held")

    def _measure(self, trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
        if self._held is None or not isinstance(module, Algorithm):
            return {}
        # validation runs in inference mode, whose tensors autograd cannot use: hence the copies
        images, labels = (tensor.to(module.device, copy=True) for tensor in self._held)
        images = images.to(next(module.network.parameters()).dtype)
        # as in a step, which Lightning computes in the run's precision
        with torch.inference_mode(False), trainer.precision_plugin.forward_context():
            hidden = hidden_stages(module.network)
            measured = _named("", alignment_to_backprop(module, images, labels), hidden)
            if self.gauss_newton_damping is not None:
                aligned = alignment_to_gauss_newton(module, images, labels, self.gauss_newton_damping)
                measured |= _named("_gn", aligned, hidden)
        return measured


def _named(reference: str, aligned: Mapping[str, Alignment], hidden: Sequence[str]) -> dict[str, Tensor]:
    angles = {name: value.angle.float() for name, value in aligned.items()}
    if below := [angles[name] for name in hidden if name in angles]:  # frozen stages have none
        angles[HIDDEN] = torch.stack(below).mean()
    return {f"angle{reference}/{name}": angle for name, angle in angles.items()} | {
        f"norm_ratio{reference}/{name}": value.norm_ratio.float() for name, value in aligned.items()
    }
