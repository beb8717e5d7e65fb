"""From the names of algorithms, or from files, to settings that are spelled out in full."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bioprop.cli import BiopropCLI, main
from bioprop.errors import UserError
from bioprop.experiments.environment import CLONE

CONFIGS = CLONE / "lightning_configs"
Settings = dict[str, Any]


class ParsingCLI(BiopropCLI):
    """The command line as far as its arguments: makes and runs nothing."""

    settings: Settings

    def _set_seed(self) -> None:
        """Leave random state alone."""

    def before_instantiate_classes(self) -> None:
        """Leave the logger open."""

    def instantiate_classes(self) -> None:
        """Spell the settings out instead, as plain data."""
        written = self._parser("fit").dump(self.config["fit"], skip_unset=False)
        self.settings = yaml.safe_load(written)

    def after_instantiate_classes(self) -> None:
        """Look for no checkpoint."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def find_configs(algorithms: Sequence[str], network: str, data: str) -> dict[str, Path]:
    """Find ``lightning_configs/<algorithm>_<network>_<data>.yaml`` for each algorithm.

    Raises:
        UserError: if one is missing, naming those that exist.
    """
    if not CONFIGS.is_dir():
        raise UserError(
            f"there is no folder {CONFIGS}, because bioprop is not installed from a clone: name files with --configs"
        )
    network, data = network.lower(), data.lower()
    found: dict[str, Path] = {}
    for name in _once(name.lower() for name in algorithms):
        path = CONFIGS / f"{name}_{network}_{data}.yaml"
        if not path.is_file():
            raise UserError(f"there is no {path.relative_to(CLONE)}: {_others(network, data)}")
        found[name] = path
    return found


def name_configs(paths: Sequence[Path]) -> dict[str, Path]:
    """Name files by their stems, without an ending ``_<network>_<data>`` that all have in common.

    Raises:
        UserError: if a file is missing, or two would have the same name.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"--configs: {path}: there is no such file")
    parts = [path.stem.split("_") for path in paths]
    if len(paths) > 1 and all(len(each) == 3 and each[1:] == parts[0][1:] for each in parts):
        return dict(zip(_once(each[0] for each in parts), paths, strict=True))
    return dict(zip(_once(path.stem for path in paths), paths, strict=True))


def resolve(config: Path, options: Sequence[str]) -> Settings:
    """Spell out all settings of ``bioprop fit --config CONFIG OPTIONS``, defaults included, as plain data.

    Raises:
        UserError: for a mistake in one of them.
        SystemExit: with status 2, after a sentence, for arguments that do not parse.
    """
    parsed = main(["fit", "--config", os.fspath(config), *options], ParsingCLI)
    assert isinstance(parsed, ParsingCLI)
    return parsed.settings


def class_name(part: Mapping[str, Any]) -> str:
    """The class that a part of the settings names, without its module."""
    return str(part["class_path"]).rpartition(".")[2]


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Spell nested settings out by dotted names, without the words that only structure them."""
    if not isinstance(settings, Mapping):
        return {prefix: settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "class_path":
            found[prefix] = class_name(settings)
        elif key in ("init_args", "dict_kwargs"):
            found |= flat(value, prefix) if value else {}
        else:
            found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def _once(names: Iterable[str]) -> list[str]:
    """The names, if each comes once."""
    listed = list(names)
    twice = [name for name, times in Counter(listed).items() if times > 1]
    if twice:
        raise UserError(f"{twice[0]} is named twice: a comparison has one row for each name")
    return listed


def _others(network: str, data: str) -> str:
    """Say what there is instead: other algorithms, or other pairs of network and data."""
    stems = [path.stem.split("_") for path in sorted(CONFIGS.glob("*_*_*.yaml"))]
    here = [stem[0] for stem in stems if stem[1:] == [network, data]]
    if here:
        return f"for {network} on {data} there are {', '.join(here)}"
    pairs = dict.fromkeys(f"{stem[1]} on {stem[2]}" for stem in stems)
    return f"there are files for {', '.join(pairs)}; name your own with --configs"
