"""The grammar of the command line: the order of options, null, home folders, and files of options."""

import inspect
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import Namespace, get_loader, set_loader
from pytorch_lightning.cli import LightningArgumentParser

from bioprop.cli_classes import parameters
from bioprop.cli_messages import explain
from bioprop.errors import UserError

#: jsonargparse's name for our way to read values.
MODE = "yaml_and_none"
#: Words that stand for null on its way from the agents of W&B, which are Python, and in YAML.
NULLS = ("None", "null")
CONFIG = ("-c", "--config")

#: The words that are parsed, and the --config file that is read, if one is; the parsers of classes know neither.
_words: ContextVar[Sequence[str]] = ContextVar("_words", default=())
_file: ContextVar[str] = ContextVar("_file", default="")


_read_yaml = get_loader("yaml")


def _load(text: str) -> Any:
    """Read YAML, with Python's spelling of null, too."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            # no arguments where the word stands alone
            return {key: convert(each) for key, each in value.items() if (key, each) != ("init_args", None)}
        if isinstance(value, list):
            return [convert(each) for each in value]
        return None if value == "None" else value

    return convert(_read_yaml(text))


set_loader(MODE, _load, (yaml.YAMLError,))


class OneSentenceParser(LightningArgumentParser):
    """Exits with status 2 and one sentence instead of the usage of all options and a nested report.

    Options are written in full, since an abbreviation may mean another option in the next version.
    """

    def __init__(self, *args: Any, parser_mode: str = MODE, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, parser_mode=parser_mode, allow_abbrev=allow_abbrev, **kwargs)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any
    ) -> Namespace:
        """Parse; a file that is no text ends in a sentence, too."""
        token = _words.set(_words.get() or (sys.argv[1:] if args is None else args))
        try:
            return super().parse_args(args, *rest, **kwargs)
        except UnicodeDecodeError as error:
            self.error(str(error), error)
        finally:
            _words.reset(token)

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a file; errors name it."""
        token = _file.set(str(path))
        try:
            found: Namespace = super().parse_path(path, *args, **kwargs)
            for name in self.groups or ():
                if name in found and found[name] is None:  # all its entries may be commented out
                    del found[name]
                elif isinstance(found.get(name), int | float | list):  # which jsonargparse lets pass
                    self.error(f'Parser key "{name}": Unable to load config {found[name]}')
            return found
        except UnicodeDecodeError as error:
            self.error(str(error), error)
        finally:
            _file.reset(token)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and exit."""
        cause: BaseException | None = ex
        while cause is not None and not isinstance(cause, UserError | UnicodeDecodeError):
            cause = cause.__cause__
        words = _words.get()
        named = [word.partition("=")[2] if word.startswith("-") else word for word in words]
        file = _file.get()
        if isinstance(cause, UnicodeDecodeError):
            file = file or next(filter(_is_no_text, named), "")
            sentence = _no_text(file)
        else:
            sentence = str(cause or explain(message, self._all_options(), words))
        if unknown := re.search(r"[oO]ption '([\w.]+)'", message):  # found when all files are read
            file = file or next((each for each in named if _holds(each, unknown[1])), "")
        self.exit(2, f"bioprop: error: {f'{file}: ' if file else ''}{sentence}\n")

    def _all_options(self) -> list[str]:
        """Those of the parser and of its commands."""
        commands = [action.choices for action in self._actions if isinstance(action.choices, dict)]
        parsers = [self, *(parser for choices in commands for parser in choices.values())]
        return [option for parser in parsers for option in parser._option_string_actions]


def in_order(words: Iterable[str]) -> list[str]:
    """Put files of options first, and what names a class before the arguments of that class.

    So options override files, and none is dropped for a class that is named after it, wherever it was written.

    Args:
        words: what stands behind the command.
    """
    groups: list[list[str]] = []
    for word in words:
        if not groups or word.startswith("--") or word[:2] in CONFIG:
            groups.append([word])
        else:
            groups[-1].append(word)
    names = [group[0].partition("=")[0] for group in groups]

    def place(index: int) -> tuple[bool, int, int]:
        name, before = names[index], names[:index]
        # a second naming of the class replaces all that stands before it
        first = (
            index
            if name in before
            else next((at for at, each in enumerate(before) if each.startswith(f"{name}.")), index)
        )
        return not (name in CONFIG or name[:2] == "-c"), first, name.count(".") if first < index else 99

    return [word for index in sorted(range(len(groups)), key=place) for word in groups[index]]


def resolve_values(value: Any, key: str = "") -> Any:
    """Spell ``~`` out wherever a path begins with it, in place, and refuse null where it is no value.

    Args:
        value: what was parsed, whole or in part.
        key: its name, for the message.

    Raises:
        UserError: if a path names the home folder of somebody who is not known here, or an argument that cannot be
            null is; jsonargparse takes null as an argument that was not given.
    """
    if isinstance(value, Namespace | dict):
        parts = vars(value) if isinstance(value, Namespace) else value
        for name, each in parts.items():
            parts[name] = resolve_values(each, name)
        if isinstance(parts.get("class_path"), str) and isinstance(parts.get("init_args"), Namespace):
            for name, each in vars(parts["init_args"]).items():
                if each is None and not _takes_null(locate(parts["class_path"]), name):
                    raise _null(name)
    elif isinstance(value, list):
        value[:] = [resolve_values(each, key) for each in value]
    elif isinstance(value, str | Path) and str(value) in NULLS:
        raise _null(key)
    elif isinstance(value, str | Path) and str(value).startswith("~"):
        path = os.path.expanduser(value)
        if path == str(value) and os.sep in path:
            raise UserError(f"{key} is {value}, but nobody of that name has a home here: write the folder out")
        return type(value)(path)
    return value


def _null(key: str) -> UserError:
    return UserError(f"{key} is null, but it needs a value: give one, or leave it out")


def _takes_null(factory: Any, name: str) -> bool:
    """Return true if an argument of a class or function may be null: by its default, or else by its type."""
    parameter = parameters(factory).get(name)
    if parameter is None or parameter.default is None or parameter.default is inspect.Parameter.empty:
        return True  # what is required is missed elsewhere
    hint = parameter.annotation
    return isinstance(hint, str) or hint in (Any, inspect.Parameter.empty) or type(None) in get_args(hint)


def _is_no_text(path: str) -> bool:
    try:
        Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return True
    except (OSError, RuntimeError):
        return False
    return False


def _no_text(path: str) -> str:
    if path and zipfile.is_zipfile(Path(path).expanduser()):
        return f"this is no file of options; a checkpoint is given as --ckpt_path {path}"
    return "this is no text in UTF-8, as a file of options must be: save it in that encoding"


def _holds(path: str, key: str) -> bool:
    """Return true if a file has an option."""
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, RuntimeError, UnicodeDecodeError, yaml.YAMLError):
        return False
    for part in key.split("."):
        content = content.get(part, NULLS) if isinstance(content, dict) else NULLS
    return content is not NULLS
