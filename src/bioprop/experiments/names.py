"""The names under which methods and data sets are shown, and the families of methods."""

from pathlib import Path
from pydoc import locate
from typing import Any

from bioprop.algorithms import Backprop
from bioprop.algorithms.difference_reconstruction import DifferenceReconstruction
from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.experiments.configs import Settings
from bioprop.runs.folder import class_name

#: By the names of files in ``lightning_configs/``; other rows keep the names that they have.
METHODS = {
    "backprop": "BP",
    "brsf": "brSF",
    "ddtpcontrol": "DDTP-control",
    "ddtplinear": "DDTP-linear",
    "ddtprhl": "DDTP-RHL",
    "dfa": "DFA",
    "directkolenpollack": "direct KP",
    "drtp": "DRTP",
    "dtp": "DTP",
    "dtpdrl": "DTP-DRL",
    "fa": "FA",
    "frsf": "frSF",
    "fwdtp": "FW-DTP",
    "gaitprop": "GAIT-prop",
    "kolenpollack": "Kolen-Pollack",
    "ldrl": "L-DRL",
    "ldrlpublished": "L-DRL, published",
    "parallelldrl": "parallel L-DRL",
    "pepita": "PEPITA",
    "tp": "TP",
    "usf": "uSF",
    "weightmirror": "weight mirror",
}


def method(row: str) -> str:
    """The name of a row's method, for people."""
    return METHODS.get(row, row)


def family(settings: Settings) -> str:
    """The family that the algorithm of a row belongs to; empty for BP."""
    algorithm = locate(settings["model"]["class_path"])
    if not isinstance(algorithm, type) or algorithm is Backprop:
        return "" if algorithm is Backprop else "others"
    if issubclass(algorithm, DifferenceReconstruction):
        return "difference reconstruction"
    return "target propagation" if issubclass(algorithm, TargetAlgorithm) else "feedback alignment"


def experiment(settings: Settings) -> str:
    """Network and data set of a row, for titles; images in a folder go by the folder's name."""
    data = settings["data"]
    arguments: dict[str, Any] = data.get("init_args", {})
    name = class_name(data)
    if name == "ImageFolder" and arguments.get("data_dir"):
        name = Path(str(arguments["data_dir"])).resolve().name
    return f"{class_name(settings['model']['init_args']['network'])} on {name}"
