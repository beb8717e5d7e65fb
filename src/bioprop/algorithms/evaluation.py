"""Loss and accuracy on every split, and predictions."""

from typing import Any, cast

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from bioprop.functional.output_losses import CROSS_ENTROPY, OutputLoss
from bioprop.functional.precision import products_in_autocast_type

Batch = tuple[Tensor, Tensor]
SPLITS = ("train", "val", "test")
PER_EPOCH: dict[str, Any] = {"on_step": False, "on_epoch": True}


class Evaluated(LightningModule):
    """A module that classifies, and logs how well; over several processes every image counts once.

    Args:
        network: from images to logits.
    """

    #: What the updates descend, what is logged as the loss, and whose BP gradient the updates are compared with.
    output_loss: OutputLoss = CROSS_ENTROPY

    network: nn.Module

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)  # of the class beside this one, which keeps it
        self.losses = nn.ModuleDict({f"{split}_set": MeanMetric(nan_strategy="disable") for split in SPLITS})
        self.accuracies = nn.ModuleDict()  # filled by the first batch, which shows the number of classes
        self._logged_in: dict[str, int] = {}  # the last epoch in which a metric was logged

    @products_in_autocast_type
    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``[batch, classes]``."""
        logits: Tensor = self.network(images)
        return logits

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy; trains nothing."""
        self._evaluate("val", batch)

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Note the epoch in which a metric is logged: not every epoch need have a validation."""
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and not self.trainer.sanity_checking:
            self._logged_in[name] = self.trainer.current_epoch
        super().log(name, *args, **kwargs)

    def on_train_start(self) -> None:
        """Forget an earlier fit."""
        super().on_train_start()
        if self.trainer.ckpt_path is None:
            self._logged_in = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the metrics of the epoch so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["logged_in"] = self._logged_in

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on within an epoch."""
        super().on_load_checkpoint(checkpoint)
        self._logged_in = checkpoint.get("logged_in", {})

    def logged_this_epoch(self, metric: str) -> bool:
        """Return whether a metric's value is of the training epoch that ends, and not left from an earlier one."""
        name = metric.removesuffix("_step").removesuffix("_epoch")  # Lightning's for a metric that is logged as both
        in_epoch = (self._logged_in.get(each) == self.trainer.current_epoch for each in (metric, name))
        return metric in self.trainer.callback_metrics and any(in_epoch)

    def _may_be_logged(self, metric: str) -> bool:
        """Return whether a metric was logged before, or may be by a validation that is still to come."""
        to_come = self.trainer.enable_validation and not self.logged_this_epoch("val/loss")
        return to_come or metric in self.trainer.callback_metrics

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy; trains nothing."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return class probabilities ``[batch, classes]``."""
        images, _ = self._as_network(batch)
        return torch.softmax(self(images), dim=1)

    def _evaluate(self, split: str, batch: Batch) -> None:
        images, labels = self._as_network(batch)
        logits = self(images)
        self._log_batch(split, logits, labels, self.output_loss.mean(logits, labels))

    def _log_batch(self, split: str, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        if not self.accuracies:
            self.make_metrics(logits.shape[1])
        metrics = cast(MetricCollection, self.accuracies[f"{split}_set"])
        metrics.update(logits, labels)
        mean_loss = cast(MeanMetric, self.losses[f"{split}_set"])
        mean_loss.update(loss.expand(len(labels)))  # torchmetrics 1.9 drops weights where NaN is let through
        # metrics, not numbers: over several processes, they count every image once
        self.log(f"{split}/loss", mean_loss, prog_bar=split == "train", **PER_EPOCH)
        for name, metric in metrics.items():
            self.log(name, metric, prog_bar=name == "val/accuracy", **PER_EPOCH)

    def make_metrics(self, classes: int) -> None:
        """Make the metrics of every split for a number of classes."""
        for name in SPLITS:
            self.accuracies[f"{name}_set"] = _accuracies(name, classes).to(self.device)

    def metrics_classes(self) -> int | None:
        """The number of classes that the metrics were made for; None as long as there are none."""
        return next((m.num_classes for m in self.accuracies.modules() if isinstance(m, MulticlassAccuracy)), None)

    def _as_network(self, batch: Batch) -> Batch:
        """Give the images the weights' floating-point type: data modules hand out float32."""
        return batch[0].to(next(self.network.parameters()).dtype), batch[1]


def _accuracies(split: str, classes: int) -> MetricCollection:
    top = {"accuracy": 1, "accuracy_top5": 5} if classes > 5 else {"accuracy": 1}
    metrics = {name: MulticlassAccuracy(classes, k, average="micro", validate_args=False) for name, k in top.items()}
    # grouping would merge the two for good whenever they agree on the first batch
    return MetricCollection(metrics, prefix=f"{split}/", compute_groups=False)  # type: ignore[arg-type]
