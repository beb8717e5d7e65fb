"""From the names of algorithms, or from files, to settings that are spelled out in full."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bioprop.catalogue import entries
from bioprop.cli import BiopropCLI, main
from bioprop.errors import UserError
from bioprop.front import CONFIGS

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


class Row(NamedTuple):
    """The source of the settings of a row.

    Attributes:
        config: a file of options.
        options: further ones, as of ``bioprop fit``, that win over the file's.
    """

    config: Path
    options: tuple[str, ...] = ()


def find_rows(algorithms: Sequence[str], network: str, data: str, folder: Path) -> dict[str, Row]:
    """Find ``lightning_configs/<algorithm>_<network>_<data>.yaml`` for each algorithm, or else its class.

    Algorithms and networks without such files are found by the name or the dotted path of their class. They have the
    defaults of the class, and all else of another row, or of another file for the same data.

    Args:
        algorithms: names of files, or of classes.
        network: name of files, or of a class.
        data: name of files.
        folder: an empty folder, for files with a part of the options of another.

    Raises:
        UserError: if nothing has such a name, naming the files that exist.
    """
    # backpropagation and LeNet come first, where any file will do
    stems = sorted(_stems(), key=lambda stem: (stem[0] != "backprop", stem[1] != "lenet", stem))
    here = [stem for stem in stems if stem[1:] == (network.lower(), data.lower())]
    network_class = "" if here else _class_path("network", network)
    if network_class:
        here = [stem for stem in stems if stem[2] == data.lower()]
    of_files = {name: stem for name in algorithms for stem in reversed(here) if stem[0] == name.lower()}
    rows: dict[str, Row] = {}
    for name in algorithms:
        algorithm_class = "" if name in of_files else _class_path("model", name)
        if not here or not (name in of_files or algorithm_class):
            file = f"{name.lower()}_{network.lower()}_{data.lower()}.yaml"
            raise UserError(f"there is no lightning_configs/{file}: {_others(network.lower(), data.lower())}")
        path = CONFIGS / f"{'_'.join(of_files.get(name) or next(iter(of_files.values()), here[0]))}.yaml"
        row = name.lower() if name in of_files else name.rpartition(".")[2]
        if row in rows:
            raise UserError(f"{row} is named twice: a comparison has one row for each name")
        rows[row] = _named_by_class(path, folder / f"{row}.yaml", algorithm_class, network_class)
    return rows


def _named_by_class(path: Path, written: Path, algorithm: str, network: str) -> Row:
    """Take the settings of a file, but for the algorithm or the network that is named by class."""
    if not algorithm and not network:
        return Row(path)
    settings = yaml.safe_load(path.read_text())
    options = [f"--model={algorithm}"] if algorithm else []
    before = settings["model"]["init_args"].pop("network")
    options.append(f"--model.network={network or json.dumps(before)}")
    if algorithm:
        del settings["model"]
    written.write_text(yaml.safe_dump(settings))
    return Row(written, tuple(options))


def _class_path(key: str, name: str) -> str:
    """The dotted path of a class that an option can name; of a bare name, whatever its case; empty if there is none."""
    known = {entry.name.lower(): entry.path for entry in entries(key).values()}
    return name if "." in name else known.get(name.lower(), "")


def _stems() -> list[tuple[str, ...]]:
    return [tuple(path.stem.split("_")) for path in sorted(CONFIGS.glob("*_*_*.yaml"))]


def name_configs(paths: Sequence[Path]) -> dict[str, Row]:
    """Name files by their stems, without an ending ``_<network>_<data>`` that all have in common.

    Raises:
        UserError: if a file is missing, or two would have the same name.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"--configs: {path}: there is no such file")
    parts = [path.stem.split("_") for path in paths]
    if len(paths) > 1 and all(len(each) == 3 and each[1:] == parts[0][1:] for each in parts):
        return dict(zip(_once(each[0] for each in parts), map(Row, paths), strict=True))
    return dict(zip(_once(path.stem for path in paths), map(Row, paths), strict=True))


def resolve(config: Path, options: Sequence[str]) -> Settings:
    """Spell out all settings of ``bioprop fit --config CONFIG OPTIONS``, defaults included, as plain data.

    Raises:
        UserError: for a mistake in one of them.
        SystemExit: with status 2, after a sentence, for arguments that do not parse.
    """
    parsed = main(["fit", "--config", os.fspath(config), *options], ParsingCLI)
    assert isinstance(parsed, ParsingCLI)
    return parsed.settings


def _once(names: Iterable[str]) -> list[str]:
    """The names, if each comes once."""
    listed = list(names)
    twice = [name for name, times in Counter(listed).items() if times > 1]
    if twice:
        raise UserError(f"{twice[0]} is named twice: a comparison has one row for each name")
    return listed


def _others(network: str, data: str) -> str:
    """Say what there is instead: other algorithms, or other pairs of network and data."""
    stems = _stems()
    here = [stem[0] for stem in stems if stem[1:] == (network, data)]
    if here:
        return f"for {network} on {data} there are {', '.join(here)}; name a class of your own by dotted path"
    pairs = dict.fromkeys(f"{stem[1]} on {stem[2]}" for stem in stems)
    return f"there are files for {', '.join(pairs)}; name your own with --configs, or a network's class by dotted path"
