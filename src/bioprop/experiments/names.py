"""The names under which methods and data sets are shown, and the families of methods."""

from pathlib import Path
from pydoc import locate
from typing import Any

from bioprop.algorithms import DirectFeedbackAlignment, FeedbackAlignment
from bioprop.algorithms.difference_reconstruction import DifferenceReconstruction
from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.experiments.configs import Settings
from bioprop.runs.folder import class_name

#: By the names of files in ``lightning_configs/``; other rows keep the names that they have.
METHODS = {
    "analytic": "analytic feedback",
    "backprop": "BP",
    "brsf": "brSF",
    "ddtpcontrol": "DDTP-control",
    "ddtplinear": "DDTP-linear",
    "ddtprhl": "DDTP-RHL",
    "dfa": "DFA",
    "dkp": "direct KP",
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
    "ndfa": "normalised DFA",
    "parallelldrl": "parallel L-DRL",
    "pepita": "PEPITA",
    "tp": "TP",
    "usf": "uSF",
    "weightmirror": "weight mirror",
}
FAMILIES: dict[type, str] = {
    DifferenceReconstruction: "difference reconstruction",
    DirectFeedbackAlignment: "feedback alignment",
    FeedbackAlignment: "feedback alignment",
    TargetAlgorithm: "target propagation",
}


def method(row: str) -> str:
    """The name of a row's method, for people."""
    return METHODS.get(row, row)


def family(settings: Settings) -> str:
    """The family that the algorithm of a row belongs to."""
    algorithm = locate(settings["model"]["class_path"])
    known = algorithm.__mro__ if isinstance(algorithm, type) else ()
    return next((FAMILIES[each] for each in known if each in FAMILIES), "others")


def experiment(settings: Settings) -> str:
    """Network and data set of a row, for titles; images in a folder go by the folder's name."""
    data = settings["data"]
    arguments: dict[str, Any] = data.get("init_args", {})
    name = class_name(data)
    if name == "ImageFolder" and arguments.get("data_dir"):
        name = Path(str(arguments["data_dir"])).resolve().name
    return f"{class_name(settings['model']['init_args']['network'])} on {name}"
