"""Several processes: what they exchange, how they share images, and how they end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor

from bioprop.algorithms import Backprop
from bioprop.callbacks import PredictionsFile
from bioprop.cli import main
from bioprop.datamodules import Digits
from bioprop.distributed import from_process, gather_rows, mean_over_processes, process_count, process_rank
from bioprop.errors import UserError
from bioprop.networks import MLP
from bioprop.runs import GradientAveraging
from bioprop.runs.processes import averaging_for_several_devices, refuse_strangers
from bioprop.testing.processes import COUNT, ProcessPool

CONFIG = Path(__file__).parents[1] / "lightning_configs" / "ldrl_lenet_digits.yaml"
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def own_tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(process_rank())
    return [torch.randn(4, 3, 2, 2, generator=generator).contiguous(memory_format=torch.channels_last), torch.ones(())]


def exchange() -> tuple[list[Tensor], list[Tensor], list[Tensor], list[bool]]:
    own = own_tensors()
    means, sent = mean_over_processes(own), from_process(1, own)
    return own, means, sent, [mean.is_contiguous(memory_format=torch.channels_last) for mean in means[:1]]


def test_means_and_broadcasts(processes: ProcessPool) -> None:
    (first, means, sent, kept), (second, other_means, other_sent, _) = processes.run(exchange)
    assert not torch.equal(first[0], second[0])
    for one, other, mean, other_mean in zip(first, second, means, other_means, strict=True):
        assert torch.equal(mean, (one + other) / 2)
        assert torch.equal(mean, other_mean)
    for received in (sent, other_sent):
        assert all(torch.equal(one, other) for one, other in zip(received, second, strict=True))
    assert kept == [True]


def gather(rows: int) -> Tensor:
    return gather_rows(torch.arange(2 * rows).view(rows, 2)[process_rank() :: process_count()])


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_gathered_rows_are_the_batch(rows: int, processes: ProcessPool) -> None:
    for gathered in processes.run(gather, rows):
        assert torch.equal(gathered, torch.arange(2 * rows).view(rows, 2))


def test_one_process_exchanges_nothing() -> None:
    own = own_tensors()
    assert all(one is other for one, other in zip(mean_over_processes(own), own, strict=True))
    assert gather_rows(own[0]) is own[0]


def evaluate(images: int, batch_size: int, folder: str) -> tuple[dict[str, float], dict[str, float], bytes]:
    """Test, validate and predict with a network drawn from one seed; return the metrics and the predictions' file."""
    torch.manual_seed(3)
    data = Digits(limit_test=images, limit_val=images, batch_size=batch_size)
    algorithm = Backprop(MLP(data.image_shape, data.num_classes, hidden=(8,)))
    several: dict[str, Any] = {"devices": COUNT, "strategy": GradientAveraging()} if process_count() > 1 else {}
    trainer = Trainer(
        accelerator="cpu",
        **({"devices": 1} | several),
        logger=False,
        default_root_dir=folder,
        callbacks=[PredictionsFile()],
        **QUIET,
    )
    (tested,) = trainer.test(algorithm, data, verbose=False)
    (validated,) = trainer.validate(algorithm, data, verbose=False)
    trainer.predict(algorithm, data, return_predictions=False)
    trainer.strategy.barrier()
    return tested, validated, (Path(folder) / "predictions.csv").read_bytes()


@pytest.mark.parametrize(("images", "batch_size"), [(2, 8), (3, 2), (21, 4), (40, 39), (133, 7)])
def test_evaluation_counts_every_image_once(
    images: int, batch_size: int, processes: ProcessPool, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = evaluate(images, batch_size, str(tmp_path / "one"))
    assert alone[2].count(b"\n") == images + 1
    for shared in processes.run(evaluate, images, batch_size, str(tmp_path / "two")):
        for metrics, expected in zip(shared[:2], alone[:2], strict=True):
            assert metrics == pytest.approx(expected, rel=1e-6)
        assert shared[2] == alone[2]


def refused_sharing(batch_size: int, limit: int) -> str:
    data = Digits(batch_size=batch_size, limit_val=limit)
    algorithm = Backprop(MLP(data.image_shape, data.num_classes, hidden=(8,)))
    trainer = Trainer(
        accelerator="cpu", devices=COUNT, strategy=GradientAveraging(), logger=False, max_epochs=1, **QUIET
    )
    try:
        trainer.fit(algorithm, data)
    except UserError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("batch_size", "limit", "named"),
    [(7, 10, "batch_size 7 cannot be shared equally among 2"), (8, 1, "1 image(s) cannot be shared among 2 processes")],
)
def test_what_cannot_be_shared_is_refused(batch_size: int, limit: int, named: str, processes: ProcessPool) -> None:
    for message in processes.run(refused_sharing, batch_size, limit):
        assert named in message


def test_several_devices_average_by_themselves() -> None:
    with averaging_for_several_devices():
        chosen = Trainer(accelerator="cpu", devices=2, logger=False, **QUIET)
    assert isinstance(chosen.strategy, GradientAveraging)
    # only where asked for: other programs in the same process have Lightning's own
    plain = Trainer(accelerator="cpu", devices=2, logger=False, **QUIET)
    assert not isinstance(plain.strategy, GradientAveraging)


def test_other_strategies_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = Backprop(MLP((1, 8, 8), 10, hidden=()))
    trainer = Trainer(accelerator="cpu", devices=2, logger=False, **QUIET)
    monkeypatch.setattr(algorithm, "_trainer", trainer)
    with pytest.raises(UserError, match="strategy DDPStrategy does not average the gradients of Backprop"):
        algorithm.on_fit_start()


def test_processes_that_nobody_counts_on_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_strangers(1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_strangers(2)
    with pytest.raises(UserError, match="torchrun started 2 processes, but the trainer counts on 1"):
        refuse_strangers(1)


# -- whole commands ------------------------------------------------------------------------------------------------


def command(folder: Path, *words: str) -> list[str]:
    shared = ["--config", str(CONFIG), "--trainer.devices=2", "--trainer.accelerator=cpu"]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}"]
    return [sys.executable, "-m", "bioprop", *words[:1], *shared, *quiet, *words[1:]]


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if "RANK" not in key} | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_command_trains_in_two_processes(tmp_path: Path) -> None:
    words = command(tmp_path, "fit", "--trainer.max_epochs=1", "--data.limit_train=128")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Starting with 2 processes" in done.stderr
    assert "sync_dist" not in done.stderr
    (folder,) = (tmp_path / "ldrl_lenet_digits").iterdir()  # not one for each process
    assert sorted(path.name for path in folder.iterdir()) == [
        ".run.lock",
        "checkpoints",
        "config.yaml",
        "hparams.yaml",
        "metrics.csv",
    ]
    # what two processes wrote, one reads
    where = [f"--trainer.default_root_dir={tmp_path}", "--data.limit_train=128", "--ckpt_path=last"]
    one = main(["test", "--config", str(CONFIG), *where])
    assert 0 < float(one.trainer.callback_metrics["test/accuracy"]) < 1


@pytest.mark.slow
def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    words = command(tmp_path, "fit", "--data.batch_size=33")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert len(re.findall("bioprop: error: batch_size 33", done.stderr)) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_the_others(killed: int, tmp_path: Path) -> None:
    words = command(tmp_path, "fit", "--trainer.max_epochs=1000")
    with (tmp_path / "errors").open("w") as errors:
        main_process = subprocess.Popen(words, env=environment(), stdout=errors, stderr=errors)
    children = f"/proc/{main_process.pid}/task/{main_process.pid}/children"
    wait_for(lambda: any(tmp_path.glob("*/*/checkpoints/last.ckpt")))
    (child,) = map(int, Path(children).read_text().split())
    os.kill((main_process.pid, child)[killed], signal.SIGKILL)
    status = main_process.wait(timeout=60)
    wait_for(lambda: not alive(child))
    said = (tmp_path / "errors").read_text()
    assert "Traceback" not in said
    if killed:
        assert status == 1
        assert "process 0 lost the connection to another process" in said
    else:
        assert "this process ends, since the one that started it has ended" in said


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
