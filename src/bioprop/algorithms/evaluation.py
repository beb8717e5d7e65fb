"""The base class of algorithms: loss and accuracy on every split, predictions, and what checkpoints say of a run."""

from pathlib import Path
from typing import Any, Self, cast

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import Metric

from bioprop.algorithms.checkpoints import (
    comparable_settings,
    describe_data_and_trainer,
    refuse_changes,
    refuse_incomplete,
    refuse_other_tensors,
)
from bioprop.algorithms.resuming import capture_progress, end_epoch_once, restore_progress
from bioprop.errors import UserError
from bioprop.files import read_checkpoint
from bioprop.functional.output_losses import CROSS_ENTROPY, OutputLoss
from bioprop.functional.precision import products_in_autocast_type
from bioprop.hyperparameters import arguments_of, collect_hyperparameters, plain
from bioprop.networks.network import build_network, describe_network
from bioprop.removed import refuse_removed

Batch = tuple[Tensor, Tensor]
SPLITS = ("train", "val", "test")
#: Classes among which the right one is looked for, by name of the accuracy.
TOP = {"accuracy": 1, "accuracy_top5": 5}
#: What is logged.
FIGURES = (*(f"{split}/{name}" for split in SPLITS for name in ("loss", *TOP)), "train/feedback_loss")


class MeanOverImages(Metric):
    """The mean of a figure over the images of an epoch, those of all processes; summed on the device."""

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, images: int) -> None:
        """Add the images of a batch.

        Args:
            total: sum of the figure over them, a scalar.
            images: their number.
        """
        self.total = self.total + total  # a sum of float64 stays one
        self.images = self.images + images

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.images


class Evaluated(LightningModule):
    """A module that classifies, logs how well, and says in its checkpoints how it was made and trained.

    Over several processes every image counts once. The hyperparameters are collected from the constructors of whatever
    class is made: no class lists its own.

    Args:
        network: the forward network, from images to logits.

    Raises:
        UserError: for an argument that is gone, saying what took its place.
    """

    #: The loss that the updates descend, that is logged, and whose BP gradient the updates are compared with.
    output_loss: OutputLoss = CROSS_ENTROPY
    #: Constructor arguments that are no hyperparameters of their own: the network and the optimizers are described and
    #: compared by themselves, and speed changes no results.
    not_collected: frozenset[str] = frozenset(("network", "optimizer", "scheduler", "feedback_optimizer", "speed"))

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep the arguments as they come, before a constructor changes them."""
        refuse_removed(kwargs)
        made = super().__new__(cls)
        made.__dict__["_made_with"] = args, kwargs
        return made

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        args, kwargs = self.__dict__.pop("_made_with")
        self._hyperparameters = collect_hyperparameters(self, args, kwargs, self.not_collected)
        self.hparams.update({"network": self.network_description(), **self.hyperparameters()})
        self._optimization: dict[str, Any] = {}
        self._resumed_optimization: dict[str, Any] | None = None
        self._resumed_progress: dict[str, Any] | None = None
        self.means = nn.ModuleDict({name: MeanOverImages() for name in FIGURES})
        self._logged_in: dict[str, int] = {}  # the last epoch in which a metric was logged

    @products_in_autocast_type
    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``[batch, classes]``."""
        logits: Tensor = self.network(images)
        return logits

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy; trains nothing."""
        self._evaluate("val", batch, batch_idx)

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Note the epoch in which a metric is logged: not every epoch need have a validation."""
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and not self.trainer.sanity_checking:
            self._logged_in[name] = self.trainer.current_epoch
        super().log(name, *args, **kwargs)

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
        self._evaluate("test", batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return class probabilities ``[batch, classes]``."""
        images, _ = self._as_network(batch)
        return torch.softmax(self(images), dim=1)

    def running_loss(self) -> Tensor | None:
        """Return the mean loss of this process's images so far in the epoch of training; None before the first."""
        mean = cast(MeanOverImages, self.means["train/loss"])
        return mean.total / mean.images if mean.update_called else None

    def _evaluate(self, split: str, batch: Batch, batch_idx: int) -> None:
        images, labels = self._as_network(batch)
        logits = self(images)
        self._count_batch(split, batch_idx, logits, labels, self.output_loss.mean(logits, labels))

    def _count_batch(self, split: str, batch_idx: int, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        images, classes = logits.shape
        # summed image by image: a product would be rounded in another way
        self._count(f"{split}/loss", batch_idx, loss.float().repeat(images).sum(), images, prog_bar=split == "train")
        for name, top in TOP.items():
            if top == 1 or top < classes:
                found = logits.topk(top).indices == labels[:, None] if top > 1 else logits.argmax(1) == labels
                shown = split == "val" and top == 1
                self._count(f"{split}/{name}", batch_idx, found.sum(), images, prog_bar=shown)

    def _count(self, name: str, batch_idx: int, total: Tensor, images: int, prog_bar: bool = False) -> None:
        """Add a batch to a mean, which is logged at the end of the epoch."""
        mean = cast(MeanOverImages, self.means[name])
        if batch_idx == 0:
            mean.reset()  # of what an epoch that was broken off has left
        is_new = not mean.update_called
        mean.update(total.detach(), images)
        if is_new:  # Lightning keeps the metric and computes it when the epoch is over
            self.log(name, mean, prog_bar=prog_bar, on_step=False, on_epoch=True)

    def _as_network(self, batch: Batch) -> Batch:
        """Give the images the weights' floating-point type: data modules hand out float32."""
        return batch[0].to(next(self.network.parameters()).dtype), batch[1]

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def network_description(self) -> dict[str, Any]:
        """Return plain data that says which network is trained."""
        description: dict[str, Any] = plain(describe_network(self.network))
        return description

    def hyperparameters(self) -> dict[str, Any]:
        """Return the arguments of all constructors of the algorithm by name, as plain data."""
        given, objects, inherited = self._hyperparameters
        return inherited | objects | given

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out: the class, the settings of the optimizer, the metrics of the epoch so far."""
        checkpoint["algorithm"] = type(self).__name__
        # whatever a subclass has given to Lightning's `save_hyperparameters`
        checkpoint["hyper_parameters"] = {"network": self.network_description(), **self._hyperparameters.given}
        checkpoint["objects"], checkpoint["inherited"] = self._hyperparameters.objects, self._hyperparameters.inherited
        checkpoint["optimization"] = self._optimization
        checkpoint["progress"] = capture_progress(self)
        checkpoint["trained_on"] = describe_data_and_trainer(self.trainer)
        checkpoint["logged_in"] = self._logged_in

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume under other settings than the checkpoint's, where one of the two would silently lose.

        Raises:
            UserError: naming each setting that differs.
        """
        if self._trainer is None:  # `load_from_checkpoint` builds from the checkpoint's own settings
            return
        data, purpose = getattr(self.trainer, "datamodule", None), self.trainer.state.fn
        own = {"algorithm": type(self).__name__, "network": self.network_description(), **self.hyperparameters()}
        refuse_changes(*comparable_settings(checkpoint, own, data, purpose))
        refuse_other_tensors(checkpoint["state_dict"], self.state_dict())
        if purpose == TrainerFn.FITTING:  # the optimizers are made, and compared, after this hook
            refuse_incomplete(checkpoint)
            now = describe_data_and_trainer(self.trainer)
            refuse_changes(checkpoint.get("trained_on", now), now)  # those of older versions have none
            self._resumed_optimization = checkpoint["optimization"]
            self._resumed_progress = checkpoint.get("progress")
            self._logged_in = checkpoint.get("logged_in", {})
            if self.trainer.max_steps != -1:
                end_epoch_once(checkpoint["loops"])

    def on_train_start(self) -> None:
        """Bring back the metrics of the epoch so far, and the random states; forget those of an earlier fit."""
        if self.trainer.ckpt_path is None:
            self._logged_in = {}
        if self._resumed_progress is not None:
            progress, self._resumed_progress = self._resumed_progress, None
            restore_progress(self, progress)

    def refuse_other_optimization(self) -> None:
        """Compare the optimizers just made with those of the checkpoint to resume from, if there is one.

        Raises:
            UserError: naming each setting that differs.
        """
        if self._resumed_optimization is not None:
            refuse_changes(self._resumed_optimization, self._optimization)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        network: nn.Module | None = None,
        map_location: torch.device | str = "cpu",
        strict: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Rebuild the algorithm, and its network unless one is given, with the weights of a checkpoint.

        Args:
            checkpoint_path: the file.
            network: the forward network, where the checkpoint alone cannot build it.
            map_location: device to put the algorithm on.
            strict: refuse tensors that are missing or left over.
            kwargs: constructor arguments in place of the checkpoint's.

        Raises:
            UserError: if the file is no checkpoint, belongs to another algorithm, has a setting that is gone, or lacks
                an argument that is no plain data.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        written_by = checkpoint.get("algorithm", "another program")
        if written_by != cls.__name__:
            raise UserError(f"{checkpoint_path} was written by {written_by}: {cls.__name__} cannot load it")
        refuse_removed(checkpoint["hyper_parameters"])
        if lacking := sorted(checkpoint.get("objects", {}).keys() - kwargs.keys()):
            raise UserError(
                f"{checkpoint_path} does not hold {', '.join(lacking)} of {cls.__name__}, since a checkpoint holds "
                "plain data alone: give it to load_from_checkpoint as well"
            )
        network = network or build_network(checkpoint["hyper_parameters"]["network"])
        known = arguments_of(cls)  # older versions also held what base classes are no longer called with
        settings = {name: value for name, value in checkpoint["hyper_parameters"].items() if name in known}
        loaded = cls(**(settings | kwargs | {"network": network}))
        loaded.on_load_checkpoint(checkpoint)
        loaded.load_state_dict(checkpoint["state_dict"], strict=strict)
        return loaded.to(map_location)
