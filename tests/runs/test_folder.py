"""What keeps a run: a folder that nobody else writes into, found again under any name, and a record that is true."""

import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning import Trainer

from bioprop.cli import main
from bioprop.datamodules import Digits
from bioprop.errors import UserError
from bioprop.runs import RunCheckpoints, lock
from bioprop.runs.metrics import MetricsFile
from bioprop.testing.helpers import KilledError
from bioprop.testing.resuming import differences, read_metrics
from tests.runs.test_checkpoint_faults import BATCHES, TINY, step_of
from tests.runs.test_resuming import backprop

RUNS = Path("runs/backprop_lenet_digits")
RUN = RUNS / "version_0"
LAST = RUN / "checkpoints" / "last.ckpt"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(command: str, *arguments: str) -> Trainer:
    return main([command, *TINY, *arguments]).trainer


def fit(*arguments: str, epochs: int = 1) -> Trainer:
    return run("fit", f"--trainer.max_epochs={epochs}", *arguments)


def killed(*arguments: str, at: int) -> None:
    kill = ["--trainer.callbacks+=bioprop.testing.helpers.KillAfter", f"--trainer.callbacks.batches={at}"]
    with pytest.raises(KilledError):
        fit(*arguments, *kill, epochs=2)


def settings(folder: Path = RUN) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return read


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@contextmanager
def nothing_is_replaced() -> Iterator[None]:
    before = contents()
    yield
    after = contents()
    assert {path: after.get(path) for path in before} == before


# -- nothing a run writes replaces a file it did not write -----------------------------------------------------------


def test_runs_without_a_logger_leave_the_users_files_and_each_other_alone() -> None:
    Path("config.yaml").write_text("model:\n  class_path: Backprop\n")
    with nothing_is_replaced():
        fit("--config=config.yaml", "--trainer.logger=false")
    with nothing_is_replaced():
        fit("--trainer.logger=false")
        run("test", "--trainer.logger=false", "--ckpt_path=best")
        run("predict", "--trainer.logger=false", "--ckpt_path=best")
    assert sorted(path.name for path in RUNS.iterdir()) == [f"version_{number}" for number in range(4)]
    assert [path.parent.name for path in RUNS.rglob("predictions.csv")] == ["version_3"]
    assert not list(RUNS.rglob("metrics.csv"))


@pytest.mark.parametrize(
    "where",
    [
        ["--checkpoint.dirpath=models"],
        ["--checkpoint.dirpath=models", "--checkpoint.filename={epoch}-{val/accuracy:.2f}"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.version=5"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.version="],
    ],
)
def test_a_second_run_in_the_folder_of_a_first_is_refused(where: list[str]) -> None:
    fit(*where)
    with (
        nothing_is_replaced(),
        pytest.raises(UserError, match=r"(this one|this run) would replace it"),
    ):
        fit(*where)
    assert fit(*where, "--ckpt_path=last", epochs=2).global_step == 2 * BATCHES


def test_files_of_the_users_in_a_runs_folder_are_not_replaced() -> None:
    where = [
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=.",
        *(f"--trainer.logger.{n}=" for n in ("name", "version")),
    ]
    for name in ("config.yaml", "metrics.csv"):
        Path(name).write_text("mine")
        with nothing_is_replaced(), pytest.raises(UserError, match=f"^{name} is there already"):
            fit(*where)
        Path(name).unlink()


def test_python_without_a_logger_is_refused_a_folder_with_checkpoints() -> None:
    def train(epochs: int) -> Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        return Trainer(max_epochs=epochs, logger=False, callbacks=[RunCheckpoints()], **quiet)

    data, algorithm = Digits(limit_train=64, limit_val=20, batch_size=16), backprop()
    first = train(1)
    first.fit(algorithm, datamodule=data)
    with nothing_is_replaced(), pytest.raises(UserError, match=r"checkpoints/best\.ckpt is another run's"):
        train(1).fit(backprop(), datamodule=data)
    first.fit_loop.max_epochs = 2
    first.fit(algorithm, datamodule=data)  # the same run
    assert step_of(Path("checkpoints/last.ckpt")) == 2 * BATCHES


def test_runs_that_start_together_get_a_folder_each() -> None:
    Path("runs").mkdir()
    Path("runs/version_1").write_text("a file")
    loggers = [MetricsFile("runs", name="") for _ in range(3)]
    assert [logger.version for logger in loggers] == [0, 2, 3]


def test_trying_a_prediction_replaces_nothing() -> None:
    fit()
    Path("predictions.csv").write_text("mine")
    with nothing_is_replaced():
        run("predict", f"--ckpt_path={LAST}", "--trainer.fast_dev_run=true")


# -- saving nothing --------------------------------------------------------------------------------------------------


def test_a_run_may_save_no_checkpoint() -> None:
    trainer = fit("--trainer.enable_checkpointing=false")
    assert trainer.global_step == BATCHES
    assert read_metrics(RUN)
    assert not list(Path().rglob("*.ckpt"))
    assert settings()["trainer"]["enable_checkpointing"] is False


def test_saving_nothing_beside_a_callback_of_the_users_that_saves_is_a_contradiction() -> None:
    with pytest.raises(UserError, match="enable_checkpointing=False"):
        fit("--trainer.enable_checkpointing=false", "--trainer.callbacks+=ModelCheckpoint")


# -- going on --------------------------------------------------------------------------------------------------------


def two_loggers(folder: str) -> str:
    loggers = [{"class_path": "CSVLogger", "init_args": {"save_dir": folder, "name": name}} for name in ("one", "two")]
    return f"--trainer.logger={loggers}"


def test_a_run_with_several_loggers_goes_on_in_all_their_folders() -> None:
    fit(two_loggers("whole"), epochs=2)
    killed(two_loggers("halves"), "--checkpoint.every_n_batches=1", at=6)
    fit(two_loggers("halves"), "--ckpt_path=last", epochs=2)
    for name in ("one", "two"):
        assert [path.name for path in Path("halves", name).iterdir()] == ["version_0"]
        assert read_metrics(Path("halves", name, "version_0")) == read_metrics(Path("whole", name, "version_0"))


def test_a_run_that_goes_on_has_a_version_number_as_before() -> None:
    fit()
    assert fit("--ckpt_path=last", epochs=2).logger.version == 0


def test_the_configuration_of_a_run_that_went_on_trains_it_again() -> None:
    fit()
    fit("--ckpt_path=last", epochs=2)
    assert settings()["ckpt_path"] is None
    assert settings()["trainer"]["max_epochs"] == 2
    again = main(["fit", f"--config={RUN / 'config.yaml'}"]).trainer
    assert again.global_step == 2 * BATCHES
    assert differences(RUN, RUNS / "version_1") == []


def test_the_configuration_of_a_run_from_anothers_checkpoint_names_the_file() -> None:
    fit()
    best = str(RUN / "checkpoints" / "best.ckpt")
    fit("--ckpt_path=best", epochs=2)
    assert settings(RUNS / "version_1")["ckpt_path"] == best
    run("test", "--ckpt_path=best")
    assert settings(RUNS / "version_2")["ckpt_path"] == str(RUNS / "version_1" / "checkpoints" / "best.ckpt")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("--trainer.precision=bf16-mixed", "trainer.precision was 32-true and is now bf16-mixed"),
        ("--trainer.limit_train_batches=2", "trainer.limit_train_batches was 1.0 and is now 2"),
        ("--data.horizontal_flip=true", "data.horizontal_flip was False and is now True"),
        ("--model.optimizer.lr=0.5", "optimizer.lr was"),
    ],
)
def test_what_would_be_another_run_is_refused_and_the_record_stays(changed: str, named: str) -> None:
    fit()
    with nothing_is_replaced(), pytest.raises(UserError) as refused:
        fit(f"--ckpt_path={LAST}", changed, epochs=2)
    assert named in str(refused.value)


def test_going_on_without_some_of_the_images_is_refused() -> None:
    for split in ("train", "test"):
        for label in "ab":
            Path("images", split, label).mkdir(parents=True)
            for number in range(10):
                Image.new("L", (16, 16), 10 * number + ord(label)).save(f"images/{split}/{label}/{number}.png")
    images = ["--data=ImageFolder", "--data.data_dir=images"]
    model = [word for word in TINY if not word.startswith("--data")]
    main(["fit", *model, *images, "--trainer.max_epochs=1"])
    for number in range(3):
        Path(f"images/train/a/{number}.png").unlink()
    with pytest.raises(UserError, match=r"data\.train\.images was 18 and is now 15"):
        main(["fit", *model, *images, "--trainer.max_epochs=2", "--ckpt_path=last"])


def test_two_runs_cannot_go_on_in_one_folder_at_once() -> None:
    fit()
    script = f"import runpy, time; from pathlib import Path; lock = runpy.run_path({lock.__file__!r})"
    script += f"['FolderLock'](); print(lock.take(Path({str(RUN)!r})), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "None\n"
        said = rf"a run is writing into .* already \(process {other.pid} on .*, since .*\): wait until it ends"
        with nothing_is_replaced(), pytest.raises(UserError, match=said):
            fit("--ckpt_path=last", epochs=2)
        other.kill()
    assert fit("--ckpt_path=last", epochs=2).global_step == 2 * BATCHES
    assert runpy.run_path(lock.__file__)["FolderLock"]().take(RUN) is None  # the run let go of it


# -- what is said ----------------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_folder_its_best_and_the_command_that_judges_it(caplog: pytest.LogCaptureFixture) -> None:
    trained = fit(epochs=2)
    best = float(trained.checkpoint_callback.best_model_score)
    *_, said, command = caplog.messages
    assert said == f"trained 2 epochs, in {RUN}: best val/accuracy {best:.4f}"
    next_, *words = shlex.split(command)
    assert (next_, words[0]) == ("next:", "bioprop")
    assert "test/accuracy" in main(words[1:]).trainer.callback_metrics


def test_a_run_that_stops_early_says_so(caplog: pytest.LogCaptureFixture) -> None:
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    fit(*stop, "--trainer.callbacks.min_delta=9", "--trainer.callbacks.patience=1", epochs=5)
    assert "stopped early, in epoch 1: Monitored metric val/loss did not improve" in caplog.text


def test_a_run_that_is_complete_says_so(caplog: pytest.LogCaptureFixture) -> None:
    fit()
    fit("--ckpt_path=last")
    assert "nothing was left to train after 1 epochs: raise --trainer.max_epochs" in caplog.messages


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_the_summary_counts_operations(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.enable_model_summary=true", f"--trainer.precision={precision}")
    said = capsys.readouterr().out
    assert "Total FLOPs" in said
    assert "Total FLOPs: 0" not in said


def test_a_summary_leaves_training_as_it_is() -> None:
    fit()
    fit("--trainer.enable_model_summary=true")
    assert differences(RUN, RUNS / "version_1") == []
    assert torch.load(LAST, weights_only=True)["callbacks"]
