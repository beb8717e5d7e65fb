"""The parser's errors, each in one sentence that names the value, the reason and what works."""

import inspect
import re
import traceback
from collections.abc import Iterator, Sequence
from itertools import pairwise
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
from bioprop.catalogue import KINDS, entries, unknown_argument, unknown_class, unknown_option
from bioprop.datamodules import ImageDataModule
from bioprop.networks import Network
from bioprop.removed import MOVED

#: Base class of what an option names by class.
BASES: dict[str, type] = {
    "model": Algorithm,
    "network": Network,
    "data": ImageDataModule,
    "optimizer": Optimizer,
    "scheduler": LRScheduler,
    "logger": Logger,
    "callbacks": Callback,
    "profiler": Profiler,
    "plugins": CheckpointIO,
}
#: Options that name what is missing, as examples.
EXAMPLES = {"model": "--model LDRL", "network": "--model.network LeNet", "data": "--data Digits"}
#: Types, for people.
NAMES = {
    "int": "a whole number",
    "float": "a number",
    "tuple": "a list [a, b, ...]",
    "list": "a list [a, b, ...]",
    "bool": "true or false",
    "str": "a text",
}


def explain(message: str, words: Sequence[str] = ()) -> str:
    """Turn jsonargparse's nested report of an error into a sentence.

    Args:
        message: the report.
        words: what was written behind the command.
    """
    if match := re.search(r"Group '(\w+)' does not accept option '([\w.]+)'", message):
        return unknown_option(f"{match[1]}.{match[2]}")
    if match := re.search(r"(?:Subcommand '\w+' does not accept option '|unrecognized arguments: --)([\w.]+)", message):
        return unknown_option(match[1])
    if match := re.search(r"Option '([\w.]+)' is not accepted", message):
        return unknown_argument(match[1], _own_arguments())
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        return (
            f"{match[1]} belongs to no option: each has one value, a list is written [a,b], and its name begins with --"
        )
    if match := re.search(r"arguments are required: (.+)", message):
        return _missing([re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in match[1].split(", ")], message)
    if match := re.search(r"argument ([^\s:]+): expected (?:one|at least one) argument", message):
        return f"{_without_value(match[1].split('/'), words)} needs a value behind it"
    if message.strip().startswith("Unexpected config:"):
        return "this file gives no options by name, such as trainer: {max_epochs: 3}"
    if "Problems parsing config" in message:
        lines = re.findall(r"line (\d+)", message)
        return f"this file of options is not valid YAML{f', at line {lines[-1]}' if lines else ''}"
    if match := re.search(r"(?:File|Path) (does not exist|is not .*): '([^'\n]+)'", message):
        return f"{match[2]}: {'there is no such file' if match[1].startswith('does') else f'it {match[1]}'}"
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    if keys and (match := re.search(r"(?:load config|loop detected:) ['\"]?([^'\"\s]*)", message)):
        return f"{keys[0]} is {match[1]}, but it takes a file of its settings by name, or each of them: {keys[0]}.NAME"
    if keys and "'linked_targets'" in message:  # jsonargparse hands a function the links that only a class can take
        return f"{keys[-1]} is a function that makes one, but it must be a class"
    given = re.search(r"NestedArg\(.*val='(.*)'\)|(?:Got|Given) value: (.*)|Expected a path but (.*) either", message)
    if keys and given:
        return _refused(keys[-1], next(each for each in given.groups() if each is not None), message)
    return " ".join(message.split())


def _own_arguments() -> Iterator[str]:
    """The arguments of algorithms, networks and data outside the package that have been imported."""
    waiting: list[type] = [Algorithm, Network, ImageDataModule]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        if not cls.__module__.startswith("bioprop."):
            yield from inspect.signature(cls).parameters


def _refused(key: str, given: str, message: str) -> str:
    """Return the sentence about a value."""
    nested = re.search(r"NestedArg\(key='([\w.]+)'", message)
    if nested and "is abstract" in message:
        example = EXAMPLES.get(key, f"--{key} CLASS")
        return f"--{key}.{nested[1]} belongs to a class that is not named: name it, too, as in {example}"
    name = (nested[1] if nested else key).rpartition(".")[2]
    if name == "precision":  # Lightning lists many, also by other names
        return f"precision is {given}, but it must be one of {', '.join(Algorithm.precisions)}"
    if name in BASES:
        return _refused_class(name, given, message)
    types = re.findall(r"Expected an? <class '(\w+)'>", message)
    kinds = [NAMES.get(each, f"a {each}") for each in dict.fromkeys(types) if each != "NoneType"]
    if literal := re.search(r"Literal\[(.*?)\]", message):
        kinds.insert(0, literal[1] if kinds else f"one of {literal[1]}")
    return f"{name} is {given or 'empty'}, but it must be {' or '.join(kinds) or 'of another type (see --help)'}"


def _missing(names: list[str], message: str) -> str:
    what = " and ".join(names)
    if set(names) <= set(EXAMPLES):
        return f"{what} must be given: use a --config file, or for example {' '.join(EXAMPLES[name] for name in names)}"
    owner = re.search(r"class_path '[\w.]*?(\w+)'", message)
    if not owner and "Parser key" not in message:  # of a command, not of a class
        return f"{' and '.join(f'--{name}' for name in names)} must be given: --help says what"
    said = f"{owner[1]} needs {what}" if owner else f"{what} must be given"
    return f"{said}: give it as .{names[0]} behind the option that names the class"


def _without_value(names: Sequence[str], words: Sequence[str]) -> str:
    """The option, of one name or of an argument of its class, that nothing stands behind."""
    for word, following in pairwise([*words, "--"]):
        if following.startswith("--") and any(word == name or word.startswith(f"{name}.") for name in names):
            return word
    return names[-1]


def _refused_class(key: str, given: str, message: str) -> str:
    """Say why an option that names a class cannot have a value, and what works."""
    if match := re.search(r"Multiple subclasses with name (\w+)\..* ambiguity: ([\w., ]+?)\.?$", message, re.MULTILINE):
        # of torch's two, the command line makes only Lightning's, which knows the metric it follows
        paths = "pytorch_lightning.cli.ReduceLROnPlateau" if match[1] == "ReduceLROnPlateau" else match[2]
        return f"{match[1]} must be named in full here: {paths.replace(', ', ' or ')}"
    path = re.search(r"class_path['\"]?[=:] ?['\"]([\w.]+)", given)
    if not path and given.startswith("{"):
        return f"{key} is given arguments before its class: name that in the same file, or in one before it"
    name = path[1] if path else given
    if not re.fullmatch(r"[^\W\d]\w*(\.\w+)+", name):
        known = list(entries(key)) if key in KINDS else sorted({each.__name__ for each in _subclasses(BASES[key])})
        return unknown_class(key, name, known)
    if name in MOVED:
        return f"{key} is {name}, which is {MOVED[name]} now: write that"
    try:
        found: Any = locate(name)
    except ErrorDuringImport as problem:
        error, (*_, last) = problem.value, traceback.extract_tb(problem.tb)
        where = "" if isinstance(error, SyntaxError) else f", at {Path(last.filename).name} line {last.lineno}"
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return f"{key} is {name}, which cannot be imported: {said}{where}"
    if found is None:
        reason = re.search(r"No module named '[\w.]+'|\S+ ('[\w.]+'|object '\w+') has no attribute '\w+'", message)
        return f"{key} is {name}, which is not found from here{f': {reason[0]}' if reason else ''}"
    if not inspect.isclass(found):
        return f"{key} is {name}, which is a {type(found).__name__}, not a class"
    if key == "network" and issubclass(found, nn.Module):
        return (
            f"the algorithm needs a chain of stages, and {found.__name__} is none: make it a bioprop.networks.Network, "
            "or choose Backprop or FeedbackAlignment, which train any torch module"
        )
    wanted, lacking = BASES[key], sorted(getattr(found, "__abstractmethods__", ()))
    if issubclass(found, wanted) and lacking:
        return f"{key} is {name}, which cannot be used before it defines {', '.join(lacking)}"
    return f"{key} is {name}, which is no subclass of {wanted.__module__}.{wanted.__name__}"


def _subclasses(kind: type) -> Iterator[type]:
    """Yield the concrete subclasses of a class, by the names that can be given."""
    known: list[type] = kind.__subclasses__()
    for cls in known:
        if not inspect.isabstract(cls) and cls.__name__[0] != "_" and cls is not object:
            yield cls
        yield from _subclasses(cls)
