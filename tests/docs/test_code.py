"""Every block of code on a page is what it says: commands parse, Python runs."""

import functools
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonargparse
import pytest
import torch

from bioprop.cli import main
from bioprop.experiments import compare, export, reproduce
from bioprop.experiments.configs import ParsingCLI
from bioprop.front import answer
from tests.docs.pages import FILE_NAME, PAGES, README, ROOT, blocks, blocks_in, name_of, write_files

LANGUAGES = {"sh", "python", "text", "{toctree}", "{eval-rst}"}
#: Programs of others in our commands.
OTHERS = {".", "mkdir", "ln", "wandb"}
EXTENDING = ROOT / "docs" / "extending.md"


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block of shell, word by word, without variables that are set for them."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command = words[:end]
            while re.match(r"\w+=", command[0]):
                command = command[1:]
            yield command
            words = words[end + 1 :]


PAGES_OF_COMMANDS = [page for page in PAGES if blocks_in(page, "sh")]
PAGES_OF_FILES = [page for page in PAGES if any(FILE_NAME.match(text) for text in blocks_in(page, "python"))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_names_a_language_that_is_tried_here(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES


def test_the_python_of_the_readme_runs() -> None:
    (example,) = blocks_in(README, "python")
    names: dict[str, Any] = {}
    exec(example.replace("128", "8"), names)

    assert set(names["gradients"]) == {name for name, _ in names["network"].named_parameters()}
    assert names["angles"] == pytest.approx({"conv2": 0.0, "fc1": 0.0, "fc2": 0.0}, abs=1e-6)


def test_python_on_other_pages_is_files() -> None:
    for page in PAGES:
        if page not in (README, *PAGES_OF_FILES):
            assert blocks_in(page, "python") == [], page


@pytest.fixture
def page_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that a page's own classes are imported from."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:  # the next test writes other files of these names
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == tmp_path:
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES_OF_FILES, ids=name_of)
def test_files_on_pages_can_be_imported(page: Path, page_folder: Path) -> None:
    for name in write_files(page, page_folder):
        runpy.run_path(str(page_folder / name))


def test_ones_own_classes_train_as_the_page_says(page_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page_folder)
    write_files(EXTENDING, page_folder)
    (text,) = blocks_in(EXTENDING, "sh")
    quick = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]

    for command in commands(text):
        trainer = main([*command[1:], *quick]).trainer
        assert torch.isfinite(trainer.callback_metrics["train/loss"])
        assert trainer.callback_metrics["val/accuracy"] > 0.5


# -- commands --------------------------------------------------------------------------------------------------------


class Parsed(ParsingCLI):
    """Parses, of whatever command, and does no more."""

    def instantiate_classes(self) -> None:
        pass


def parse_run(words: Sequence[str]) -> None:
    main(list(words), Parsed)


def arguments_of(command: ModuleType, name: str, words: Sequence[str]) -> dict[str, Any]:
    """What a command of `bioprop.experiments` would call its function with."""
    function, given = getattr(command, name), {}

    @functools.wraps(function)
    def keep(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        given.update(bound.arguments)
        return 0

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, name, keep)
        assert command.main(list(words)) == 0
    return given


def parse_comparison(words: Sequence[str]) -> None:
    """Parse, look for the files that rows are named by, and parse the options of the runs."""
    given = arguments_of(compare, "compare", words)
    files = [Path(path) for path in given["configs"].split(",") if path]
    for algorithm in filter(None, given["algorithms"].split(",")):
        files.append(ROOT / "lightning_configs" / f"{algorithm}_{given['network']}_{given['data']}.yaml")
    for file in files:
        assert file.is_file(), file
    if given["options"]:
        parse_run(["fit", f"--config={files[0]}", *given["options"]])


def parse_bioprop(command: str, words: Sequence[str]) -> None:
    if command == "list":
        assert answer([command, *words])
    elif command == "compare":
        parse_comparison(words)
    elif command == "reproduce":
        given = arguments_of(reproduce, "reproduce", words)
        assert given["list"] or given["name"] in reproduce.names()
        if given["options"]:
            row = next(iter(reproduce.load(given["name"]).rows.values()))
            parse_run(["fit", f"--config={row.config}", *row.options, *given["options"]])
    elif command == "export":
        arguments_of(export, "export", words)
    elif command == "check":  # the options of fit, and digits without --data
        parse_run(["fit", *([] if "--data" in words else ["--data=Digits"]), *words])
    else:
        parse_run([command, *words])


def parse_module(module: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the options of a module that has some."""
    path = (ROOT / module.replace(".", "/")).with_suffix(".py")
    path = path if path.exists() else ROOT / "src" / path.relative_to(ROOT)
    if "auto_cli" not in path.read_text():
        assert not words
        return
    parsed = []

    def parse(function: Callable[..., Any], **settings: Any) -> None:
        parser = jsonargparse.capture_parser(functools.partial(jsonargparse.auto_cli.real, function, **settings))
        parsed.append(parser.parse_args(list(words)))

    parse.real = jsonargparse.auto_cli  # type: ignore[attr-defined]
    monkeypatch.setattr(jsonargparse, "auto_cli", parse)
    monkeypatch.delitem(sys.modules, module, raising=False)  # another test's import, which runpy warns of
    runpy.run_module(module, run_name="__main__")
    assert parsed


@pytest.mark.parametrize("page", PAGES_OF_COMMANDS, ids=name_of)
def test_commands_parse(page: Path, page_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(EXTENDING, page_folder)  # whose classes other pages name, too
    for text in blocks_in(page, "sh"):
        monkeypatch.chdir(ROOT)
        for program, *words in commands(text):
            program = program.removeprefix(".venv/bin/")
            if program == "cd":
                monkeypatch.chdir(words[0])
            elif program == "make":
                assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
            elif program == "python":
                assert words[0] == "-m"
                with monkeypatch.context() as patched:
                    parse_module(words[1], words[2:], patched)
            elif program == "bioprop":
                parse_bioprop(words[0], words[1:])
            else:
                assert program in OTHERS, program
