"""The rules of a comparison, held against settings before anything runs."""

from collections.abc import Mapping
from typing import Any

from bioprop.errors import UserError
from bioprop.experiments.configs import Settings
from bioprop.runs.folder import flat

#: Settings that `bioprop compare` makes itself for each run; a config that sets it too would lose silently.
DECIDED = (
    "ckpt_path",
    "weights_only",
    "trainer.logger",
    "trainer.profiler",
    "trainer.default_root_dir",
    "trainer.fast_dev_run",
    "trainer.barebones",
)
#: Settings by which the checkpoint that is tested must be chosen.
SELECTION = {
    "checkpoint.monitor": "val/accuracy",
    "checkpoint.mode": "max",
    "checkpoint.save_top_k": 1,
    "checkpoint.filename": "best",
    "checkpoint.dirpath": None,
}
#: Settings of the display while a run goes on, and its seed, which the comparison sets.
FREE = ("seed_everything", "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.log_every_n_steps")
ADVICE = {
    "trainer.max_epochs": "--epochs N gives all the same",
    "model.network": "an option behind -- holds for all, as in -- --model.network.hidden 64",
    "data": "an option behind -- holds for all, as in -- --data.batch_size 64",
}


def check_alone(name: str, settings: Settings) -> None:
    """Refuse a row that no comparison can hold.

    Raises:
        UserError: naming the row, the setting and its value.
    """
    found = flat(settings)
    for key in DECIDED:
        if found.get(key) not in (None, False, 0):
            raise UserError(f"{name} sets {key} to {found[key]}, which bioprop compare decides itself: leave it out")
    for key, wanted in SELECTION.items():
        if found.get(key, wanted) != wanted:
            raise UserError(
                f"{name} has {key} {found[key]}, but every row's checkpoint is chosen alike, by the best validation "
                f"accuracy ({key} {wanted}): leave it out"
            )
    if str(found["trainer.devices"]) != "1" or found["trainer.num_nodes"] != 1:
        raise UserError(
            f"{name} has trainer.devices {found['trainer.devices']} and trainer.num_nodes "
            f"{found['trainer.num_nodes']}, but a run of a comparison has one device, so that times can be compared: "
            "leave both out"
        )
    epochs = found["trainer.max_epochs"]
    if epochs is None or epochs < 1:
        raise UserError(
            f"{name} has trainer.max_epochs {epochs}, but a comparison needs a number of epochs: --epochs N"
        )
    if found["trainer.limit_val_batches"] == 0:
        raise UserError(f"{name} has trainer.limit_val_batches 0, but the checkpoint is chosen on validation images")


def check_fair(rows: Mapping[str, Settings], epochs_differ: bool = False) -> None:
    """Refuse rows that differ in more than the algorithm and its own hyperparameters.

    The optimizer, its schedule, and what the algorithm is made of may differ. The network, the data with split, batch
    size and augmentation, the trainer with epochs, limits and precision, the choice of the checkpoint and the
    measurement of angles must be the same.

    Args:
        rows: settings by name.
        epochs_differ: let rows have different numbers of epochs.

    Raises:
        UserError: naming the first setting that differs, with both values.
    """
    (first, reference), *others = rows.items()
    wanted = _shared(reference)
    for name, settings in others:
        found = _shared(settings)
        # the class of network or data comes first: its arguments differ too then
        for key in sorted(wanted.keys() | found.keys(), key=lambda key: (key.count("."), key)):
            if wanted.get(key) != found.get(key) and not (epochs_differ and key == "trainer.max_epochs"):
                raise UserError(
                    f"{first} and {name} cannot be compared: {key} is {_show(wanted, key)} for {first} and "
                    f"{_show(found, key)} for {name}{_advice(key)}"
                )


def check_unchanged(name: str, before: Settings, now: Settings) -> None:
    """Refuse other settings for a row that the results folder already holds.

    Raises:
        UserError: naming the first setting that differs, with both values.
    """
    old, new = flat(before), flat(now)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise UserError(
                f"the results folder holds {name} with {key} {_show(old, key)}, and now it is {_show(new, key)}: "
                "choose another --folder, or take the old value"
            )


def _shared(settings: Settings) -> dict[str, Any]:
    """Return the settings that must be the same in all rows, by dotted name."""
    parts = ("trainer", "data", "model.network", "checkpoint", "alignment")
    return {
        key: value
        for key, value in flat(settings).items()
        if key not in FREE and any(key == part or key.startswith(f"{part}.") for part in parts)
    }


def _show(found: Mapping[str, Any], key: str) -> str:
    return str(found[key]) if key in found else "not there"


def _advice(key: str) -> str:
    advice = next((text for part, text in ADVICE.items() if key == part or key.startswith(f"{part}.")), "")
    return f": {advice}" if advice else ""
