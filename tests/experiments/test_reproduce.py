"""Named reproductions: complete, fair, and run on small files of the published formats."""

from pathlib import Path

import pytest

from bioprop.cli import main as run
from bioprop.errors import UserError
from bioprop.experiments import reproduce as module
from bioprop.experiments.configs import Row, resolve
from bioprop.experiments.fairness import check_alone, check_fair
from bioprop.experiments.plan import Comparison
from bioprop.experiments.reproduce import Expected, Reproduction, judge, load, main, names
from bioprop.experiments.results import Result, Test
from tests.datamodules.published_files import write_cifar, write_mnist
from tests.test_cli import in_empty_folder

__all__ = ["in_empty_folder"]  # the fixture


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_the_rows_of_a_reproduction_can_be_compared(name: str) -> None:
    reproduction = load(name)
    rows = {row: resolve(each.config, each.options) for row, each in reproduction.rows.items()}
    for row, settings in rows.items():
        check_alone(row, settings)
    check_fair(rows)
    assert reproduction.expected
    assert set(reproduction.expected) <= set(rows)
    for each in reproduction.expected.values():
        assert 0 < each.low < each.published < each.high < 100
    assert reproduction.reproduced


SMALL = ("--data.data_dir=files", "--data.batch_size=10", "--trainer.fast_dev_run=1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kao_mnist", "ernoult_mnist_lenet", "dfc_fashionmnist"])
def test_every_row_trains_on_small_files_of_the_format(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(Path("files"), monkeypatch, "FashionMNIST" if "fashion" in name else "MNIST")
    for row in load(name).rows.values():
        fast = ["--model.iterations=1"] if "ldrl" in row.config.name else []
        run(["fit", f"--config={row.config}", *row.options, *SMALL, *fast])


@pytest.mark.slow
def test_every_row_trains_on_small_files_of_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(Path("files"), monkeypatch, "CIFAR10")
    for row in load("akrout_cifar10").rows.values():
        run(["fit", f"--config={row.config}", *row.options, *SMALL])


def test_figures_are_held_against_their_ranges(tmp_path: Path) -> None:
    rows = {"backprop": Row(Path("a")), "ldrl": Row(Path("b")), "fa": Row(Path("c"))}
    expected = {"backprop": Expected(90, 91, 92), "ldrl": Expected(90, 91, 92), "fa": Expected(90, 91, 92)}
    comparison = Comparison(tmp_path, {row: {} for row in rows}, dict.fromkeys(rows, 2))
    for row, accuracies in (("backprop", (0.905, 0.925)), ("ldrl", (0.905, 0.945))):
        for run_, accuracy in zip(comparison.runs(row), accuracies, strict=True):
            Result("finished").save(run_.folder)
            Test(accuracy, 10).save(run_.folder)
    judged = judge(comparison, Reproduction("", 2, "not run", rows, expected))
    assert [(row["algorithm"], row["n"], row["test accuracy, %"], row["in range"]) for row in judged] == [
        ("BP", "2", "91.50", "yes"),
        ("L-DRL", "2", "92.50", "no"),
        ("FA", "0", "-", "no"),
    ]


def test_a_reproduction_is_run_and_judged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    full = load("dfc_mnist")
    one = full._replace(rows={"backprop": full.rows["backprop"]}, expected={"backprop": Expected(0, 50, 100)})
    monkeypatch.setattr(module, "load", lambda name: one)
    small = ["--data=Digits", "--model.network.hidden=[8]", "--data.limit_train=64", "--trainer.max_epochs=1"]
    assert main(["dfc_mnist", "--seeds=1", "--", *small, "--model.scheduler.T_max=1"]) == 0
    said = capsys.readouterr().out
    assert "dfc_mnist: Meulemans et al. (NeurIPS 2021), n = 5" in said
    assert "0 to 100" in said
    assert Path("runs/reproduce_dfc_mnist/table.md").is_file()


def test_the_list_has_all_and_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names())
    for words, sentence in (
        (["ernoult"], "there is no reproduction 'ernoult': choose one of akrout_cifar10, "),
        ([], "there is no reproduction ''"),
        (["dfc_mnist", "--seeds=0"], "--seeds is 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            main(words)
