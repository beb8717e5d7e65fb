"""Checkpoints: what they hold besides weights, and the refusal to load them where a setting would silently lose."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bioprop.algorithms.resuming import capture_progress, end_epoch_once, restore_progress
from bioprop.errors import UserError
from bioprop.files import read_checkpoint
from bioprop.hyperparameters import collect_hyperparameters, plain
from bioprop.networks.network import build_network, describe_network
from bioprop.removed import refuse_removed

# Where files lie is not a setting of training: a data folder may move between two halves of a run.
LOCATIONS = ("data_dir", "download")
# What makes the same image another input, and what decides which training images are held out for validation.
PREPARATION = ("normalization", "image_size", "channels", "background")
HELD_OUT = ("seed", "val_fraction", "limit_train")
# Arguments of the trainer that make training another one.
OF_TRAINER = ("precision", "limit_train_batches", "limit_val_batches", "overfit_batches")
MISSING = "nothing"


class Checkpointed(LightningModule):
    """A module whose checkpoints say which algorithm, network, hyperparameters and optimizer they belong to.

    The hyperparameters are collected from the constructors of whatever class is made: no class lists its own.

    Args:
        network: the forward network.
    """

    #: Constructor arguments that are no hyperparameters of their own: the network and the optimizers are described and
    #: compared by themselves, and speed changes no results.
    not_collected: frozenset[str] = frozenset(("network", "optimizer", "scheduler", "feedback_optimizer", "speed"))

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep the arguments as they come, before a constructor changes them."""
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out: the class, the settings of the optimizer, the metrics of the epoch so far."""
        checkpoint["algorithm"] = type(self).__name__
        # whatever a subclass has given to Lightning's `save_hyperparameters`
        checkpoint["hyper_parameters"] = {"network": self.network_description(), **self._hyperparameters.given}
        checkpoint["objects"], checkpoint["inherited"] = self._hyperparameters.objects, self._hyperparameters.inherited
        checkpoint["optimization"] = self._optimization
        checkpoint["metrics_classes"] = self.metrics_classes()
        checkpoint["progress"] = capture_progress(self)
        checkpoint["trained_on"] = self._trained_on()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume under other settings than the checkpoint's, where one of the two would silently lose.

        Raises:
            UserError: naming each setting that differs.
        """
        if self._trainer is None:  # `load_from_checkpoint` builds from the checkpoint's own settings
            return
        purpose = self.trainer.state.fn
        refuse_changes(*comparable_settings(checkpoint, self, getattr(self.trainer, "datamodule", None), purpose))
        refuse_other_tensors(checkpoint["state_dict"], self.state_dict())
        if purpose == TrainerFn.FITTING:  # the optimizers are made, and compared, after this hook
            refuse_incomplete(checkpoint)
            now = self._trained_on()
            refuse_changes(checkpoint.get("trained_on", now), now)  # those of older versions have none
            self._resumed_optimization = checkpoint["optimization"]
            self._resumed_progress = checkpoint.get("progress")
            if classes := checkpoint.get("metrics_classes"):
                self.make_metrics(classes)
            if self.trainer.max_steps != -1:
                end_epoch_once(checkpoint["loops"])

    def on_train_start(self) -> None:
        """Bring back the metrics of the epoch so far, and the random states."""
        if self._resumed_progress is not None:
            progress, self._resumed_progress = self._resumed_progress, None
            restore_progress(self, progress)

    def _trained_on(self) -> dict[str, Any]:
        """Return the settings that trainer and images decide about a run, besides the hyperparameters."""
        settings = {f"trainer.{name}": getattr(self.trainer, name) for name in OF_TRAINER}
        resident = getattr(getattr(self.trainer, "datamodule", None), "resident", {})
        for split in ("train", "val"):
            if split in resident:
                labels = resident[split].labels
                settings[f"data.{split}.images"] = len(labels)
                settings[f"data.{split}.checksum of the labels"] = zlib.crc32(labels.numpy().tobytes())
        return plain(settings)  # type: ignore[no-any-return]

    def make_metrics(self, classes: int) -> None:
        """Make the metrics that are logged, for a number of classes that the first batch shows, or a checkpoint."""

    def metrics_classes(self) -> int | None:
        """The number of classes that the metrics were made for; None as long as there are none."""
        return None

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, network: nn.Module | None = None, **kwargs: Any
    ) -> Self:
        """Rebuild the algorithm, and its network unless one is given, with the weights of a checkpoint.

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
        loaded: Self = super().load_from_checkpoint(checkpoint_path, weights_only=True, network=network, **kwargs)
        return loaded

    def network_description(self) -> dict[str, Any]:
        """Return plain data that says which network is trained."""
        description: dict[str, Any] = plain(describe_network(self.network))
        return description

    def hyperparameters(self) -> dict[str, Any]:
        """Return the arguments of all constructors of the algorithm by name, as plain data."""
        given, objects, inherited = self._hyperparameters
        return inherited | objects | given

    def refuse_other_optimization(self) -> None:
        """Compare the optimizers just made with those of the checkpoint to resume from, if there is one.

        Raises:
            UserError: naming each setting that differs.
        """
        if self._resumed_optimization is not None:
            refuse_changes(self._resumed_optimization, self._optimization)


def describe_optimization(optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
    """Class and initial settings of a freshly made optimizer, group by group, and of its schedule, as plain data."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    described = {"optimizer": {"class": type(optimizer).__name__, **_numbered(groups)}}
    if scheduler is not None:
        described["scheduler"] = {"class": type(scheduler).__name__, **scheduler.state_dict()}
    return {kind: plain(settings) for kind, settings in described.items()}


def _numbered(groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return groups[0] if len(groups) == 1 else {f"group{number}": group for number, group in enumerate(groups)}


def comparable_settings(
    checkpoint: Mapping[str, Any], algorithm: Checkpointed, data: LightningDataModule | None, purpose: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what must agree between a checkpoint and the objects it is loaded into, as (saved, asked for).

    For resuming that is every hyperparameter of data and algorithm, but for those that the algorithm did not have yet
    when the checkpoint was written; for evaluation the algorithm's class, the network and how images are prepared; for
    validation also which images were held out.

    Raises:
        UserError: if the checkpoint holds no settings of ours.
    """
    if not {"algorithm", "hyper_parameters"} <= checkpoint.keys():
        raise UserError("the checkpoint was not written by bioprop: it does not say which algorithm it belongs to")
    saved = {"algorithm": checkpoint["algorithm"], "network": checkpoint["hyper_parameters"]["network"]}
    asked = {"algorithm": type(algorithm).__name__, "network": algorithm.network_description()}
    if purpose == "fit":
        refuse_removed(checkpoint["hyper_parameters"])
        now = algorithm.hyperparameters()
        # constructors of base classes may gain and lose arguments
        saved |= {name: value for name, value in checkpoint.get("inherited", {}).items() if name in now}
        saved |= checkpoint["hyper_parameters"] | checkpoint.get("objects", {})
        asked |= {name: now[name] for name in saved.keys() & now.keys()}
    before, present = checkpoint.get("datamodule_hyper_parameters") or {}, dict(data.hparams) if data else {}
    for key in before.keys() | present.keys():
        always = purpose == "fit" and key not in LOCATIONS and not key.startswith("_")  # Lightning's own marks
        preparation = key in PREPARATION or (purpose == "validate" and key in HELD_OUT)
        if always or (preparation and key in before and key in present):
            saved[f"data.{key}"], asked[f"data.{key}"] = before.get(key, MISSING), present.get(key, MISSING)
    return saved, asked


def refuse_incomplete(checkpoint: Mapping[str, Any]) -> None:
    """Look for the parts of a checkpoint that training goes on from.

    Raises:
        UserError: naming those that are missing.
    """
    missing = sorted({"optimizer_states", "lr_schedulers", "loops", "optimization"} - checkpoint.keys())
    if missing:
        raise UserError(
            f"the checkpoint holds weights, but not what training goes on from ({', '.join(missing)}): it serves test "
            "and predict only"
        )


def refuse_changes(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Compare two sets of settings.

    Raises:
        UserError: naming every setting that differs, with both values.
    """
    before, now = _flatten(plain(saved)), _flatten(plain(asked))
    changes = [
        f"{key} was {before.get(key, MISSING)} and is now {now.get(key, MISSING)}"
        for key in sorted(before.keys() | now.keys())
        if not _agree(before.get(key, MISSING), now.get(key, MISSING))
    ]
    if changes:
        raise UserError(
            f"the checkpoint was made with other settings ({'; '.join(changes)}): give the same, or start a new run "
            "without --ckpt_path"
        )


def _agree(one: Any, other: Any) -> bool:
    """Compare two values: one number for all stages is the same as a list of that number."""
    for values, single in ((one, other), (other, one)):
        if isinstance(values, list) and isinstance(single, int | float):
            return all(value == single for value in values)
    return bool(one == other)


def refuse_other_tensors(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of a checkpoint's tensors with those they are to be loaded into.

    Raises:
        UserError: naming some that differ: the checkpoint comes from another version, or was edited.
    """
    before = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    now = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if differing:
        raise UserError(
            f"the checkpoint does not hold the tensors wanted here ({', '.join(differing[:4])} differ): it comes from "
            "another version of the code or of the network"
        )


def _flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Spell nested settings out as dotted names; lists of settings (schedules in a sequence) by their places."""
    if isinstance(settings, list) and any(isinstance(item, Mapping) for item in settings):
        settings = {str(place): item for place, item in enumerate(settings)}
    if not isinstance(settings, Mapping):
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
