"""The classes and options that the command line knows, read off the source: importing torch would take seconds."""

import ast
import difflib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from bioprop.removed import REMOVED

PACKAGE = Path(__file__).parent
#: The option that names a class, with the package and the base of the classes it can name.
KINDS = {
    "model": ("algorithms", "Algorithm"),
    "network": ("networks", "Network"),
    "data": ("datamodules", "ImageDataModule"),
}
#: Options of a run that belong to no class.
GENERAL = ("help", "help-all", "config", "print_config", "seed_everything", "ckpt_path", "weights_only", "verbose")
#: Options whose values are given as a group, with the file and class that have them as arguments.
GROUPS = {
    "checkpoint": ("runs/checkpointing.py", "RunCheckpoints"),
    "alignment": ("callbacks/alignment.py", "AlignmentToBackprop"),
    "model.speed": ("feedback/speed.py", "Speed"),
}
BY_BATCHES = "--checkpoint.every_n_batches N saves every N batches (and last.ckpt at the end of every epoch)"
#: Lightning's own arguments of a checkpoint callback, and what takes their place.
ELSEWHERE = {
    "checkpoint.every_n_train_steps": BY_BATCHES,
    "checkpoint.every_n_epochs": BY_BATCHES,
    "checkpoint.save_last": "last.ckpt is always kept, since a run goes on from it",
}
#: Number of classes that are named, of those that have an argument which was given to another.
OWNERS_SHOWN = 6


class Entry(NamedTuple):
    """A class that an option can name.

    Attributes:
        name: name of the class.
        path: dotted path of the class.
        line: first line of its docstring.
        arguments: names of its constructor's arguments.
    """

    name: str
    path: str
    line: str
    arguments: tuple[str, ...]


@cache
def entries(kind: str) -> dict[str, Entry]:
    """Return the concrete classes that an option of `KINDS` can name, by name."""
    package, base = KINDS[kind]
    classes = {node.name: node for path in sorted((PACKAGE / package).glob("*.py")) for node in _classes(path)}
    known = [name for name in sorted(classes, key=str.lower) if base in _lineage(name, classes) and name != base]
    return {
        name: Entry(name, f"bioprop.{package}.{name}", _first_line(classes[name]), tuple(_arguments(name, classes)))
        for name in known
        if name[0] != "_" and not _abstract(name, classes)
    }


@cache
def options() -> frozenset[str]:
    """Return the dotted names of all options of a run: Lightning's trainer's, ours, and those of our classes."""
    lightning = find_spec("pytorch_lightning")
    groups = {name: (PACKAGE / file, cls) for name, (file, cls) in GROUPS.items()}
    if lightning is not None and lightning.origin:
        groups["trainer"] = (Path(lightning.origin).parent / "trainer" / "trainer.py", "Trainer")
    names = {*GENERAL, *groups, *KINDS, "model.network"} - {"network"}
    for group, (file, cls) in groups.items():
        names |= {f"{group}.{argument}" for argument in _arguments(cls, {node.name: node for node in _classes(file)})}
    for kind in KINDS:
        prefix = "model.network" if kind == "network" else kind
        names |= {f"{prefix}.{argument}" for entry in entries(kind).values() for argument in entry.arguments}
        names.add(f"{prefix}.help")
    return frozenset(names)


def unknown_option(name: str) -> str:
    """Return the sentence about an option that does not exist, by its dotted name, with or without ``model.``."""
    if f"model.{name}" in options():
        return f"there is no option --{name}: did you mean --model.{name}?"
    if f"model.{name.partition('.')[0]}" in options():
        name = f"model.{name}"
    if (short := name.removeprefix("model.").removeprefix("data.")) in REMOVED:
        return REMOVED[short]
    if name in ELSEWHERE:
        return f"there is no option --{name}: {ELSEWHERE[name]}"
    longer = sorted(each for each in options() if each.startswith(name))  # an abbreviation
    close = longer or difflib.get_close_matches(name, sorted(options()), n=1, cutoff=0.75)
    hint = f"did you mean --{close[0]}" if close else "is it misspelt"
    return f"there is no option --{name}: {hint}? bioprop fit --help-all lists them"


def unknown_argument(name: str, own: Iterable[str] = ()) -> str:
    """Return the sentence about an argument that the class it was given to does not have.

    Args:
        name: the argument.
        own: arguments of classes outside the package.
    """
    if name in REMOVED:
        return REMOVED[name]
    classes = [entry for kind in KINDS for entry in entries(kind).values()]
    if owners := sorted(entry.name for entry in classes if name in entry.arguments):
        others = ", ..." if len(owners) > OWNERS_SHOWN else ""
        return f"there is no argument {name} in this place: it belongs to {', '.join(owners[:OWNERS_SHOWN])}{others}"
    known = {argument for entry in classes for argument in entry.arguments} | set(own)
    close = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean {close[0]}" if close else "is it misspelt, or another class's"
    return f"there is no argument {name} in this place: {hint}? --model.help CLASS and --data.help CLASS list them"


def unknown_class(key: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence about a class that an option names, and that does not exist."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? They are" if close else "choose one of"
    own = "; name your own by dotted path, module.Class" if key in KINDS else ""
    return f"{key} is {name}, which is not a class that can be used here: {hint} {', '.join(known)}{own}"


def listing() -> str:
    """Return the algorithms, networks and data sets with a line each."""
    width = max(len(name) for kind in KINDS for name in entries(kind))
    titles = {"model": "algorithms (--model)", "network": "networks (--model.network)", "data": "data (--data)"}
    parts = []
    for kind, title in titles.items():
        lines = [f"  {entry.name:{width}}  {entry.line}" for entry in entries(kind).values()]
        parts.append("\n".join([title, *lines]))
    return "\n\n".join([*parts, "bioprop fit --model.help CLASS and --data.help CLASS tell the arguments of each."])


def described(group: str) -> list[tuple[str, str]]:
    """Return the arguments of a group of options with their descriptions, by the docstring of its class."""
    file, name = GROUPS[group]
    docstring = next(ast.get_docstring(node) or "" for node in _classes(PACKAGE / file) if node.name == name)
    found: list[tuple[str, str]] = []
    for line in docstring.partition("Args:\n")[2].partition("\n\n")[0].splitlines():
        if line.startswith("        "):
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        else:
            argument, _, text = line.strip().partition(": ")
            found.append((f"{group}.{argument}", text))
    return found


def _classes(path: Path) -> Iterator[ast.ClassDef]:
    return (node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))


def _lineage(name: str, classes: dict[str, ast.ClassDef]) -> list[str]:
    """A class and its base classes, nearest first, as far as they are among those given."""
    if name not in classes:
        return []
    bases = [ast.unparse(base).rpartition(".")[2] for base in classes[name].bases]
    return [name, *(each for base in bases for each in _lineage(base, classes))]


def _functions(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}


def _abstract(name: str, classes: dict[str, ast.ClassDef]) -> set[str]:
    """Names of the methods that a class has yet to define."""
    missing: set[str] = set()
    for each in reversed(_lineage(name, classes)):
        for function in _functions(classes[each]).values():
            is_abstract = any(ast.unparse(by).endswith("abstractmethod") for by in function.decorator_list)
            missing = missing | {function.name} if is_abstract else missing - {function.name}
        missing -= {field.id for field in _fields(classes[each])}
    return missing


def _fields(node: ast.ClassDef) -> list[ast.Name]:
    """Attributes that the body of a class names."""
    targets = [target for each in node.body if isinstance(each, ast.Assign) for target in each.targets]
    targets += [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
    return [target for target in targets if isinstance(target, ast.Name)]


def _arguments(name: str, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """Names of a constructor's arguments, with those of base classes that it passes on, and the fields of a dataclass.

    Those of base classes without a default are the subclass's to give.
    """
    first = True
    for each in _lineage(name, classes):
        constructor = _functions(classes[each]).get("__init__")
        if constructor is not None:
            spec = constructor.args
            positional = [*spec.posonlyargs, *spec.args][1:]
            optional = positional[len(positional) - len(spec.defaults) :] if spec.defaults else []
            optional += [arg for arg, value in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if value is not None]
            yield from (arg.arg for arg in ([*positional, *spec.kwonlyargs] if first else optional))
            first = False
            if spec.kwarg is None:
                return
        elif any("dataclass" in ast.unparse(by) for by in classes[each].decorator_list):
            yield from (field.id for field in _fields(classes[each]))


def _first_line(node: ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]
