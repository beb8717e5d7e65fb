"""The classes that an option can name, and the reason why another one cannot be used there."""

import difflib
import inspect
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import Profiler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bioprop.algorithms import Algorithm
from bioprop.datamodules import ImageDataModule
from bioprop.networks import Network
from bioprop.removed import MOVED

#: Base class of what an option of ours names by class.
KINDS: dict[str, type] = {"model": Algorithm, "network": Network, "data": ImageDataModule}
#: The same, with the options of torch and Lightning.
ALL_KINDS = KINDS | {
    "optimizer": Optimizer,
    "scheduler": LRScheduler,
    "logger": Logger,
    "callbacks": Callback,
    "profiler": Profiler,
    "plugins": CheckpointIO,
}


def subclasses(kind: type) -> Iterator[type]:
    """Yield the classes that can be named where ``kind`` is wanted: its concrete subclasses."""
    known: list[type] = kind.__subclasses__()
    for cls in known:
        if not inspect.isabstract(cls):
            yield cls
        yield from subclasses(cls)


def arguments(cls: type) -> list[str]:
    """The names of the arguments of a class."""
    return [name for name in parameters(cls) if name not in ("self", "args", "kwargs")]


def parameters(factory: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a function or class; where a class passes ``**`` on, those of its base that have a default."""
    in_order = [factory]
    if inspect.isclass(factory):
        in_order = [vars(cls)["__init__"] for cls in inspect.getmro(factory) if "__init__" in vars(cls)]
    found: dict[str, inspect.Parameter] = {}
    for function in in_order:
        try:
            own = inspect.signature(function, eval_str=True).parameters
        except NameError:  # of what is imported for type checkers alone
            own = inspect.signature(function).parameters
        named = {name: each for name, each in own.items() if each.kind != each.VAR_KEYWORD}
        found |= {
            name: each
            for name, each in named.items()
            if name not in found and (function is in_order[0] or each.default is not each.empty)
        }
        if len(named) == len(own):
            break
    return found


def why_not(key: str, given: str, message: str) -> str:
    """Say why an option that names a class cannot have this value, and what works.

    Args:
        key: name of the option, without what stands before its last dot.
        given: its value: a class, by its name or its dotted path, or something else.
        message: jsonargparse's report.
    """
    if match := re.search(r"Multiple subclasses with name (\w+)\..* ambiguity: ([\w., ]+?)\.?$", message, re.MULTILINE):
        # of torch's two, the command line makes only Lightning's, which knows the metric it follows
        paths = "pytorch_lightning.cli.ReduceLROnPlateau" if match[1] == "ReduceLROnPlateau" else match[2]
        return f"{match[1]} must be named in full here: {paths.replace(', ', ' or ')}"
    path = re.search(r"class_path['\"]?[=:] ?['\"]([\w.]+)", given)
    if not path and given.startswith("{"):
        return f"{key} is given arguments before its class: name that in the same file, or in one before it"
    name = path[1] if path else given
    if re.fullmatch(r"[^\W\d]\w*(\.\w+)+", name):
        return _why_not_path(key, name, message)
    known = sorted({cls.__name__ for cls in subclasses(ALL_KINDS[key]) if cls.__name__[0] != "_"} - {"object"})
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? They are" if close else "choose one of"
    own = "; name your own by dotted path, module.Class" if key in KINDS else ""
    return f"{key} is {name}, which is not a class that can be used here: {hint} {', '.join(known)}{own}"


def _why_not_path(key: str, path: str, message: str) -> str:
    if path in MOVED:
        return f"{key} is {path}, which is {MOVED[path]} now: write that"
    try:
        found: Any = locate(path)
    except ErrorDuringImport as problem:
        error = problem.value
        if isinstance(error, ModuleNotFoundError):
            return f"no module {error.name} is found from here, but {path} needs it: install it"
        lines = traceback.extract_tb(problem.tb)
        where = (
            "" if isinstance(error, SyntaxError) else f", at {Path(lines[-1].filename).name} line {lines[-1].lineno}"
        )
        return (
            f"{key} is {path}, which cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}{where}"
        )
    if found is None and (match := re.search(r"No module named '([\w.]+)'", message)):
        return f"no module {match[1]} is found from here: run in the folder that holds it, or install it"
    if found is None:
        reason = (
            match[0] if (match := re.search(r"\S+ ('[\w.]+'|object '\w+') has no attribute '\w+'", message)) else ""
        )
        return f"{key} is {path}, which does not exist{reason and f': {reason}'}"
    if not inspect.isclass(found):
        return f"{key} is {path}, which is a {type(found).__name__}, not a class"
    if key == "network" and issubclass(found, nn.Module):
        return (
            f"the algorithm needs a chain of stages, and {found.__name__} is none: make it a bioprop.networks.Network, "
            "or choose Backprop or FeedbackAlignment, which train any torch module"
        )
    wanted, lacking = ALL_KINDS[key], sorted(getattr(found, "__abstractmethods__", ()))
    if issubclass(found, wanted) and lacking:
        return f"{key} is {path}, which cannot be used before it defines {', '.join(lacking)}"
    return f"{key} is {path}, which is no subclass of {wanted.__module__}.{wanted.__name__}"
