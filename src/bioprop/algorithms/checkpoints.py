"""Settings that a checkpoint holds besides weights, and the refusal of those that would silently lose."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bioprop.errors import UserError
from bioprop.hyperparameters import plain
from bioprop.removed import refuse_removed

# Where files and images lie, and how they are kept, is not a setting of training: a data folder may move within a run.
LOCATIONS = ("data_dir", "download", "cache", "trained_on", "on_device")
# What makes the same image another input, and what decides which training images are held out for validation.
PREPARATION = ("normalization", "image_size", "channels", "background")
HELD_OUT = ("seed", "val_fraction", "limit_train")
# Arguments of the trainer that make training another one.
OF_TRAINER = ("precision", "limit_train_batches", "limit_val_batches", "overfit_batches")
MISSING = "nothing"


def describe_optimization(optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
    """Class and initial settings of a freshly made optimizer, group by group, and of its schedule, as plain data."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    described = {"optimizer": {"class": type(optimizer).__name__, **_numbered(groups)}}
    if scheduler is not None:
        described["scheduler"] = {"class": type(scheduler).__name__, **scheduler.state_dict()}
    return {kind: plain(settings) for kind, settings in described.items()}


def _numbered(groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return groups[0] if len(groups) == 1 else {f"group{number}": group for number, group in enumerate(groups)}


def describe_data_and_trainer(trainer: Trainer) -> dict[str, Any]:
    """Return what trainer and images decide about a run, besides the hyperparameters, as plain data."""
    settings = {f"trainer.{name}": getattr(trainer, name) for name in OF_TRAINER}
    resident = getattr(getattr(trainer, "datamodule", None), "resident", {})
    for split in ("train", "val"):
        if split in resident:
            labels = resident[split].labels
            settings[f"data.{split}.images"] = len(labels)
            settings[f"data.{split}.checksum of the labels"] = zlib.crc32(labels.numpy().tobytes())
    return plain(settings)  # type: ignore[no-any-return]


def comparable_settings(
    checkpoint: Mapping[str, Any], own: Mapping[str, Any], data: LightningDataModule | None, purpose: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what must agree between a checkpoint and the objects it is loaded into, as (saved, asked for).

    For resuming that is every hyperparameter of data and algorithm, but for those that the algorithm did not have yet
    when the checkpoint was written; for evaluation the algorithm's class, the network and how images are prepared; for
    validation also which images were held out.

    Args:
        checkpoint: content of the checkpoint.
        own: name of the algorithm's class, description of its network, hyperparameters by name.
        data: data module of the command.
        purpose: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        UserError: if the checkpoint holds no settings of ours.
    """
    if not {"algorithm", "hyper_parameters"} <= checkpoint.keys():
        raise UserError("the checkpoint was not written by bioprop: it does not say which algorithm it belongs to")
    saved = {"algorithm": checkpoint["algorithm"], "network": checkpoint["hyper_parameters"]["network"]}
    if purpose == "fit":
        refuse_removed(checkpoint["hyper_parameters"])
        given, inherited = checkpoint["hyper_parameters"], checkpoint.get("inherited")
        if inherited is None:  # older versions did not tell the two apart
            given, inherited = {}, given
        # constructors of base classes may gain and lose arguments
        saved |= {name: value for name, value in inherited.items() if name in own}
        saved |= given | checkpoint.get("objects", {})
    asked = {name: own[name] for name in saved.keys() & own.keys()}
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
