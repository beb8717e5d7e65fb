"""Sentences name the word that is wrong, the reason, and what works."""

from pathlib import Path

import pytest

from bioprop.cli import main
from bioprop.cli_messages import explain
from bioprop.errors import UserError
from tests.test_cli import LDRL_TINY, in_empty_folder
from tests.test_cli_parser import CONFIG, said

__all__ = ["in_empty_folder"]  # the fixture


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.scheduler=CosineAnnealing"], "scheduler is CosineAnnealing, which is not a class that can be used "),
        (["--model.scheduler=CosineAnnealing"], "did you mean CosineAnnealingLR? They are ChainedScheduler, "),
        (
            ["--model.scheduler=ReduceLROnPlateau"],
            "must be named in full here: pytorch_lightning.cli.ReduceLROnPlateau",
        ),
        (["--model.scheduler=3"], "scheduler is 3, which is not a class that can be used here: choose one of Chained"),
        (["--model.scheduler=torch.optim.lr_scheduler.Nope"], "'torch.optim.lr_scheduler' has no attribute 'Nope'"),
        (["--model.optimizer=Addam"], "did you mean Adam?"),
        (["--model.optimizer=5"], "optimizer is 5, which is not a class that can be used here: choose one of ASGD"),
        (["--model.optimizer=torch.nn.Linear"], "torch.nn.Linear, which is no subclass of torch.optim.optimizer.Opti"),
        (
            ["--model.network=torch.nn.Linear"],
            "needs a chain of stages, and Linear is none: make it a bioprop.networks.",
        ),
        (["--model=torch.nn.Linear"], "torch.nn.Linear, which is no subclass of bioprop.algorithms.base.Algorithm"),
        (["--trainer.logger=torch.nn.ReLU"], "no subclass of pytorch_lightning.loggers.logger.Logger"),
        (["--trainer.callbacks+=torch.nn.ReLU"], "no subclass of pytorch_lightning.callbacks.callback.Callback"),
        (["--trainer.logger=CSVLoger"], "did you mean CSVLogger?"),
        (["--trainer.callbacks=5"], "callbacks is 5, which is not a class that can be used here: choose one of "),
        (["--data=bioprop.networks.LeNet"], "LeNet, which is no subclass of bioprop.datamodules.base.ImageDataModule"),
    ],
)
def test_a_wrong_class_is_named_with_the_right_ones(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in said(capsys, CONFIG, *words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.optimizer.lr=fast"], "lr is fast, but it must be a number"),
        (["--model.optimizer.lr=1,5"], "lr is 1,5, but it must be a number"),
        (["--model.optimizer.lr=[1]"], "lr is [1], but it must be a number"),
        (["--model.optimizer.betas=fast"], "betas is fast, but it must be a list [a, b, ...]"),
        (["--data.batch_size="], "batch_size is empty, but it must be a whole number"),
        (["--model.speed=fast"], "speed is fast, but it takes a file of its settings by name"),
        (["--trainer=5"], "trainer is 5, but it takes a file of its settings by name"),
        (["--model.scheduler.step_size=3"], "there is no argument step_size in this place: "),
        (
            ["--trainer.logger.save_dir=x"],
            "save_dir belongs to a class that is not named: name it, too, as in --trainer",
        ),
        (
            ["--model.network.hidden", "[64]", "64"],
            "64 belongs to no option: each has one value, a list is written [a,b]",
        ),
    ],
)
def test_a_wrong_value_is_named_with_the_right_kind(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in said(capsys, CONFIG, *words)


@pytest.mark.parametrize(
    "option",
    ["data.batch_size", "model.beta", "model.optimizer.lr", "trainer.max_epochs", "model", "ckpt_path", "config"],
)
def test_an_option_without_a_value_is_named(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([f"--{option}"], [f"--{option}", "--data.seed", "3"]):
        assert f"error: --{option} needs a value behind it" in said(capsys, CONFIG, "--data=Digits", *words)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_what_is_missing_is_named_without_the_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    both = "error: data and model must be given: use a --config file, or for example --data Digits --model LDRL"
    assert both in said(capsys, "--ckpt_path=x.ckpt", command=command)
    assert "error: model must be given: " in said(capsys, "--data=Digits", command=command)
    assert "--model.network belongs to a class that is not named" in said(
        capsys, "--model.network=MLP", command=command
    )


OWN = {
    "syntax": ("class Mine(Backprop)\n", "cannot be imported: SyntaxError: expected ':' (syntax.py, line 2)"),
    "names": ("class Mine(Nope): pass\n", "NameError: name 'Nope' is not defined, at names.py line 2"),
    "attributes": ("class Mine(Backprop.x): pass\n", "has no attribute 'x', at attributes.py line 2"),
    "imports": ("from bioprop.algorithms import Nope\n", "ImportError: cannot import name 'Nope' from 'bioprop.algo"),
    "missing": (
        "import not_there\n",
        "ModuleNotFoundError: No module named 'not_there', at missing.py line 2",
    ),
    "other": ("Other = Backprop\n", "other.Mine, which is not found from here: module 'other' has no attribute 'Mine'"),
    "abstract": ("class Mine(Algorithm): pass\n", "which cannot be used before it defines _gradients"),
    "targets": ("class Mine(TargetAlgorithm): pass\n", "cannot be used before it defines __init__"),
    "unrelated": ("class Mine: pass\n", "which is no subclass of bioprop.algorithms.base.Algorithm"),
    "function": ("def Mine(): pass\n", "which is a function, not a class"),
}


@pytest.mark.parametrize("module", OWN)
@pytest.mark.parametrize("by_file", [False, True])
def test_the_fault_of_an_own_module_is_shown(
    module: str, by_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    text, sentence = OWN[module]
    Path(f"{module}.py").write_text(f"from bioprop.algorithms import Algorithm, Backprop, TargetAlgorithm\n{text}")
    Path("mine.yaml").write_text(f"model:\n  class_path: {module}.Mine\n")
    assert sentence in said(capsys, CONFIG, "--config=mine.yaml" if by_file else f"--model={module}.Mine")


def test_an_own_data_module_that_lacks_something_is_told_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_data.py").write_text(
        "from bioprop.datamodules import ImageDataModule\nclass Mine(ImageDataModule): ...\n"
    )
    assert "cannot be used before it defines _decode, _labels" in said(capsys, CONFIG, "--data=own_data.Mine")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--trainer.gradient_clip_val=-1", "gradient_clip_val is -1, but it must be above 0"),
        ("--trainer.accumulate_grad_batches=4", "leave it out, and raise data.batch_size"),
    ],
)
def test_what_cannot_be_done_to_gradients_is_refused_with_advice_that_can_be_followed(
    option: str, sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        main(["fit", *LDRL_TINY, option])
    assert sentence in str(caught.value)
    assert "automatic optimization" not in str(caught.value)
    assert not Path("runs").exists()


def test_unforeseen_report_of_the_parser_still_becomes_one_line() -> None:
    assert explain("Something\n  odd\nhappened") == "Something odd happened"
