"""The front of the command line: help, lists, mistakes in names, and what a run is about to do, all without torch."""

import difflib
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import yaml

from bioprop import __version__
from bioprop.catalogue import described, entries, listing, options, unknown_class, unknown_option
from bioprop.errors import UserError

#: The configurations lie beside the package in a clone, and within it where it was installed.
CONFIGS = next(
    (
        folder
        for folder in (Path(__file__).parent / "lightning_configs", Path(__file__).parents[2] / "lightning_configs")
        if folder.is_dir()
    ),
    Path(__file__).parent / "lightning_configs",
)
COMMANDS = {
    "fit": "train a network by an algorithm",
    "validate": "evaluate a checkpoint on the validation images",
    "test": "evaluate a checkpoint on the test images",
    "predict": "write the classes that a checkpoint predicts to predictions.csv",
    "compare": "train several algorithms with several seeds, and write a table and figures",
    "reproduce": "run a published setting, and say whether its figures fall in range",
    "check": "check in a minute whether an algorithm trains a network as its theory says",
    "export": "write the trained network as a state dict or an ONNX file",
    "list": "list the algorithms, networks and data sets",
}
RUNS = ("fit", "validate", "test", "predict")
CONFIG = re.compile(r"-c|--config")
#: Packages whose classes have no options but those that are known, or options at places that are not looked at.
LIBRARIES = ("bioprop", "torch", "pytorch_lightning")

GENERAL_HELP = (
    "usage: bioprop COMMAND [options]\n\n"
    "Train deep networks without backpropagation's implausible parts.\n\n{commands}\n\n"
    "bioprop COMMAND --help tells the options of a command; bioprop --version the version."
)
RUN_OPTIONS: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
    (
        "What is trained, and on what",
        (
            (
                "config FILE",
                "file of options, or the name of one that comes with bioprop (ldrl_lenet_digits); of several, the "
                "later ones win, and options win over files",
            ),
            ("model CLASS", "algorithm: {model}, or your own by dotted path"),
            ("model.network CLASS", "network: {network}, or your own by dotted path"),
            ("data CLASS", "images: {data}, or your own by dotted path"),
            ("model.ARGUMENT VALUE", "an argument of the algorithm; --model.help CLASS lists them"),
            ("model.network.ARGUMENT VALUE", "an argument of the network; --model.network.help CLASS lists them"),
            ("model.optimizer CLASS", "torch optimizer of the forward weights, with --model.optimizer.lr and so on"),
            ("model.scheduler CLASS", "torch learning-rate schedule, stepped once an epoch"),
            ("data.ARGUMENT VALUE", "an argument of the data; --data.help CLASS lists them"),
            ("seed_everything SEED", "seed of weights and noise (default 0); --data.seed is that of split and order"),
        ),
    ),
    (
        "The run",
        (
            ("ckpt_path FILE", "checkpoint: a file, last, best, or for fit auto (the last, if there is one)"),
            ("trainer.max_epochs N", "epochs to train"),
            ("trainer.devices N", "processes that train together (default 1)"),
            ("trainer.accelerator NAME", "cpu, gpu or auto (default)"),
            ("trainer.precision NAME", "32-true (default), 64-true or bf16-mixed"),
            ("trainer.default_root_dir FOLDER", "folder of all runs (default runs)"),
            ("trainer.logger CLASS", "WandbLogger, TensorBoardLogger; by default metrics.csv in the run's folder"),
            ("trainer.callbacks+= CLASS", "a further callback, such as FeedbackRecord or EarlyStopping"),
            ("trainer.enable_progress_bar BOOL", "false for a log file"),
            ("print_config", "print all settings, and do nothing"),
        ),
    ),
)


def answer(words: Sequence[str]) -> bool:
    """Print what needs no torch; the run is announced, too.

    Args:
        words: the words after ``bioprop``.

    Returns:
        Whether all is done.

    Raises:
        UserError: for a command, an option or a class that does not exist.
    """
    command, rest = (words[0], words[1:]) if words else ("", [])
    if command in ("--help", "-h"):
        _print(_general_help())
    elif command == "--version":
        _print(f"bioprop {__version__}")
    elif command not in COMMANDS:
        raise UserError(_no_command(command))
    elif command == "list":
        if rest and rest not in (["--help"], ["-h"]):
            raise UserError(f"bioprop list takes no options, but was given {' '.join(rest)}")
        _print(f"{listing()}\n{CONFIGS} has configurations of most of them, for --config.")
    elif command in RUNS and ("--help" in rest or "-h" in rest):
        _print(run_help(command))
    else:
        if command in RUNS:
            _refuse_misspelt(rest)
        if command == "fit" and "LOCAL_RANK" not in os.environ and not any("help" in word for word in rest):
            sys.stderr.write(f"bioprop fit: {announcement(rest)} (loading torch and Lightning)\n")
        return False
    return True


def rewritten(words: Sequence[str]) -> list[str]:
    """Return a command's words as the parser of all options takes them: ``--help-all`` is its ``--help``."""
    return ["--help" if word == "--help-all" else word for word in words]


def known_config(value: str) -> str:
    """Return the path of a file of options: one that comes with bioprop may be given by its name alone."""
    path = CONFIGS / (value if value.endswith(".yaml") else f"{value}.yaml")
    return str(path) if os.sep not in value and not Path(value).exists() and path.is_file() else value


def _general_help() -> str:
    return GENERAL_HELP.format(commands="\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()))


def run_help(command: str) -> str:
    """Return the help of a command that runs: our own options, on two screens."""
    classes = {kind: ", ".join(entries(kind)) for kind in ("model", "network", "data")}
    groups = [(title, [(name, text.format(**classes)) for name, text in lines]) for title, lines in RUN_OPTIONS]
    if command == "fit":
        groups += [("Checkpoints", described("checkpoint")), ("Angles to the BP gradient", described("alignment"))]
    lines = [f"usage: bioprop {command} [options]", "", f"{COMMANDS[command].capitalize()}.".replace("onnx", "ONNX")]
    for title, group in groups:
        lines += ["", f"{title}:"]
        for name, text in group:
            indent = " " * 36
            first, *rest = textwrap.wrap(text.replace("``", ""), 80) or [""]
            lines.append(f"  --{name:31} {first}" if len(name) < 32 else f"  --{name}\n{indent}{first}")
            lines += [indent + line for line in rest]
    lines += ["", "--help-all tells all options, Lightning's too."]
    return "\n".join(lines)


def announcement(words: Sequence[str]) -> str:
    """Return what a run is about to do, as far as its options and files tell at a glance."""
    given: dict[str, str] = {}
    for name, value in _pairs(words):
        if CONFIG.fullmatch(name):
            given |= _named_in(known_config(value))
        elif name in ("--model", "--model.network", "--data", "--trainer.max_epochs", "--ckpt_path"):
            given[name.lstrip("-")] = value.rpartition(".")[2] if name != "--ckpt_path" else value
    model, network, data = (given.get(name, "?") for name in ("model", "model.network", "data"))
    said = f"{model} trains {network} on {data}"
    if epochs := given.get("trainer.max_epochs"):
        said += f" for {epochs} epochs"
    return said + (f", from {given['ckpt_path']}" if "ckpt_path" in given else "")


def _named_in(path: str) -> dict[str, str]:
    """The classes and epochs that a file of options names; nothing of one that cannot be read, which is told later."""
    try:
        settings = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
        model = settings.get("model") or {}
        parts = {"model": model, "model.network": (model.get("init_args") or {}).get("network")}
        parts["data"] = settings.get("data")
        named = {key: part["class_path"] for key, part in parts.items() if part and "class_path" in part}
        found = {key: str(path).rpartition(".")[2] for key, path in named.items()}
        epochs = (settings.get("trainer") or {}).get("max_epochs")
    except (OSError, RuntimeError, ValueError, AttributeError, TypeError, yaml.YAMLError):
        return {}
    return found | ({} if epochs is None else {"trainer.max_epochs": str(epochs)})


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options with their values, ``--name=value`` or ``--name value``."""
    for word, following in pairwise([*words, "--"]):
        if word.startswith("-"):
            name, equals, value = word.partition("=")
            yield name, value if equals else following


def _no_command(command: str) -> str:
    if not command:
        return f"no command is given: choose one of {', '.join(COMMANDS)}"
    if command.startswith("-"):
        return "options and --config go behind the command, as in bioprop fit --config FILE"
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {close[0]}? They are" if close else "choose one of"
    return f"there is no command {command}: {hint} {', '.join(COMMANDS)}"


def _refuse_misspelt(words: Sequence[str]) -> None:
    """Look for options and classes that nothing has; arguments of a user's own classes are left to the parser."""
    pairs = list(_pairs(words))
    given = {name.partition(".")[0] for name, _ in pairs}
    for path in (Path(known_config(value)) for name, value in pairs if CONFIG.fullmatch(name)):
        if path.name == str(path) and not path.exists():
            close = difflib.get_close_matches(path.stem, [each.stem for each in CONFIGS.glob("*.yaml")], n=1)
            hint = f"did you mean {close[0]}?" if close else f"{CONFIGS} has those that come with bioprop"
            raise UserError(f"--config {path}: there is no such file here: {hint}")
    for kind in ("model", "data"):
        value = dict(pairs).get(f"--{kind}", "")
        if value.isidentifier() and value not in entries(kind):
            raise UserError(unknown_class(kind, value, entries(kind)))
    classes = [value for name, value in pairs if name in ("--model", "--model.network", "--data")]
    for file in (known_config(value) for name, value in pairs if CONFIG.fullmatch(name)):
        with suppress(OSError, RuntimeError, ValueError):
            classes += re.findall(r"class_path['\"]?: *['\"]?([\w.]+)", Path(file).expanduser().read_text("utf-8"))
    foreign = any("." in each and each.partition(".")[0] not in LIBRARIES for each in classes)
    for word, _ in pairs:
        first, *rest = word.lstrip("-").rstrip("+").split(".")
        place = 2 if (first, *rest[:1]) in (("model", "network"), ("model", "speed")) else 1
        of_class = first in ("model", "data") and len(rest) >= place
        known = ".".join((first, *rest[:place])) in options() or {"init_args", "dict_kwargs"} & set(rest)
        if word.startswith("--") and word != "--" and not known and not (of_class and foreign):
            raise UserError(unknown_option(".".join((first, *rest))))
    if not given & {"-c", "--config", "--model", "--data", "--print_config"} and "help" not in "".join(words):
        raise UserError(
            "model, network and data must be given: use a --config file, or for example --model LDRL --model.network "
            "LeNet --data Digits"
        )


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
