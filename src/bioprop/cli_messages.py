"""The parser's errors, each in one sentence that names the value, the reason and what works."""

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import NoReturn

from pytorch_lightning.cli import LightningArgumentParser

from bioprop.algorithms import Algorithm
from bioprop.datamodules import ImageDataModule
from bioprop.errors import UserError
from bioprop.networks import Network
from bioprop.removed import REMOVED

#: Base class of what an option names by class.
KINDS: dict[str, type] = {"model": Algorithm, "network": Network, "data": ImageDataModule}
#: How to name what is missing.
EXAMPLES = {"model": "--model LDRL", "network": "--model.network LeNet", "data": "--data Digits"}

#: How many classes that have an argument are named where it was given to another.
OWNERS_SHOWN = 6

BY_BATCHES = "--checkpoint.every_n_batches N saves every N batches (and last.ckpt at the end of every epoch)"
#: Lightning's own arguments of a checkpoint callback, and what takes their place.
ELSEWHERE = {
    "checkpoint.every_n_train_steps": BY_BATCHES,
    "checkpoint.train_time_interval": f"time between checkpoints is counted in batches, {BY_BATCHES}",
    "checkpoint.every_n_epochs": BY_BATCHES,
    "checkpoint.save_last": "last.ckpt is always kept, since a run goes on from it",
}


class OneSentenceParser(LightningArgumentParser):
    """Exits with status 2 and one sentence instead of the usage of all options and a nested report."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and exit."""
        cause: BaseException | None = ex
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        self.exit(2, f"bioprop: error: {cause or explain(message, self._option_string_actions)}\n")


def explain(message: str, options: Iterable[str] = ()) -> str:
    """Turn jsonargparse's nested report of an error into a sentence.

    Args:
        message: the report.
        options: those of the command, ``--like.this``.
    """
    if match := re.search(r"Group '(\w+)' does not accept option '(\w+)'", message):
        return _unknown_option(f"{match[1]}.{match[2]}", options)
    if match := re.search(r"Option '([\w.]+)' is not accepted", message):
        return _unknown_argument(match[1])
    if match := re.search(r"unrecognized arguments: --([\w.]+)", message):
        return _unknown_argument(match[1]) if match[1] in ELSEWHERE else _unknown_option(match[1], options)
    if match := re.search(r"subcommand: invalid choice: '(.*)' \(choose from (.*)\)", message):
        return f"there is no command {match[1]}: choose one of {match[2]}, 'compare'"
    if match := re.search(r"arguments are required: (.+)", message):
        return _missing([name.strip().removeprefix("fit.") for name in match[1].split(",")], message)
    if match := re.search(r"No module named '([\w.]+)'", message):
        return f"no module {match[1]} is found from here: run in the folder that holds it, or install it"
    if "ReduceLROnPlateau" in message:
        return "ReduceLROnPlateau must be named in full here: pytorch_lightning.cli.ReduceLROnPlateau"
    if message.strip().startswith("Unexpected config"):
        return "a --config file is empty: give it options, or leave it out"
    if "Problems parsing config" in message:
        where = re.findall(r"line (\d+)", message)
        hint = " (tabs are not allowed in YAML)" if "\\t" in message else ""
        return f"a --config file is not valid YAML{f', at line {where[-1]}' if where else ''}{hint}"
    if match := re.search(r"File does not exist: '?([^'\n]+)'?", message):
        return f"{match[1]}: there is no such file"
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    given = _given_value(message)
    if keys and given is not None:
        key = keys[-1].rpartition(".")[2]
        if key == "precision":  # Lightning lists many, also by other names
            return f"precision is {given}, but it must be one of {', '.join(Algorithm.precisions)}"
        if key in KINDS or ("dot import path string" in message and not _is_number(given)):
            return f"{key} is {given}, which is not a class that can be used here: {_known_classes(key)}"
        return f"{key} is {given}, but it must be {_expected(message)}"
    return " ".join(message.split())


def _unknown_argument(name: str) -> str:
    if name in REMOVED:
        return REMOVED[name]
    if name in ELSEWHERE:
        return f"there is no argument {name} here: {ELSEWHERE[name]}"
    classes = [cls for kind in KINDS.values() for cls in _subclasses(kind)]
    if owners := sorted(cls.__name__ for cls in classes if name in _arguments(cls)):
        others = ", ..." if len(owners) > OWNERS_SHOWN else ""
        return f"there is no argument {name} in this place: it belongs to {', '.join(owners[:OWNERS_SHOWN])}{others}"
    known = {argument for cls in classes for argument in _arguments(cls)}
    close = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean {close[0]}" if close else "is it misspelt, or another class's"
    return f"there is no argument {name} in this place: {hint}? --model.help CLASS and --data.help CLASS list them"


def _unknown_option(name: str, options: Iterable[str]) -> str:
    """What is said of an option; the parser of a model's own arguments knows them without the leading ``model.``."""
    if name.removeprefix("model.") in REMOVED:
        return REMOVED[name.removeprefix("model.")]
    own = {option.removeprefix("--") for option in options}
    prefix = "" if "model" in own or "network" not in own else "model."
    known = {f"{prefix}{option}" for option in own if len(option) > 2}  # no single letters
    known |= {
        f"{key}.{each}" for key in ("model", "data") for cls in _subclasses(KINDS[key]) for each in _arguments(cls)
    }
    close = difflib.get_close_matches(f"{prefix}{name}", sorted(known), n=1, cutoff=0.75)
    hint = f"did you mean --{close[0]}" if close else "is it misspelt"
    return f"there is no option --{prefix}{name}: {hint}? bioprop fit --help lists them"


def _missing(names: list[str], message: str) -> str:
    owner = re.search(r"class_path '[\w.]*?(\w+)'", message)
    if owner and not set(names) <= set(EXAMPLES):
        return f"{owner[1]} needs {' and '.join(names)}: give it as .{names[0]} behind the option that names the class"
    if not set(names) <= set(EXAMPLES):
        return f"{' and '.join(names)} must be given, as .{names[0]} behind the option that names the class"
    examples = " ".join(EXAMPLES.get(name, f"--{name} VALUE") for name in names)
    return f"{' and '.join(names)} must be given: use a --config file, or for example {examples}"


def _known_classes(key: str) -> str:
    if key in KINDS:
        return f"choose one of {', '.join(sorted(cls.__name__ for cls in _subclasses(KINDS[key])))}"
    return f"--model.help CLASS lists those that {key} can be"


def _given_value(message: str) -> str | None:
    found = (
        re.search(r"dot import path string: (.*)", message)
        or re.search(r"NestedArg\(.*val='(.*)'\)", message)
        or re.search(r"Got value: (.*)", message)
        or re.search(r"Given value: (.*)", message)
    )
    return found and found[1]


def _expected(message: str) -> str:
    types = re.findall(r"Expected an? <class '(\w+)'>", message)
    wanted = [name for name in dict.fromkeys(types) if name != "NoneType"]
    names = {
        "int": "a whole number",
        "float": "a number",
        "tuple": "a list [a, b, ...] of such",
        "bool": "true or false",
    }
    kinds = [names.get(name, f"a {name}") for name in wanted]
    if literal := re.search(r"Literal\[(.*?)\]", message):
        kinds.insert(0, literal[1] if kinds else f"one of {literal[1]}")
    return " or ".join(kinds) or "of another type (see --help)"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _subclasses(kind: type) -> Iterator[type]:
    """Yield the classes that can be named where ``kind`` is wanted: its concrete subclasses."""
    subclasses: list[type] = kind.__subclasses__()
    for cls in subclasses:
        if not inspect.isabstract(cls):
            yield cls
        yield from _subclasses(cls)


def _arguments(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name != "self"]
