"""What is answered without torch: help, lists, and mistakes in names."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import bioprop
from bioprop import catalogue, front
from bioprop.cli import BiopropCLI, main
from bioprop.cli_messages import BASES, _subclasses
from bioprop.errors import UserError
from bioprop.experiments.configs import ParsingCLI
from bioprop.removed import REMOVED

NO_HEAVY = "import sys; sys.modules['torch'] = None  # without which Lightning fails, too\n"
RUN = "from bioprop.__main__ import run\nrun()"


def process(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process that cannot import torch or Lightning."""
    paths = os.pathsep.join([str(Path(bioprop.__file__).parents[1])])
    return subprocess.run(
        [sys.executable, "-c", NO_HEAVY + RUN, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "check in a minute"),
        (["--version"], 0, f"bioprop {bioprop.__version__}"),
        (["list"], 0, "LDRL "),
        (["fit", "--help"], 0, "--model.network CLASS"),
        (["test", "--help"], 0, "usage: bioprop test"),
        ([], 2, "no command is given: choose one of fit, validate, test, predict, compare, reproduce, check, "),
        (["fitt"], 2, "there is no command fitt: did you mean fit?"),
        (["--config=x.yaml", "fit"], 2, "go behind the command, as in bioprop fit --config FILE"),
        (["fit", "--trainer.max_epocs=3"], 2, "did you mean --trainer.max_epochs?"),
        (["fit", "--model=LDLR"], 2, "did you mean LDRL?"),
        (["fit", "--config", "ldrl_lenet_digits", "--model.noize=1"], 2, "did you mean --model.noise?"),
        (["fit", "--config=ldrl_lenet_digit"], 2, "there is no such file here: did you mean ldrl_lenet_digits?"),
        (["test"], 2, "model, network and data must be given: use a --config file, or for example --model LDRL"),
        (["fit", "--network=LeNet", "--model=LDRL"], 2, "no option --network: did you mean --model.network?"),
        (["list", "networks"], 2, "bioprop list takes no options"),
    ],
)
def test_no_torch_is_needed(words: list[str], status: int, said: str) -> None:
    done = process(*words)
    assert (done.returncode, said in done.stdout + done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", catalogue.KINDS)
def test_the_classes_are_those_that_can_be_named(kind: str) -> None:
    """Read off the source as Python sees them."""
    package = f"bioprop.{catalogue.KINDS[kind][0]}."
    live = {cls.__name__: cls for cls in _subclasses(BASES[kind]) if cls.__module__.startswith(package)}
    found = catalogue.entries(kind)
    assert set(found) == set(live)
    for name, entry in found.items():
        assert getattr(sys.modules[entry.path.rpartition(".")[0]], name) is live[name]
        assert entry.line == (inspect.getdoc(live[name]) or "").partition("\n")[0] != ""
        parameters = inspect.signature(live[name]).parameters.values()
        assert {each.name for each in parameters if each.kind != each.VAR_KEYWORD} <= set(entry.arguments)


def test_the_options_are_those_of_the_parser() -> None:
    cli = main(["fit", "--config=ldrl_lenet_digits"], ParsingCLI)
    parser = cli._parser("fit")
    real = {name.removeprefix("--") for name in parser._option_string_actions if name.startswith("--")}
    groups = {name for name in real if name.partition(".")[0] in ("trainer", "checkpoint", "alignment")}
    known = {name for name in catalogue.options() if name.partition(".")[0] in ("trainer", "checkpoint", "alignment")}
    assert known == {name for name in groups if not name.endswith(("+", ".help"))}
    assert real - groups - {name for name in real if name.endswith("+")} <= catalogue.options()
    named = re.findall(r"--([\w.]+)\+?(?= )", front.run_help("fit"))
    given = [name for name in named if name.count(".") < 2 and not name.isupper() and "ARGUMENT" not in name]
    assert len(given) > 20
    assert {name for name in given if name not in catalogue.options()} <= {"model.optimizer.lr", "help-all"}


def test_help_fits_two_screens() -> None:
    lines = front.run_help("fit").splitlines()
    assert len(lines) <= 70
    assert max(map(len, lines)) <= 120


def test_help_all_is_the_parsers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(front.rewritten(["fit", "--help-all"]))
    assert left.value.code == 0
    assert "--trainer.use_distributed_sampler" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "ldrl_lenet_digits"], "LDRL trains LeNet on Digits for 12 epochs"),
        (["-c", "ldrl_lenet_digits", "--model=my.Rule", "--trainer.max_epochs=3"], "Rule trains LeNet on Digits for 3"),
        (["--config=a/nowhere.yaml", "--data=MNIST", "--ckpt_path=last"], "? trains ? on MNIST, from last"),
    ],
)
def test_a_run_says_what_it_is_about_to_do(words: list[str], said: str) -> None:
    assert front.announcement(words).startswith(said)


@pytest.mark.parametrize(
    "words",
    [
        ["--model=my_rules.Mine", "--model.strength=3"],
        ["--config=own.yaml", "--model.strength=3", "--model.network.width=3"],
        ["--model.optimizer.lr=3", "--model.speed.bfloat16=true", "--trainer.callbacks+=EarlyStopping"],
        ["--trainer.callbacks.monitor=val/loss", "--trainer.logger.save_dir=x", "--model.init_args.beta=3"],
        ["--print_config", "--data.image_size", "-32", "--model.help=LDRL", "-c", "own.yaml"],
        ["--model=own.yaml", "--model.scheduler=StepLR", "--data.limit_train=-1"],
    ],
)
def test_what_may_be_right_is_left_to_the_parser(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("model:\n  class_path: my_rules.Mine\n")
    assert front.answer(["test", *words]) is False


@pytest.mark.parametrize("name", REMOVED)
def test_what_is_gone_is_answered_by_what_took_its_place(name: str) -> None:
    with pytest.raises(UserError) as refused:
        front.answer(["fit", f"--model.{name}=1"])
    assert str(refused.value) == REMOVED[name]


def test_configurations_that_come_with_the_package_go_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert front.known_config("nothing.yaml") == "nothing.yaml"
    assert Path(front.known_config("ldrl_lenet_digits.yaml")).parent == front.CONFIGS
    settings = main(["fit", "--config", "ldrl_lenet_digits", "--config=smoke"], ParsingCLI)
    assert isinstance(settings, ParsingCLI)
    assert settings.settings["trainer"]["max_epochs"] == 1
    Path("ldrl_lenet_digits").write_text(yaml.safe_dump({"trainer": {"max_epochs": 3}}))  # one's own comes first
    assert front.known_config("ldrl_lenet_digits") == "ldrl_lenet_digits"


def test_version_is_that_of_the_installed_package() -> None:
    text = (Path(bioprop.__file__).parents[2] / "setup.cfg").read_text()
    assert "version = attr: bioprop.__version__" in text
    assert issubclass(ParsingCLI, BiopropCLI)
