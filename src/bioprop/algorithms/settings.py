"""Settings of a run as plain data: recorded in checkpoints, compared on resuming, checked stage by stage."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pytorch_lightning import LightningDataModule, LightningModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bioprop.errors import UserError

Number = TypeVar("Number", int, float)

# Where files lie is not a setting of training: a data folder may move between two halves of a run.
LOCATIONS = ("data_dir", "download")


def per_stage(name: str, value: Number | Sequence[Number], stages: Sequence[str]) -> tuple[Number, ...]:
    """Spread a single value over all stages, or take exactly one value a stage.

    Args:
        name: name of the hyperparameter, for the message.
        value: one value for all, or a sequence.
        stages: names of the stages that need a value, from the input to the output.

    Raises:
        UserError: if a sequence is not exactly as long as there are stages.
    """
    if isinstance(value, int | float):
        return (value,) * len(stages)
    if len(value) != len(stages):
        raise UserError(
            f"{name} has {len(value)} values {list(value)}, but {len(stages)} stages need one each "
            f"({', '.join(stages)}): give that many, or a single value for all"
        )
    return tuple(value)


def check_range(name: str, values: float | Sequence[float], low: float, low_allowed: bool = True) -> None:
    """Refuse numbers below ``low`` (or at it, unless ``low_allowed``), and NaN.

    Raises:
        UserError: naming the hyperparameter and the first value out of range.
    """
    for value in [values] if isinstance(values, int | float) else values:
        if not (value > low or (low_allowed and value == low)):
            raise UserError(f"{name} is {value}, but it must be {'at least' if low_allowed else 'above'} {low:g}")


def plain(value: Any) -> Any:
    """Turn tuples into lists, recursively, so that a value equals what a checkpoint or YAML file gives back."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def describe_optimization(optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
    """Class and initial settings of a freshly made optimizer and its schedule, as plain data."""
    made: dict[str, tuple[object, dict[str, Any]]] = {"optimizer": (optimizer, optimizer.defaults)}
    if scheduler is not None:
        made["scheduler"] = (scheduler, scheduler.state_dict())
    return {
        kind: {"class": type(part).__name__}
        | {key: plain(value) for key, value in settings.items() if _is_plain(value)}
        for kind, (part, settings) in made.items()
    }


def comparable_settings(
    checkpoint: Mapping[str, Any], algorithm: LightningModule, data: LightningDataModule | None, resuming: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what must agree between a checkpoint and the objects it is loaded into, as (saved, asked for).

    For evaluation that is the algorithm's class and the network, for resuming every hyperparameter of both.

    Raises:
        UserError: if the checkpoint holds no settings of ours.
    """
    if "algorithm" not in checkpoint:
        raise UserError("the checkpoint was not written by bioprop: it does not say which algorithm it belongs to")
    saved = {"algorithm": checkpoint["algorithm"], "network": checkpoint["hyper_parameters"]["network"]}
    asked = {"algorithm": type(algorithm).__name__, "network": algorithm.hparams["network"]}
    if resuming:
        saved |= checkpoint["hyper_parameters"]
        asked |= algorithm.hparams
        for side, settings in ((saved, checkpoint.get("datamodule_hyper_parameters")), (asked, data and data.hparams)):
            side["data"] = {
                key: value
                for key, value in (settings or {}).items()
                if key not in LOCATIONS and not key.startswith("_")  # Lightning's own marks
            }
    return saved, asked


def refuse_changes(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Compare two sets of settings.

    Raises:
        UserError: naming every setting that differs, with both values.
    """
    before, now = _flatten(plain(saved)), _flatten(plain(asked))
    missing = "nothing"
    changes = [
        f"{key} was {before.get(key, missing)} and is now {now.get(key, missing)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, missing) != now.get(key, missing)
    ]
    if changes:
        raise UserError(
            f"the checkpoint was made with other settings ({'; '.join(changes)}): give the same, or start a new run "
            "without --ckpt_path"
        )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
