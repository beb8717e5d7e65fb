"""The parser's errors, each in one sentence that names the value, the reason and what works."""

import difflib
import re
from collections.abc import Iterable, Sequence

import yaml

from bioprop.algorithms import Algorithm
from bioprop.cli_classes import ALL_KINDS, KINDS, arguments, subclasses, why_not
from bioprop.removed import REMOVED

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

#: Number of classes that are named, of those that have an argument which was given to another.
OWNERS_SHOWN = 6

BY_BATCHES = "--checkpoint.every_n_batches N saves every N batches (and last.ckpt at the end of every epoch)"
#: Lightning's own arguments of a checkpoint callback, and what takes their place.
ELSEWHERE = {
    "checkpoint.every_n_train_steps": BY_BATCHES,
    "checkpoint.train_time_interval": f"time between checkpoints is counted in batches, {BY_BATCHES}",
    "checkpoint.every_n_epochs": BY_BATCHES,
    "checkpoint.save_last": "last.ckpt is always kept, since a run goes on from it",
}


def explain(message: str, options: Iterable[str] = (), words: Sequence[str] = ()) -> str:
    """Turn jsonargparse's nested report of an error into a sentence.

    Args:
        message: the report.
        options: names of the options of the command, ``--like.this``.
        words: what was written behind the command.
    """
    if "before subcommand" in message:
        return "options and --config go behind the command, as in bioprop fit --config FILE"
    if match := re.search(r"Group '(\w+)' does not accept option '([\w.]+)'", message):
        return _unknown_option(f"{match[1]}.{match[2]}", options)
    if match := re.search(r"Subcommand '\w+' does not accept option '([\w.]+)'", message):
        return _unknown_option(match[1], options)
    if match := re.search(r"Option '([\w.]+)' is not accepted", message):
        return _unknown_argument(match[1])
    if match := re.search(r"unrecognized arguments: --([\w.]+)", message):
        return _unknown_argument(match[1]) if match[1] in ELSEWHERE else _unknown_option(match[1], options)
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        return (
            f"{match[1]} belongs to no option: each has one value, a list is written [a,b], and its name begins with --"
        )
    if match := re.search(r"subcommand: invalid choice: '(.*)' \(choose from (.*)\)", message):
        return f"there is no command {match[1]}: choose one of {match[2]}, 'compare', and give options behind it"
    if 'expected "subcommand"' in message:
        return "no command is given: choose one of fit, validate, test, predict, compare"
    if match := re.search(r"arguments are required: (.+)", message):
        names = [re.sub(r"^(fit|validate|test|predict)\.", "", name.strip()) for name in match[1].split(",")]
        return _missing(names, message)
    if match := re.search(r"argument ([^\s:]+): expected (?:one|at least one) argument", message):
        return f"{_without_value(match[1].split('/'), words)} needs a value behind it"
    if reason := _unreadable(message):
        return reason
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    given = _given_value(message)
    if keys and "'linked_targets'" in message:  # jsonargparse hands a function the links that only a class can take
        return f"{keys[-1]} is a function that makes one, but it must be a class"
    if keys and given is not None:
        return _refused(keys[-1], given, message)
    return " ".join(message.split())


def _unreadable(message: str) -> str | None:
    """Return the sentence about a file of options; None if the report is about something else."""
    if message.strip().startswith("Unexpected config:"):
        content = yaml.safe_load(message.partition(": ")[2])
        if content is None or content == "":
            return "this file of options is empty: give it options, or leave it out"
        if isinstance(content, dict):
            return f"this file of options gives no value to {', '.join(content)}"
        kind = NAMES.get(type(content).__name__, "a text")
        return f"this is {kind}, but a file of options holds them by name, such as trainer: {{max_epochs: 3}}"
    if "Problems parsing config" in message:
        where = re.findall(r"line (\d+)", message)
        hint = " (no word may begin with a tab, @, ` or %)" if "cannot start any token" in message else ""
        if "characters are not allowed" in message:
            hint = " (characters that no text in UTF-8 has: save it in that encoding)"
        return f"this file of options is not valid YAML{f', at line {where[-1]}' if where else ''}{hint}"
    if match := re.search(r"(?:File|Path) (does not exist|is not .*): '([^'\n]+)'", message):
        return (
            f"{match[2]}: {match[1].replace('does not exist', 'there is no such file').replace('is not', 'it is not')}"
        )
    if match := re.search(
        r"Parser key \"([\w.]+)\"\W+(?:Unable to load config|Config file loop detected:) '?([^'\s]*)", message
    ):
        return (
            f"{match[1]} is {match[2]}, but it takes a file of its settings by name, or each of them: {match[1]}.NAME"
        )
    return None


def _refused(key: str, given: str, message: str) -> str:
    """Return the sentence about a value."""
    nested = re.search(r"NestedArg\(key='([\w.]+)'", message)
    if nested and "is abstract" in message:
        example = EXAMPLES.get(key, f"--{key} CLASS")
        return f"--{key}.{nested[1]} belongs to a class that is not named: name it, too, as in {example}"
    name = (nested[1] if nested else key).rpartition(".")[2]
    if name == "precision":  # Lightning lists many, also by other names
        return f"precision is {given}, but it must be one of {', '.join(Algorithm.precisions)}"
    if name in ALL_KINDS:
        return why_not(name, given, message)
    return f"{name} is {given or 'empty'}, but it must be {_expected(message)}"


def _unknown_argument(name: str) -> str:
    if name in REMOVED:
        return REMOVED[name]
    if name in ELSEWHERE:
        return f"there is no argument {name} here: {ELSEWHERE[name]}"
    classes = [cls for kind in ALL_KINDS.values() for cls in subclasses(kind)]
    if owners := sorted(cls.__name__ for cls in classes if name in arguments(cls)):
        others = ", ..." if len(owners) > OWNERS_SHOWN else ""
        return f"there is no argument {name} in this place: it belongs to {', '.join(owners[:OWNERS_SHOWN])}{others}"
    known = {argument for cls in classes for argument in arguments(cls)}
    close = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean {close[0]}" if close else "is it misspelt, or another class's"
    return f"there is no argument {name} in this place: {hint}? --model.help CLASS and --data.help CLASS list them"


def _unknown_option(name: str, options: Iterable[str]) -> str:
    """Return the sentence about an option, of which the parser of a model's own arguments has no leading ``model.``."""
    if name.removeprefix("model.") in REMOVED:
        return REMOVED[name.removeprefix("model.")]
    own = {option.removeprefix("--") for option in options}
    prefix = "" if "model" in own or "network" not in own else "model."
    known = {f"{prefix}{option}" for option in own if len(option) > 2}  # no single letters
    known |= {f"{key}.{each}" for key in ("model", "data") for cls in subclasses(KINDS[key]) for each in arguments(cls)}
    longer = sorted(option for option in known if option.startswith(f"{prefix}{name}"))  # an abbreviation
    close = longer or difflib.get_close_matches(f"{prefix}{name}", sorted(known), n=1, cutoff=0.75)
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


def _without_value(names: Sequence[str], words: Sequence[str]) -> str:
    """The option, of one name or of an argument of its class, that nothing stands behind."""
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if following.startswith("--") and any(word == name or word.startswith(f"{name}.") for name in names):
            return word
    return names[-1]


def _given_value(message: str) -> str | None:
    found = (
        re.search(r"Expected a path but (.*) either not accessible", message)
        or re.search(r"NestedArg\(.*val='(.*)'\)", message)
        or re.search(r"Got value: (.*)", message)
        or re.search(r"Given value: (.*)", message)
        or re.search(r"Import path (\S+) does not", message)
    )
    return found and found[1]


def _expected(message: str) -> str:
    types = re.findall(r"Expected an? <class '(\w+)'>", message)
    kinds = [NAMES.get(name, f"a {name}") for name in dict.fromkeys(types) if name != "NoneType"]
    if literal := re.search(r"Literal\[(.*?)\]", message):
        kinds.insert(0, literal[1] if kinds else f"one of {literal[1]}")
    return " or ".join(kinds) or "of another type (see --help)"
