"""What the command line understands: order, abbreviations, null, home folders, and files that are no options."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bioprop.cli import main
from bioprop.errors import UserError
from bioprop.experiments.configs import CONFIGS, ParsingCLI
from tests.test_cli import LDRL_TINY, in_empty_folder

__all__ = ["in_empty_folder"]  # the fixture
CONFIG = f"--config={CONFIGS / 'dtp_mlp_digits.yaml'}"
SMOKE = f"--config={CONFIGS / 'smoke.yaml'}"


def parsed(*words: str, command: str = "fit") -> dict[str, Any]:
    """The settings of a command, or of ``fit``, without running it."""
    cli = main([command, *words], ParsingCLI)
    assert isinstance(cli, ParsingCLI)
    return cli.settings


def said(capsys: pytest.CaptureFixture[str], *words: str, command: str = "fit") -> str:
    """The one sentence with which the arguments are refused."""
    with pytest.raises((SystemExit, UserError)) as caught:
        main([command, *words], ParsingCLI)
    sentence = str(caught.value) if caught.type is UserError else capsys.readouterr().err.strip()
    assert caught.type is UserError or caught.value.code == 2
    assert len(sentence.splitlines()) == 1
    assert "Traceback" not in sentence
    return sentence


# -- order and abbreviations -----------------------------------------------------------------------------------------


def at(settings: dict[str, Any], key: str) -> Any:
    """The value of a dotted name."""
    value: Any = settings
    for part in key.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--trainer.max_epochs=2", CONFIG], "trainer.max_epochs", 2),
        (["--trainer.max_epochs", "2", "-c", CONFIG.removeprefix("--config=")], "trainer.max_epochs", 2),
        (["--seed_everything", "3", CONFIG, SMOKE], "seed_everything", 3),
        ([CONFIG, "--data.batch_size=5", SMOKE], "data.init_args.batch_size", 5),
        (["--model.beta", "0.7", CONFIG], "model.init_args.beta", 0.7),
        (["--model.network.hidden=[9]", CONFIG], "model.init_args.network.init_args.hidden", [9]),
        (["--model.optimizer.lr=0.5", CONFIG, "--model.optimizer=SGD"], "model.init_args.optimizer.init_args.lr", 0.5),
        (["--data.batch_size=7", "--data=MNIST", CONFIG], "data.init_args.batch_size", 7),
        (["--model=LDRL", CONFIG], "model.class_path", "bioprop.algorithms.LDRL"),
        (["--model.beta=0.7", "--model=LDRL", "--model.network=LeNet", "--data=Digits"], "model.init_args.beta", 0.7),
    ],
)
def test_options_hold_wherever_they_are_written(words: list[str], key: str, value: Any) -> None:
    assert at(parsed(*words), key) == value


def test_of_several_files_and_of_the_same_option_twice_the_last_holds() -> None:
    Path("long.yaml").write_text("trainer:\n  max_epochs: 90\n")
    assert parsed(CONFIG, SMOKE, "--config=long.yaml")["trainer"]["max_epochs"] == 90
    assert parsed(CONFIG, "--config=long.yaml", SMOKE)["trainer"]["max_epochs"] == 1
    assert parsed("--trainer.max_epochs=3", CONFIG, "--trainer.max_epochs=4")["trainer"]["max_epochs"] == 4


def test_a_file_of_arguments_before_the_one_that_names_their_class_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sentence = said(capsys, SMOKE, CONFIG)
    assert "smoke.yaml: data is given arguments before its class: name that in the same file, or in one" in sentence


def test_arguments_of_list_entries_stay_with_their_entries() -> None:
    entries = ["EarlyStopping", "LearningRateMonitor"]
    words = [f"--trainer.callbacks+={entries[0]}", "--trainer.callbacks.monitor=val/loss"]
    settings = parsed(*words, f"--trainer.callbacks+={entries[1]}", CONFIG)
    callbacks = settings["trainer"]["callbacks"]
    assert [each["class_path"].rpartition(".")[2] for each in callbacks] == entries
    assert callbacks[0]["init_args"]["monitor"] == "val/loss"


def test_a_class_that_is_named_again_replaces_the_first_and_its_arguments() -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x", "--trainer.logger=false"]
    assert parsed(CONFIG, *logger)["trainer"]["logger"] is False
    named = ["--data=MNIST", "--data.data_dir=x", "--data.batch_size=7", "--data=Digits"]
    settings = parsed(CONFIG, *named)["data"]
    assert settings["class_path"] == "bioprop.datamodules.Digits"
    assert settings["init_args"]["batch_size"] == 7


def test_an_argument_that_a_class_named_later_lacks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no argument noise" in said(capsys, CONFIG, "--model.noise=0.3", "--model=Backprop")


@pytest.mark.parametrize(
    ("option", "whole"),
    [
        ("--trainer.max_epoch=3", "--trainer.max_epochs"),
        ("--seed=3", "--seed_everything"),
        ("--ckpt=last", "--ckpt_path"),
        ("--conf=x.yaml", "--config"),
        ("--checkpoint.every_n=3", "--checkpoint.every_n_batches"),
        ("--model.speed.bfloat=true", "--model.speed.bfloat16"),
        ("--data.limit_trai=3", "limit_train"),
    ],
)
def test_an_abbreviation_is_refused_with_the_whole_name(
    option: str, whole: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"did you mean {whole}?" in said(capsys, CONFIG, option)


# -- null ------------------------------------------------------------------------------------------------------------

OPTIONAL = [
    "data.init_args.limit_train",
    "checkpoint.dirpath",
    "model.init_args.scheduler",
    "trainer.max_epochs",
    "trainer.precision",
    "trainer.limit_train_batches",
    "trainer.default_root_dir",
    "trainer.logger",
    "trainer.max_time",
    "alignment.gauss_newton_damping",
    "ckpt_path",
]


@pytest.mark.parametrize("key", OPTIONAL)
def test_none_is_null_for_every_optional_argument(key: str) -> None:
    option = key.replace(".init_args", "")
    for words in ([f"--{option}=None"], [f"--{key}", "null"]):
        assert at(parsed(CONFIG, "--data.limit_train=9", *words), key) is None


def test_none_is_null_in_nested_classes_and_files_too() -> None:
    logger = ["--trainer.logger=WandbLogger", "--trainer.logger.project=None", "--trainer.logger.notes", "None"]
    arguments = parsed(CONFIG, *logger)["trainer"]["logger"]["init_args"]
    assert arguments["project"] is arguments["notes"] is None
    Path("none.yaml").write_text("data:\n  init_args:\n    limit_train: None\ncheckpoint:\n  dirpath: None\n")
    settings = parsed(CONFIG, SMOKE, "--config=none.yaml")
    assert settings["data"]["init_args"]["limit_train"] is settings["checkpoint"]["dirpath"] is None
    given = parsed(CONFIG, '--data={"class_path": "Digits", "init_args": {"limit_val": None}}')
    assert given["data"]["init_args"]["limit_val"] is None


# -- home folders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--trainer.default_root_dir=~/x"], "trainer.default_root_dir"),
        (["--trainer.default_root_dir", "~/x"], "trainer.default_root_dir"),
        (["--checkpoint.dirpath=~/x"], "checkpoint.dirpath"),
        (["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=~/x"], "trainer.logger.init_args.save_dir"),
        (["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=~/x"], "trainer.logger.init_args.save_dir"),
        (["--trainer.logger=WandbLogger", "--trainer.logger.save_dir=~/x"], "trainer.logger.init_args.save_dir"),
        (["--trainer.profiler=SimpleProfiler", "--trainer.profiler.dirpath=~/x"], "trainer.profiler.init_args.dirpath"),
        (["--data=ImageFolder", "--data.data_dir=~/x"], "data.init_args.data_dir"),
        (["--ckpt_path=~/x"], "ckpt_path"),
        (["--config=home.yaml"], "trainer.default_root_dir"),
        (["--config=~/x.yaml"], "trainer.default_root_dir"),
    ],
)
def test_the_home_folder_is_spelt_out_in_every_path(words: list[str], key: str, home: Path) -> None:
    home.mkdir()
    for path in (Path("home.yaml"), home / "x.yaml"):
        path.write_text("trainer:\n  default_root_dir: ~/x\n")
    assert at(parsed(CONFIG, *words), key) == str(home / "x")


def test_the_home_folder_is_spelt_out_in_lists(home: Path) -> None:
    Path("two.yaml").write_text(
        "trainer:\n  logger:\n"
        "  - {class_path: CSVLogger, init_args: {save_dir: ~/a}}\n"
        "  - {class_path: CSVLogger, init_args: {save_dir: ~/b}}\n"
    )
    words = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=~/c"]
    trainer = parsed(CONFIG, "--config=two.yaml", *words)["trainer"]
    assert [each["init_args"]["save_dir"] for each in trainer["logger"]] == [str(home / "a"), str(home / "b")]
    assert trainer["callbacks"][0]["init_args"]["dirpath"] == str(home / "c")


def test_a_whole_run_below_the_home_folder_leaves_no_folder_of_that_sign(home: Path) -> None:
    main(["fit", *LDRL_TINY, "--trainer.max_epochs=1", "--trainer.default_root_dir=~/x", "--checkpoint.dirpath=~/y"])
    assert (home / "x" / "ldrl_lenet_digits" / "version_0" / "config.yaml").is_file()
    assert (home / "y" / "last.ckpt").is_file()
    assert not Path("~").exists()


def test_a_home_folder_of_nobody_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = said(capsys, CONFIG, "--trainer.default_root_dir=~nobody_of_this_name/x")
    assert sentence.startswith("default_root_dir is ~nobody_of_this_name/x, but nobody of that name has a home here")


# -- files -----------------------------------------------------------------------------------------------------------

OPTIONS = "# für mich\ntrainer:\n  max_epochs: 7\n"
NO_TEXT = "a file of options must be text in UTF-8, and this is not (a checkpoint is given by --ckpt_path)"
NO_OPTIONS = "this file gives no options by name, such as trainer: {max_epochs: 3}"


def write_files() -> None:
    """Write files that are no good options."""
    Path("latin.yaml").write_bytes(OPTIONS.encode("latin-1"))
    Path("utf16.yaml").write_bytes(OPTIONS.encode("utf-16"))
    Path("utf16le.yaml").write_bytes("trainer: {max_epochs: 7}".encode("utf-16-le"))
    Path("noise.yaml").write_bytes(bytes(range(128, 256)))
    torch.save({"state_dict": {}}, "a.ckpt")
    Path("folder.yaml").mkdir()
    for name, text in {
        "empty": "",
        "comment": "# nothing\n",
        "list": "- a\n- b\n",
        "text": "max epochs 3\n",
        "number": "3\n",
        "tab": "model:\n\tclass_path: LDRL\n",
        "nothing": "trainer:\n",
        "scalar": "trainer: 3\n",
        "value": "trainer:\n  max_epochs: many\n",
        "key": "trainer:\n  max_epoch: 3\n",
        "section": "trainr:\n  max_epochs: 3\n",
        "argument": "model:\n  init_args:\n    bet: 3\n",
    }.items():
        Path(f"{name}.yaml").write_text(text)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("latin.yaml", NO_TEXT),
        ("utf16.yaml", NO_TEXT),
        ("utf16le.yaml", "this file of options is not valid YAML"),
        ("noise.yaml", NO_TEXT),
        ("a.ckpt", NO_TEXT),
        ("folder.yaml", "it is not a file"),
        ("empty.yaml", NO_OPTIONS),
        ("comment.yaml", NO_OPTIONS),
        ("list.yaml", NO_OPTIONS),
        ("text.yaml", NO_OPTIONS),
        ("number.yaml", NO_OPTIONS),
        ("tab.yaml", "this file of options is not valid YAML, at line 2"),
        ("nothing.yaml", NO_OPTIONS),
        ("scalar.yaml", "trainer is 3, but it takes a file of its settings by name"),
        ("value.yaml", "max_epochs is many, but it must be a whole number"),
        ("key.yaml", "there is no option --trainer.max_epoch: did you mean --trainer.max_epochs?"),
        ("section.yaml", "there is no option --trainr.max_epochs: did you mean --trainer.max_epochs?"),
        ("argument.yaml", "there is no argument bet in this place: did you mean beta?"),
        ("nowhere.yaml", "there is no such file"),
    ],
)
def test_of_several_files_the_bad_one_is_named(file: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_files()
    sentence = said(capsys, CONFIG, f"--config={file}", SMOKE)
    assert reason in sentence
    # misspelt options show when all files are read
    assert f"{file}: " in sentence or "there is no option" in sentence


@pytest.mark.parametrize("option", ["model", "model.network", "model.optimizer", "data", "trainer", "trainer.logger"])
@pytest.mark.parametrize("file", ["latin.yaml", "a.ckpt"])
def test_a_file_of_a_part_of_the_options_is_refused_too(
    option: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files()
    assert NO_TEXT in said(capsys, CONFIG, f"--{option}={file}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_in_utf_8_is_read_however_it_was_saved(encoding: str, end: str) -> None:
    Path("fine.yaml").write_bytes(OPTIONS.replace("\n", end).encode(encoding))
    assert parsed(CONFIG, "--config=fine.yaml")["trainer"]["max_epochs"] == 7


def test_sections_whose_entries_are_all_commented_out_say_nothing() -> None:
    Path("bare.yaml").write_text("seed_everything: 4\ntrainer:\n#  max_epochs: 3\ndata:\nmodel:\n  init_args:\n")
    settings = parsed(CONFIG, "--config=bare.yaml")
    assert (settings["seed_everything"], settings["trainer"]["max_epochs"]) == (4, 12)
