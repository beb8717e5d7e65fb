"""The grammar of the command line: the order of options, null, home folders, and files of options."""

import sys
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, get_loader, set_loader
from pytorch_lightning.cli import LightningArgumentParser

from bioprop.cli_messages import explain
from bioprop.errors import UserError
from bioprop.front import CONFIG, known_config

#: jsonargparse's name for our way to read values.
MODE = "yaml_and_none"

#: The words that are parsed, and the --config file that is read, if one is; the parsers of classes know neither.
_words: ContextVar[Sequence[str]] = ContextVar("_words", default=())
_file: ContextVar[str] = ContextVar("_file", default="")

_read_yaml = get_loader("yaml")


def _load(text: str) -> Any:
    """Read YAML, with Python's spelling of null, as W&B's agents write it, too."""

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
        token = _file.set(f"{path}: ")
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
        if isinstance(cause, UnicodeDecodeError):
            sentence = "a file of options must be text in UTF-8, and this is not (a checkpoint is given by --ckpt_path)"
        else:
            sentence = str(cause or explain(message, _words.get()))
        self.exit(2, f"bioprop: error: {_file.get()}{sentence}\n")


def in_order(words: Iterable[str]) -> list[str]:
    """Put files of options first, and what names a class before the arguments of that class.

    So options override files, and none is dropped for a class that is named after it, wherever it was written.

    Args:
        words: what stands behind the command.
    """
    groups: list[list[str]] = []
    for word in words:
        if not groups or word.startswith("--") or word[:2] == "-c":
            groups.append([word])
        else:
            groups[-1].append(word)
    files: list[str] = []
    ordered: list[tuple[str, list[str]]] = []
    for group in groups:
        name, _, value = group[0].partition("=")
        if CONFIG.fullmatch(name):
            given = [value, *group[1:]] if value else group[1:]
            files += [name, *map(known_config, given)]
            continue
        places = [at for at, (before, _) in enumerate(ordered) if before.startswith(f"{name}.")]
        # a second naming of the class replaces all that stands before it
        again = any(before == name for before, _ in ordered)
        ordered.insert(places[0] if places and not again else len(ordered), (name, group))
    return [*files, *(word for _, group in ordered for word in group)]


def resolve_homes(value: Any, key: str = "") -> Any:
    """Spell ``~`` out wherever a path begins with it, in place.

    Args:
        value: what was parsed, whole or in part.
        key: its name, for the message.

    Raises:
        UserError: if a path names the home folder of somebody who is not known here.
    """
    if isinstance(value, Namespace | dict):
        parts = vars(value) if isinstance(value, Namespace) else value
        for name, each in parts.items():
            parts[name] = resolve_homes(each, name)
    elif isinstance(value, list):
        value[:] = [resolve_homes(each, key) for each in value]
    elif isinstance(value, str | Path) and str(value).startswith("~"):
        try:
            return type(value)(Path(value).expanduser())
        except RuntimeError as error:
            raise UserError(f"{key} is {value}, but nobody of that name has a home here") from error
    return value
