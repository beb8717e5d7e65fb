"""What a run leaves on Weights & Biases, read from the log that it writes offline."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
import yaml
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.exceptions import SIGTERMException

from bioprop.cli import main
from bioprop.errors import UserError
from bioprop.runs.folder import flat
from bioprop.runs.wandb import WandbSummary, exit_status
from bioprop.testing.helpers import KilledError
from tests.test_cli import LDRL_TINY, TINY
from tests.wandb_log import WandbLog, offline_runs

LAYER = f"--config={Path(__file__).parents[2] / 'lightning_configs' / 'wandb.yaml'}"
pytestmark = pytest.mark.filterwarnings("ignore")  # wandb's own, on start-up


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    wandb.teardown()  # another test's process of W&B: the variable that names it must not come back when it has ended
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # no account, whoever runs this
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # W&B's own process stays in the folder it was started in, and may be an earlier test's
    yield
    wandb.teardown()


def fit(*words: str) -> WandbLog:
    """Train a little, and read what was logged."""
    main(["fit", *LDRL_TINY, LAYER, "--trainer.max_epochs=2", *words])
    [log] = offline_runs(Path("runs")).values()
    return log


def test_name_tags_and_config_say_algorithm_network_and_data() -> None:
    log = fit("--model.beta=0.25")

    [folder] = Path("runs/bioprop").iterdir()
    assert log.name == f"ldrl_lenet_digits_{folder.name}"
    assert log.tags == ["ldrl", "lenet", "digits"]
    assert {name: log.config[name] for name in ("algorithm", "network", "data")} == {
        "algorithm": "ldrl",
        "network": "lenet",
        "data": "digits",
    }
    assert log.config["model.beta"] == 0.25
    assert log.config["model.optimizer.lr"] == 0.02
    assert log.config["model.network.channels"] == [4, 4]
    assert log.config["seed_everything"] == 0
    assert not {"beta", "batch_size"} & set(log.config)  # each hyperparameter under one name
    assert log.exit_code == 0


def test_names_and_tags_of_the_user_stay() -> None:
    log = fit("--trainer.logger.name=mine", "--trainer.logger.tags=[thesis]")

    assert log.name == "mine"
    assert log.tags == ["thesis", "ldrl", "lenet", "digits"]


def test_a_rule_is_part_of_the_name() -> None:
    main(["fit", "--model=FeedbackAlignment", "--model.rule=usf", *TINY, LAYER, "--trainer.max_epochs=1"])

    [log] = offline_runs(Path("runs")).values()
    assert log.name.startswith("feedbackalignment_usf_lenet_digits_")


def test_charts_run_over_epochs_and_feedback_charts_over_its_iterations() -> None:
    log = fit()

    assert log.steps["*"] == "epoch"
    assert len(log.course("angle/conv1")) == 3  # before training, and after either epoch
    assert [row["epoch"] for row in log.history if "angle/conv1" in row] == [-1, 0, 1]
    assert {"norm_ratio/fc1", "train/feedback_loss", "val/accuracy"} <= {name for row in log.history for name in row}
    for stage in ("conv2", "fc1", "fc2"):
        for kind in ("loss", "angle"):
            name = f"feedback/{stage}/{kind}"
            assert log.steps[name] == "feedback/iteration"
            rows = [row["feedback/iteration"] for row in log.history if name in row]
            assert rows == [0, 1, 2, 3], name  # two iterations of the first batch of either epoch
    recorded = (next(Path("runs/bioprop").iterdir()) / "feedback_training.csv").read_text().splitlines()
    fc2 = [line.split(",") for line in recorded if ",fc2," in line]
    assert [float(line[5]) for line in fc2] == pytest.approx(log.course("feedback/fc2/angle"))


def test_summary_is_the_best_accuracy_not_the_last() -> None:
    log = fit("--trainer.max_epochs=4", "--model.optimizer.lr=0.05")  # where accuracy falls

    assert log.summary["val/accuracy"] == max(log.course("val/accuracy"))


def test_summary_rises_and_never_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(summary={})
    monkeypatch.setattr("bioprop.runs.wandb.wandb_run", lambda trainer: run)
    callback, shown = WandbSummary(), []
    for accuracy in (0.2, 0.5, 0.3, 0.6):
        run.summary["val/accuracy"] = accuracy  # what logging the metric does
        trainer: Any = SimpleNamespace(callback_metrics={"val/accuracy": torch.tensor(accuracy, dtype=torch.float64)})
        callback.on_train_epoch_end(trainer, LightningModule())
        shown.append(run.summary["val/accuracy"])

    assert shown == [0.2, 0.5, 0.5, 0.6]


def test_diverged_run_reports_itself_failed_and_leaves_no_false_number() -> None:
    wild = ["--model.feedback_step=sgd", "--model.feedback_lr=1e9"]
    with pytest.raises(UserError, match="diverged"):
        fit(*wild)

    [log] = offline_runs(Path("runs")).values()
    assert log.exit_code == 2
    assert not log.course("val/accuracy")
    assert wandb.run is None  # the next command does not go on logging into this one


def test_a_run_goes_on_as_the_same_run_with_its_best_and_its_charts() -> None:
    kill = ["--trainer.callbacks+=bioprop.testing.helpers.KillAfter", "--trainer.callbacks.batches=3"]
    settings = [*LDRL_TINY, "--data.batch_size=32", "--model.optimizer.lr=0.05"]
    whole = main(["fit", *settings, "--trainer.max_epochs=3"])
    with pytest.raises(KilledError):
        main(["fit", *settings, LAYER, "--trainer.max_epochs=3", *kill])
    resumed = main(["fit", *settings, LAYER, "--trainer.max_epochs=3", "--ckpt_path=last"])

    [folder] = Path("runs/bioprop").iterdir()
    assert resumed.trainer.logger.version == folder.name
    wandb.teardown()
    first, second = (
        WandbLog(path) for path in sorted(Path("runs/wandb").glob(f"offline-run-*/run-{folder.name}.wandb"))
    )
    assert (first.name, second.name) == (f"ldrl_lenet_digits_{folder.name}",) * 2
    assert not {"beta", "batch_size"} & set(second.config)
    assert second.course("feedback/iteration")[:1] == [2]  # the first epoch's are 0 and 1
    best = whole.trainer.checkpoint_callback.best_model_score
    assert resumed.trainer.checkpoint_callback.best_model_score == best
    assert second.summary["val/accuracy"] == pytest.approx(float(best))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_the_best_is_kept_from_before_an_interruption() -> None:
    before, after = WandbSummary(), WandbSummary()
    before._best = 0.7
    after.load_state_dict(before.state_dict())
    assert after._best == 0.7


def test_last_is_that_of_the_same_algorithm_among_all_in_a_project(caplog: pytest.LogCaptureFixture) -> None:
    one = main(["fit", *LDRL_TINY, LAYER, "--trainer.max_epochs=1"])
    main(["fit", "--model=Backprop", *TINY, LAYER, "--trainer.max_epochs=1"])
    main(["test", *LDRL_TINY, LAYER, "--ckpt_path=last"])
    assert f"using checkpoint {one.trainer.checkpoint_callback.last_model_path}" in caplog.messages


def test_a_run_that_is_named_by_its_id_goes_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an agent names those that it starts again."""
    for name, epochs in (("mine", 1), ("other", 1), ("mine", 2)):
        monkeypatch.setenv("WANDB_RUN_ID", name)
        main(["fit", *LDRL_TINY, LAYER, f"--trainer.max_epochs={epochs}", "--ckpt_path=auto"])
        wandb.teardown()  # its process does not look at the variable again
    folders = {folder.name: folder / "checkpoints" / "last.ckpt" for folder in Path("runs/bioprop").iterdir()}
    steps = {name: torch.load(path, weights_only=True)["global_step"] for name, path in folders.items()}
    assert steps["mine"] == 2 * steps["other"]


def test_two_commands_in_one_process_are_two_runs() -> None:
    for _ in range(2):
        main(["fit", *LDRL_TINY, LAYER, "--trainer.max_epochs=1"])

    assert len(offline_runs(Path("runs"))) == len(list(Path("runs/bioprop").iterdir())) == 2


def test_a_run_that_the_caller_began_is_the_callers_to_end() -> None:
    with wandb.init(dir=".", project="mine") as run:
        main(["fit", *LDRL_TINY, LAYER, "--trainer.max_epochs=1"])
        assert wandb.run is run


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("x"), 2),
        (RuntimeError("x"), 1),
        (KeyboardInterrupt(), 1),
        (SystemExit(143), 143),
        (SystemExit("x"), 1),
        (SystemExit(), 0),
        (SIGTERMException(), 143),
    ],
)
def test_a_runs_status_is_that_of_the_process(error: BaseException, status: int) -> None:
    assert exit_status(error) == status


def test_settings_are_listed_under_the_command_lines_names() -> None:
    settings: dict[str, Any] = {
        "seed": 0,
        "model": {"class_path": "a.b.C", "init_args": {"x": None, "n": {"class_path": "N", "init_args": {"k": [1]}}}},
    }
    assert flat(settings) == {"seed": 0, "model": "C", "model.x": None, "model.n": "N", "model.n.k": [1]}


def process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bioprop", "fit", *LDRL_TINY, *words, "--trainer.max_epochs=1"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
        env=os.environ | environment,
    )


@pytest.mark.slow
def test_without_account_the_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    done = process(LAYER)

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    sentence = next(line for line in done.stderr.splitlines() if line.startswith("bioprop: error:"))
    assert "WANDB_MODE=offline" in sentence
    assert "wandb login" in sentence


def test_wandb_switched_off_trains_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    main(["fit", *LDRL_TINY, LAYER, "--trainer.max_epochs=1"])

    assert not offline_runs(Path("runs"))
    [folder] = Path("runs/bioprop").iterdir()
    assert (folder / "checkpoints" / "best.ckpt").is_file()


def test_wandb_is_not_even_imported_without_its_logger() -> None:
    script = f"import sys; from bioprop.cli import main; main({['fit', *LDRL_TINY, '--trainer.max_epochs=1']}); "
    done = subprocess.run(
        [sys.executable, "-c", script + "sys.exit('wandb' in sys.modules)"], check=False, capture_output=True
    )

    assert done.returncode == 0, done.stderr
    assert not Path("wandb").exists()


@pytest.mark.slow
def test_a_server_that_is_not_there_is_a_sentence_too() -> None:
    quick = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "5"}
    done = process(LAYER, WANDB_MODE="online", **quick)

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "WANDB_MODE=offline" in done.stderr


@pytest.mark.slow
def test_a_run_that_is_stopped_keeps_its_files_and_is_not_a_success() -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "bioprop", "fit", *LDRL_TINY, LAYER, "--trainer.max_epochs=1000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    watchdog = threading.Timer(90, running.kill)
    watchdog.start()
    while running.poll() is None and not list(Path().glob("runs/bioprop/*/checkpoints/last.ckpt")):
        threading.Event().wait(0.1)
    running.send_signal(signal.SIGTERM)
    running.wait()
    watchdog.cancel()

    [log] = offline_runs(Path("runs")).values()
    assert log.exit_code == 128 + signal.SIGTERM
    [folder] = Path("runs/bioprop").iterdir()
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 1000
