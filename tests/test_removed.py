"""Options that are gone: one sentence that says what took their place, in Python, on the command line, from files."""

from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import torch

from bioprop.algorithms import LDRL, ParallelLDRL
from bioprop.cli import main
from bioprop.feedback.speed import Speed
from bioprop.removed import MOVED, REMOVED
from bioprop.testing.helpers import refused, small_lenet
from tests.test_cli import LDRL_TINY, in_empty_folder

__all__ = ["in_empty_folder"]  # the fixture
SECOND_NOISE = REMOVED["sampling"]
NO_COMPILER = REMOVED["speed.compile"]


def test_the_sentences_name_what_to_use_instead() -> None:
    assert "second_noise, one of independent (as published), expected or echo" in SECOND_NOISE
    assert "leave it out" in NO_COMPILER


@pytest.mark.parametrize("algorithm", [LDRL, ParallelLDRL])
@pytest.mark.parametrize("value", ["independent", "antithetic", "expected"])
def test_python_hears_of_sampling(algorithm: type[LDRL], value: str) -> None:
    with refused(SECOND_NOISE):
        algorithm(small_lenet(), sampling=value)


@pytest.mark.parametrize("make", [lambda **given: LDRL(small_lenet(), **given), Speed])
def test_an_argument_that_never_was_is_pythons_own_error(make: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'smapling'"):
        make(smapling="expected")


FILES = {
    "sampling.yaml": "model:\n  class_path: LDRL\n  init_args:\n    sampling: expected\n",
    "compile.yaml": "model:\n  class_path: LDRL\n  init_args:\n    speed:\n      compile: true\n",
}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model.sampling=expected"], SECOND_NOISE),
        (["--model.sampling", "antithetic"], SECOND_NOISE),
        (["--model.init_args.sampling=independent"], SECOND_NOISE),
        (["--config=sampling.yaml"], SECOND_NOISE),
        (["--model.speed.compile=true"], NO_COMPILER),
        (["--model.speed.compile", "false"], NO_COMPILER),
        (['--model.speed={"compile": true}'], NO_COMPILER),
        (["--config=compile.yaml"], NO_COMPILER),
    ],
)
def test_the_command_line_exits_with_the_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in FILES.items():
        Path(name).write_text(text)
    with pytest.raises(SystemExit) as left:
        main(["fit", *LDRL_TINY, *arguments])
    assert left.value.code == 2
    file = next((f"{word.partition('=')[2]}: " for word in arguments if word.startswith("--config=")), "")
    assert capsys.readouterr().err.splitlines()[-1] == f"bioprop: error: {file}{sentence}"


@pytest.mark.parametrize("name", MOVED)
def test_a_former_place_of_a_class_is_answered_by_the_present_one(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert locate(MOVED[name]) is not None
    with pytest.raises(SystemExit):
        main(["fit", *LDRL_TINY, f"--trainer.logger={name}", "--trainer.logger.save_dir=runs"])
    assert f"logger is {name}, which is {MOVED[name]} now: write that" in capsys.readouterr().err


def test_other_options_of_a_group_are_named_with_the_nearest_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    Path("speed.yaml").write_text("model:\n  class_path: LDRL\n  init_args:\n    speed:\n      bfloat: true\n")
    with pytest.raises(SystemExit):
        main(["fit", *LDRL_TINY, "--config=speed.yaml"])
    assert "no option --model.speed.bfloat: did you mean --model.speed.bfloat16?" in capsys.readouterr().err


def test_a_checkpoint_with_sampling_is_neither_rebuilt_nor_resumed() -> None:
    """Its weights alone, in a network of today, may still be tested."""
    trained = main(["fit", *LDRL_TINY, "--trainer.max_epochs=1"])
    content = torch.load(trained.trainer.checkpoint_callback.last_model_path, weights_only=True)
    assert not any(name.rpartition(".")[2] in content["hyper_parameters"] for name in REMOVED)
    content["hyper_parameters"]["sampling"] = "expected"
    torch.save(content, "old.ckpt")
    with refused(SECOND_NOISE):
        LDRL.load_from_checkpoint("old.ckpt")
    with refused(SECOND_NOISE):
        main(["fit", *LDRL_TINY, "--trainer.max_epochs=2", "--ckpt_path=old.ckpt"])
    assert "test/loss" in main(["test", *LDRL_TINY, "--ckpt_path=old.ckpt"]).trainer.callback_metrics
