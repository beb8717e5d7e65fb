"""Processes that are killed, stopped or interrupted, from the command line; and what they leave to go on from."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from bioprop.cli import main
from bioprop.runs import RunStopped
from bioprop.testing.resuming import differences

TINY = [
    "--model=LDRL",
    "--model.iterations=2",
    "--model.network=LeNet",
    "--model.network.channels=[4,4]",
    "--model.network.hidden=8",
    "--data=Digits",
    "--data.limit_train=96",
    "--data.limit_val=32",
    "--data.batch_size=16",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=3",
]
BATCHES = 6  # an epoch
RUN = Path("runs/ldrl_lenet_digits/version_0")

# what a subprocess does to itself, as a callback that the command line finds in its folder
SABOTAGE = '''
import os, signal
from pytorch_lightning import Callback

class Kill(Callback):
    """Kills the process in the middle of a step."""
    def __init__(self, at: int) -> None:
        self.at = at
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

class KillWhileSaving(Callback):
    """Kills the process when half of its second checkpoint is on the disk."""
    def on_train_start(self, trainer, pl_module):
        import bioprop.files as files
        saved, save = [], files.torch.save
        def half(checkpoint, file):
            saved.append(checkpoint)
            if len(saved) == 3:
                file.write(b"PK" + bytes(9999))
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            save(checkpoint, file)
        files.torch.save = half
'''


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Signal(Callback):
    """Sends the process a signal in the middle of a step."""

    def __init__(self, number: int = signal.SIGTERM, at: int = 4) -> None:
        self.number = signal.Signals(number)
        self.at = at

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), self.number)


def fit(*arguments: str) -> Trainer:
    return main(["fit", *TINY, *arguments]).trainer


def in_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    Path("sabotage.py").write_text(SABOTAGE)
    command = [sys.executable, "-m", "bioprop", "fit", *TINY, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def apart(folder: str) -> list[str]:
    return [f"--trainer.default_root_dir={folder}"]


def step_of(checkpoint: Path) -> int:
    step: int = torch.load(checkpoint, weights_only=True)["global_step"]
    return step


def test_kill_9_at_a_random_batch_and_ckpt_path_last_equal_the_uninterrupted_run() -> None:
    at = random.Random(2022).randrange(2, 3 * BATCHES)
    every = "--checkpoint.every_n_batches=2"
    killed = in_process(every, "--trainer.callbacks+=sabotage.Kill", f"--trainer.callbacks.at={at}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 2 <= step_of(RUN / "checkpoints" / "last.ckpt") <= at
    torch.rand(5)
    fit(every, "--ckpt_path=last")
    fit(every, *apart("whole"))
    assert differences("whole" / RUN.relative_to("runs"), RUN) == []
    assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]


@pytest.mark.slow
def test_kill_9_while_a_checkpoint_is_written_leaves_the_previous_one() -> None:
    every = "--checkpoint.every_n_batches=2"
    killed = in_process(every, "--trainer.callbacks+=sabotage.KillWhileSaving")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = RUN / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "best.ckpt.part"}
    assert step_of(folder / "last.ckpt") == 4
    fit(every, "--ckpt_path=last")
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "best.ckpt"}
    fit(every, *apart("whole"))
    assert differences("whole" / RUN.relative_to("runs"), RUN) == []


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("SIGTERM", 143),
        pytest.param("SIGINT", 130, marks=pytest.mark.slow),
        pytest.param("SIGHUP", 129, marks=pytest.mark.slow),
    ],
)
def test_a_run_told_to_stop_finishes_its_batch_saves_and_says_how_to_go_on(
    name: str, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    number, handler = signal.Signals[name], signal.getsignal(signal.Signals[name])
    with pytest.raises(RunStopped) as stopped:
        fit("--trainer.callbacks+=tests.runs.test_interruptions.Signal", f"--trainer.callbacks.number={number.value}")
    assert stopped.value.code == status
    assert step_of(RUN / "checkpoints" / "last.ckpt") == 5
    *_, said = capfd.readouterr().err.strip().splitlines()
    assert (
        said == f"stopped by {name} after batch 5: --ckpt_path last, or {RUN}/checkpoints/last.ckpt, goes on from here"
    )
    assert signal.getsignal(number) == handler
    fit("--ckpt_path=last")
    fit(*apart("whole"))
    assert differences("whole" / RUN.relative_to("runs"), RUN) == []


def two_processes(folder: Path, what: str, *goes_on: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(Path(__file__).with_name("two_processes.py")),
        str(folder.absolute()),
        what,
        *goes_on,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=100)


@pytest.mark.slow
def test_two_processes_stop_together_whichever_was_told_and_survive_a_refused_write_of_the_first() -> None:
    """Lightning's own broadcast within the signal handler hangs where one process alone is told."""
    stopped = two_processes(Path("stopped"), "term1")
    assert stopped.returncode == 143, stopped.stderr
    assert stopped.stderr.count("stopped by SIGTERM after batch 5") == 1
    resumed = two_processes(Path("stopped"), "nothing", "go on")
    assert resumed.returncode == 0, resumed.stderr
    whole = two_processes(Path("whole"), "full")
    assert whole.returncode == 0, whole.stderr
    assert whole.stderr.count("last.ckpt: File too large") == 2
    # the whole run has another best, since that of its first epoch could not be written
    found = differences(Path("whole").absolute(), Path("stopped").absolute())
    assert [name for name in found if ".callbacks.RunCheckpoints" not in name] == []
