"""Signals: noted when they come, answered when a batch is over."""

import errno
import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning import Callback, LightningModule, Trainer

from bioprop.algorithms import Backprop
from bioprop.datamodules import Digits
from bioprop.networks import LeNet
from bioprop.runs import RunCheckpoints, RunStopped
from bioprop.testing.helpers import changed, copy_state, make_trainer


class Send(Callback):
    """Sends the process signals in the middle of the fifth step, or in a hook."""

    def __init__(self, *numbers: int, hook: str = "") -> None:
        self.numbers = numbers
        if hook:
            setattr(self, hook, lambda *args: self.send())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 4 and "send" not in self.__dict__:
            self.send()

    def send(self) -> None:
        for number in self.numbers:
            os.kill(os.getpid(), number)
        self.numbers = ()


def fit(folder: Path, *callbacks: Callback, epochs: int = 3, **settings: Any) -> tuple[Trainer, Backprop]:
    torch.manual_seed(1)
    algorithm = Backprop(LeNet((1, 16, 16), 10, channels=(3, 4), hidden=8))
    standing = [RunCheckpoints(), *callbacks]
    trainer = make_trainer(folder, max_epochs=epochs, callbacks=standing, enable_checkpointing=True, **settings)
    trainer.fit(algorithm, datamodule=Digits(limit_train=48, limit_val=20, batch_size=16))
    return trainer, algorithm


def step_of(checkpoint: Path) -> int:
    step: int = torch.load(checkpoint, weights_only=True)["global_step"]
    return step


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_epoch_end", "on_train_batch_start"])
def test_a_signal_at_any_time_is_answered(hook: str, tmp_path: Path) -> None:
    with pytest.raises(RunStopped):
        fit(tmp_path, Send(signal.SIGTERM, hook=hook), num_sanity_val_steps=0)
    stopped_after = 1 if hook == "on_train_batch_start" else 3
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == stopped_after


def test_a_signal_in_the_last_batch_lets_the_run_end(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, Send(signal.SIGTERM, hook="on_train_epoch_end"), epochs=1)
    assert trainer.state.finished


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        fit(tmp_path, Send(signal.SIGTERM, signal.SIGTERM))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


@pytest.mark.parametrize("hook", ["on_sanity_check_end", "on_test_batch_start", "on_predict_batch_start"])
def test_sigterm_ends_what_has_nothing_to_save(hook: str, tmp_path: Path) -> None:
    """Lightning's own handler would swallow it."""
    before = signal.getsignal(signal.SIGTERM)
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        trainer, algorithm = fit(tmp_path, Send(signal.SIGTERM, hook=hook), epochs=1)
        trainer.test(algorithm, datamodule=trainer.datamodule, verbose=False)
        trainer.predict(algorithm, datamodule=trainer.datamodule)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_the_handlers_are_given_back(tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    fit(tmp_path, epochs=1)
    assert [signal.getsignal(number) for number in numbers] == before


def test_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer, _ = fit(tmp_path, Send(signal.SIGHUP), epochs=1)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.state.finished


def test_a_signal_is_answered_where_nobody_can_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed terminal sends SIGHUP, and refuses what is written from then on."""

    def refuse(descriptor: int, content: bytes) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("bioprop.runs.signals.os.write", refuse)
    with pytest.raises(RunStopped) as stopped:
        fit(tmp_path, Send(signal.SIGHUP))
    assert stopped.value.code == 129
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 5


def test_fast_dev_run_stops_too_and_saves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RunStopped):
        fit(tmp_path, Send(signal.SIGTERM, hook="on_train_batch_start"), fast_dev_run=3)
    assert "stopped by SIGTERM after batch 1: fast_dev_run saves nothing" in caplog.messages
    assert not list(tmp_path.rglob("*.ckpt"))


def test_slurms_signal_requeues_the_job_once_the_batch_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's requeueing, which would save in the middle of the step; the requeued job equals an unbroken one."""
    for name, value in {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_ID": "77"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def in_slurm(*callbacks: Callback) -> Backprop:
        environment = SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR1)
        return fit(tmp_path / "run", *callbacks, plugins=[environment])[1]

    with pytest.raises(RunStopped):
        in_slurm(Send(signal.SIGUSR1), Later(signal.SIGTERM))  # SLURM sends the second when it has requeued
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert step_of(tmp_path / "run" / "hpc_ckpt_1.ckpt") == 5
    requeued = in_slurm()
    _, whole = fit(tmp_path / "whole")
    assert changed(copy_state(whole), copy_state(requeued)) == set()


class Later(Callback):
    """Sends the process a signal after the seventh batch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 7:
            os.kill(os.getpid(), self.number)
