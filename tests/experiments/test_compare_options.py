"""Which options a comparison takes, and which it refuses since it sets them itself; nothing is trained here."""

from pathlib import Path

import pytest

from bioprop.errors import UserError
from bioprop.experiments import compare as compare_module
from bioprop.experiments import worker
from bioprop.experiments.compare import main
from bioprop.experiments.configs import CONFIGS
from bioprop.experiments.costs import TURNS
from bioprop.experiments.plan import Comparison
from bioprop.experiments.processes import ask
from tests.experiments.runs import LENET, TINY, compare, write_config
from tests.test_cli import in_empty_folder

__all__ = ["in_empty_folder"]  # the fixture


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        (["--trainer.max_epochs", "3"], "--trainer.max_epochs behind -- would be ignored, .*: change --epochs"),
        (["--trainer.max_epochs=3"], "change --epochs, or leave it out"),
        (["--seed_everything", "7"], "--seed_everything behind -- would be ignored, .*: --seeds N runs the seeds 0 to"),
        (["--data.seed=1", "--seed_everything=7"], "--seeds N"),
        (["--trainer.logger=false"], "writes metrics.csv below --folder"),
        (["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"], "--trainer.logger behind -- would be ignored"),
        (["--trainer.enable_progress_bar=true"], "--folder holds a log.txt of each run"),
        (["--trainer.enable_model_summary", "true"], "--folder holds a log.txt of each run"),
    ],
)
def test_options_of_runs_that_a_comparison_sets_itself_are_refused(option: list[str], instead: str) -> None:
    with pytest.raises(UserError, match=instead):
        compare(Path("out"), "--algorithms=backprop", *LENET, "--epochs=1", options=option)
    assert not Path("out").exists()


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Comparison]:
    """The comparisons that would run; their runs are left out."""
    found: list[Comparison] = []
    monkeypatch.setattr(compare_module, "ask", lambda work, runs: iter(()))
    monkeypatch.setattr(compare_module, "_run", lambda comparison, *_: found.append(comparison) or 0)
    return found


def test_epochs_and_options_behind_the_dashes_hold_for_all_rows(parsed: list[Comparison]) -> None:
    options = ["--trainer.max_epochs=3", "--data.limit_train=None", f"--config={CONFIGS / 'smoke.yaml'}"]
    compare(Path("out"), "--algorithms=backprop,ldrl", *LENET, "--epochs=None", options=options)
    for settings in parsed[0].rows.values():
        assert settings["trainer"]["max_epochs"] == 3
        assert settings["data"]["init_args"]["limit_train"] is None
        assert settings["trainer"]["limit_train_batches"] == 2


@pytest.mark.parametrize("form", [["--folder=~/out"], ["--folder", "~/out"]])
def test_folder_and_files_are_found_in_the_home_folder(
    form: list[str], parsed: list[Comparison], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("home").mkdir()
    for name in "ab":
        write_config(Path(f"home/{name}.yaml"))
    assert main([*form, "--configs=~/a.yaml,~/b.yaml"]) == 0
    assert parsed[0].folder == tmp_path / "home" / "out"
    assert list(parsed[0].rows) == ["a", "b"]
    assert not Path("~").exists()


def test_the_folder_is_named_by_what_is_compared(parsed: list[Comparison], tmp_path: Path) -> None:
    main(["--algorithms=backprop", *LENET])
    write_config(Path("a.yaml"))
    main(["--configs=a.yaml"])
    assert [each.folder for each in parsed] == [
        tmp_path / "runs" / "compare_lenet_digits",
        tmp_path / "runs" / "compare",
    ]


@pytest.mark.parametrize("words", [["--folder=out", "--seeds=None"], ["--folder=out", "--seed=3"]])
def test_null_and_abbreviations_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, UserError)) as caught:
        main([*words, "--algorithms=backprop", *LENET])
    said = str(caught.value) if caught.type is UserError else capsys.readouterr().err
    assert any(each in said for each in ("seeds is None", "did you mean --seeds?"))


# -- rows named by class ---------------------------------------------------------------------------------------------

OWN = """
from torch import nn
from bioprop.algorithms import Backprop

class MyRule(Backprop):
    pass

class MyNet(nn.Sequential):
    def __init__(self, num_classes: int, hidden: int = 7):
        super().__init__(nn.Flatten(), nn.Linear(256, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
"""


@pytest.fixture
def own_module(in_empty_folder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compared.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own_module")
def test_algorithms_and_a_network_are_found_by_class(parsed: list[Comparison]) -> None:
    words = ["--algorithms=usf,compared.MyRule,Backprop", "--network=compared.MyNet", "--data=digits"]
    compare(Path("out"), *words, options=["--model.network.hidden=5"])
    rows = parsed[0].rows
    assert list(rows) == ["usf", "MyRule", "backprop"]
    for settings in rows.values():
        network = settings["model"]["init_args"]["network"]
        assert network["class_path"] == "compared.MyNet"
        assert network["init_args"]["hidden"] == 5
        assert settings["trainer"]["max_epochs"] == 12  # what the files for digits have
    assert rows["usf"]["model"]["init_args"]["rule"] == "usf"
    assert rows["MyRule"]["model"]["class_path"] == "compared.MyRule"
    rates = {name: row["model"]["init_args"]["optimizer"]["init_args"]["lr"] for name, row in rows.items()}
    assert rates["MyRule"] == 0.05  # the default of the class
    assert rates["backprop"] == 0.02  # of the file


def test_a_class_of_the_package_has_the_defaults_of_the_class_and_the_network_of_the_files(
    parsed: list[Comparison],
) -> None:
    compare(Path("out"), "--algorithms=ldrl,FixedWeightDTP", *LENET, options=[])
    ldrl, by_class = parsed[0].rows.values()
    assert by_class["model"]["class_path"].endswith(".FixedWeightDTP")
    assert by_class["model"]["init_args"]["network"] == ldrl["model"]["init_args"]["network"]
    assert by_class["data"] == ldrl["data"]


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--algorithms=ldrl", "--network=compared.MyNet", "--data=digits"], "needs a chain of stages, and MyNet is"),
        (["--algorithms=backprop,compared.Nope", *LENET], "module 'compared' has no attribute 'Nope'"),
        (["--algorithms=backprop,Nope", *LENET], "for lenet on digits there are "),
        (["--algorithms=LDRL,ldrl", *LENET], "ldrl is named twice"),
        (["--algorithms=backprop", "--network=compared.MyNet", "--data=nope"], "there are files for "),
    ],
)
def test_a_class_that_does_not_fit_is_refused(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, UserError)) as caught:
        compare(Path("out"), *words, options=[])
    assert sentence in (str(caught.value) if caught.type is UserError else capsys.readouterr().err)
    assert not Path("out").exists()


# -- costs -----------------------------------------------------------------------------------------------------------


def test_costs_are_measured_in_turns_and_what_cannot_be_is_left_out() -> None:
    config = write_config(Path("a.yaml"))
    runs = {
        "one": [f"--config={config}", *TINY],
        "broken": ["--config=nowhere.yaml"],
        "two": [f"--config={config}", *TINY],
    }
    *turns, costs = ask(worker.measure, runs)
    assert [name for name, _ in turns] == ["one", "two"] * (TURNS + 1)
    assert {name: len(each) for name, each in costs.turns.items()} == {"one": TURNS, "broken": 0, "two": TURNS}
    assert all(turn.step > 0.0 for turn in costs.turns["one"])
    assert costs.batches == 3
    assert {path.name for path in Path().rglob("*")} == {"a.yaml"}  # no run is left
