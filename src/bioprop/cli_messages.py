"""The parser's errors, each in one sentence that names the value, the reason and what works."""

import difflib
import inspect
import re
from importlib import import_module
from typing import NoReturn

from pytorch_lightning.cli import LightningArgumentParser

from bioprop.algorithms import Algorithm
from bioprop.datamodules import ImageDataModule
from bioprop.errors import UserError
from bioprop.networks import Network

#: Base class of what an option names by class.
KINDS: dict[str, type] = {"model": Algorithm, "network": Network, "data": ImageDataModule}


class OneSentenceParser(LightningArgumentParser):
    """Exits with status 2 and one sentence instead of the usage of all options and a nested report."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and exit."""
        cause: BaseException | None = ex
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        self.exit(2, f"bioprop: error: {cause or explain(message)}\n")


def explain(message: str) -> str:
    """Turn jsonargparse's nested report of an error into a sentence."""
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    option = "--" + ".".join(dict.fromkeys(keys))
    if match := re.search(r"(?:class_path '([\w.]+)'[^']*?)?Option '([\w.]+)' is not accepted", message):
        return _unknown_option(match[1], match[2])
    if match := re.search(r"arguments are required: (.+)", message):
        return _missing([name.strip() for name in match[1].split(",")], message)
    kind = KINDS.get(keys[-1].rpartition(".")[2]) if keys else None
    if kind and (match := re.search(r"(?:dot import path string|Not a valid subclass of \w+)[:.] ?(.*)", message)):
        given = _given_value(message) or match[1]
        return f"{option} is {given}, which is not a known class: choose one of {', '.join(_names(kind))}"
    if match := re.search(r"File does not exist: '?([^'\n]+)'?", message):
        return f"{option} {match[1]}: there is no such file"
    given = _given_value(message)
    if keys and given is not None:
        return f"{option} is {given}, but it must be {_expected(message)}"
    return " ".join(message.split())


def _unknown_option(class_path: str | None, name: str) -> str:
    if class_path is None:
        return f"there is no option {name}: see --help for those there are"
    module, _, cls = class_path.rpartition(".")
    known = [key for key in inspect.signature(getattr(import_module(module), cls)).parameters if key != "self"]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
    return f"{cls} has no argument {name}: {hint}"


def _missing(names: list[str], message: str) -> str:
    owner = re.search(r"class_path '[\w.]*?(\w+)'", message)
    wanted = " and ".join(name.partition(".")[2] or name for name in names)
    if owner:
        return f"{owner[1]} needs {wanted}: give it on the command line (--model.{wanted} CLASS) or in a --config file"
    return f"{wanted} must be given: name a class (for example --data Digits) or give a --config file"


def _given_value(message: str) -> str | None:
    values = re.findall(r"Given value: (.*)", message)
    if not values:
        return None
    nested = re.search(r"NestedArg\(.*val='(.*)'\)", values[0])
    return nested[1] if nested else str(values[0])


def _expected(message: str) -> str:
    options = re.findall(r"Expected an? (?:<class ')?([^:\n]+?)(?:'>)?(?::|\n|$)", message)
    wanted = [option for option in dict.fromkeys(options) if "NoneType" not in option]
    return " or ".join(wanted) or "something else (see --help)"


def _names(kind: type) -> list[str]:
    found, names = [kind], []
    for cls in found:
        found.extend(cls.__subclasses__())
        if not inspect.isabstract(cls) and cls is not kind:
            names.append(cls.__name__)
    return sorted(names)
