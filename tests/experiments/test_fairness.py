"""What a comparison refuses, before anything runs."""

from pathlib import Path

import pytest

from bioprop.errors import UserError
from bioprop.experiments.compare import main
from bioprop.experiments.configs import CONFIGS, resolve
from bioprop.experiments.fairness import check_alone, check_fair
from tests.experiments.runs import LENET, write_config

BACKPROP, LDRL = (CONFIGS / f"{name}_lenet_digits.yaml" for name in ("backprop", "ldrl"))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--trainer.max_epochs=13", r"trainer\.max_epochs is 12 for backprop and 13 for ldrl: --epochs N gives all"),
        ("--data.batch_size=32", r"data\.batch_size is 64 for backprop and 32 for ldrl: an option behind --"),
        ("--data.seed=1", r"data\.seed is 0 for backprop and 1 for ldrl"),
        ("--data.val_fraction=0.2", r"data\.val_fraction is 0\.1 for backprop and 0\.2 for ldrl"),
        ("--data.horizontal_flip=true", r"data\.horizontal_flip is False for backprop and True for ldrl"),
        ("--model.network.activation=tanh", r"model\.network\.activation is elu for backprop and tanh for ldrl"),
        ("--trainer.limit_train_batches=2", r"trainer\.limit_train_batches is None for backprop and 2 for ldrl"),
        ("--trainer.precision=64-true", r"trainer\.precision is None for backprop and 64-true for ldrl"),
        ("--alignment.max_images=7", r"alignment\.max_images is 256 for backprop and 7 for ldrl"),
        ("--trainer.callbacks=EarlyStopping", r"trainer\.callbacks is None for backprop and "),
        ("--checkpoint.every_n_batches=2", r"checkpoint\.every_n_batches is 0 for backprop and 2 for ldrl"),
    ],
)
def test_rows_that_differ_in_more_than_the_algorithm_are_refused(option: str, named: str) -> None:
    extra = ["--trainer.callbacks.monitor=val/loss"] if "EarlyStopping" in option else []
    rows = {"backprop": resolve(BACKPROP, []), "ldrl": resolve(LDRL, [option, *extra])}

    with pytest.raises(UserError, match=f"^backprop and ldrl cannot be compared: {named}"):
        check_fair(rows)


def test_another_network_is_named_by_its_class() -> None:
    rows = {"one": resolve(BACKPROP, []), "other": resolve(CONFIGS / "backprop_invertiblemlp_digits.yaml", [])}

    with pytest.raises(UserError, match=r"model\.network is LeNet for one and InvertibleMLP for other"):
        check_fair(rows)


def test_optimizers_schedules_seeds_and_hyperparameters_may_differ() -> None:
    schedule = ["--model.scheduler=torch.optim.lr_scheduler.StepLR", "--model.scheduler.step_size=3"]
    one = resolve(BACKPROP, [])
    other = resolve(LDRL, ["--model.optimizer=Adam", *schedule, "--seed_everything=4", "--model.beta=0.9"])

    check_fair({"one": one, "other": other})


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--checkpoint.monitor=val/loss", "checkpoint.monitor val/loss, but every row's checkpoint is chosen alike"),
        ("--checkpoint.monitor=test/accuracy", "checkpoint.monitor test/accuracy"),
        ("--checkpoint.mode=min", "checkpoint.mode min"),
        ("--trainer.devices=2", "trainer.devices 2"),
        ("--trainer.logger=CSVLogger", "trainer.logger to CSVLogger"),
        ("--ckpt_path=some.ckpt", "ckpt_path to some.ckpt"),
        ("--trainer.fast_dev_run=true", "trainer.fast_dev_run to True"),
        ("--trainer.max_epochs=-1", "trainer.max_epochs -1"),
        ("--trainer.limit_val_batches=0", "trainer.limit_val_batches 0"),
    ],
)
def test_a_row_that_no_comparison_can_hold_is_refused(option: str, named: str) -> None:
    extra = ["--trainer.logger.save_dir=here"] if "logger" in option else []

    with pytest.raises(UserError) as refused:
        check_alone("row", resolve(BACKPROP, [option, *extra]))
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--algorithms=backprop,nope", *LENET], "there is no lightning_configs/nope_lenet_digits.yaml: for lenet on"),
        (["--algorithms=backprop", "--network=foo", "--data=digits"], "there are files for "),
        (["--algorithms=backprop"], "--algorithms needs --network and --data"),
        (["--algorithms=[]", *LENET], "there is nothing to compare"),
        (["--algorithms=[backprop,ldrl,backprop]", *LENET], "backprop is named twice"),
        (["--configs=nothere.yaml"], "--configs: nothere.yaml: there is no such file"),
        (["--configs=a.yaml", "--algorithms=backprop"], "--configs names whole files"),
        (["--algorithms=backprop", *LENET, "--seeds=0"], "--seeds is 0, but it must be from 1 to 1000"),
        (["--algorithms=backprop", *LENET, "--epochs=0"], "--epochs is 0, but it must be at least 1"),
        (["--algorithms=backprop", *LENET, "--parallel=0"], "--parallel is 0, but it must be at least 1"),
        (
            ["--algorithms=backprop", *LENET, "--equal_time=0"],
            "--equal_time is 0.0, but it must be a number of seconds",
        ),
        (
            ["--algorithms=backprop", *LENET, "--equal_time=9", "--epochs=2"],
            "--equal_time decides the number of epochs",
        ),
        (["--algorithms=backprop", *LENET, "--lr_factors=0,1"], "--lr_factors is 0,1, but it must be different"),
        (["--algorithms=backprop", *LENET, "--lr_factors=1,1"], "--lr_factors is 1,1, but it must be different"),
        (["--algorithms=backprop", *LENET, "--folder=file"], "file is a file"),
        (["--algorithms=backprop", *LENET, "--folder=file/below"], "file/below: Not a directory"),
        (["--algorithms=backprop", *LENET, "--folder=full"], "full holds other files"),
        ([*LENET, "--", "--data.batch_size=0"], "backprop: batch_size is 0"),  # of the standard ones
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(words: list[str], named: str) -> None:
    Path("file").touch()
    Path("full").mkdir()
    Path("full/something").touch()
    folder = [] if any("--folder" in word for word in words) else ["--folder=out"]

    with pytest.raises(UserError) as refused:
        main([*folder, *words])
    assert named in str(refused.value)
    assert {path.name for path in Path().rglob("*")} == {"file", "full", "something"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--folder=out", "--sedes=3"], "there is no option --sedes: did you mean --seeds?"),
        (["--folder=out", "--seeds=x"], "seeds is x, but it must be a whole number"),
        (
            ["--folder=out", "--algorithms=backprop", *LENET, "--", "--data.batchsize=3"],
            "there is no argument batchsize in this place: did you mean batch_size?",
        ),
    ],
)
def test_words_that_do_not_parse_exit_with_2(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1


def test_two_files_of_the_same_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    first, second = write_config(tmp_path / "a.yaml"), write_config(tmp_path / "sub" / "a.yaml")

    with pytest.raises(UserError, match="a is named twice"):
        main([f"--configs={first},{second}", "--folder=out"])


def test_help_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--lr_factors" in text
    assert "results folder: table.md" in text
    assert "must be the same in all rows" in text
    assert "--command" not in text


def test_the_files_of_the_target_propagation_table_can_be_compared() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "target_propagation"
    shared = ["--config", str(folder / "shared.yaml")]
    names = sorted(path for path in folder.glob("*.yaml") if path.stem != "shared")
    rows = {path.stem: resolve(path, shared) for path in names}

    assert len(rows) == 10
    check_fair(rows)
    for name, settings in rows.items():
        check_alone(name, settings)
