"""The process that starts the others, where one of them ends before its time."""

import signal
import subprocess
import sys

import pytest
import torch

from bioprop.runs import processes
from bioprop.runs.processes import GradientAveraging, WatchfulLauncher


class Ended(Exception):  # noqa: N818
    """In place of the end of the process."""


@pytest.mark.parametrize(
    ("last_words", "status", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "bioprop: SIGINT: ended before all processes had started\n"),
        ("sys.exit(130)", 130, "bioprop: SIGINT: ended before all processes had started\n"),
        ("sys.exit(143)", 143, "bioprop: SIGTERM: ended before all processes had started\n"),
        ("sys.exit(2)", 1, "bioprop: error: process 2 ended with status 2: see what it said, then go on with"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "bioprop: error: process 2 ended by signal 9: see what it said"),
    ],
)
def test_the_first_process_ends_with_what_ended_another(
    last_words: str, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        raise Ended

    monkeypatch.setattr(processes, "BEFORE_THEY_MET", 0.0)
    monkeypatch.setattr(processes.os, "_exit", end)
    launcher = WatchfulLauncher.__new__(WatchfulLauncher)
    script = f"import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); {last_words}"
    launcher.procs = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]),
        subprocess.Popen([sys.executable, "-c", script]),
    ]
    with pytest.raises(Ended):
        launcher._watch()
    assert statuses == [status]
    assert capsys.readouterr().err.startswith(said)
    assert launcher.procs[0].wait(10) == -signal.SIGKILL


def test_nothing_is_said_of_processes_that_are_done() -> None:
    launcher = WatchfulLauncher.__new__(WatchfulLauncher)
    launcher.procs = [subprocess.Popen([sys.executable, "-c", ""])]
    launcher._watch()


def test_processes_that_share_a_gpu_exchange_over_gloo() -> None:
    one, other = torch.device("cuda", 0), torch.device("cuda", 1)
    shared, apart = GradientAveraging(parallel_devices=[one, one]), GradientAveraging(parallel_devices=[one, other])
    assert (shared.process_group_backend, apart.process_group_backend) == ("gloo", None)
    assert GradientAveraging(parallel_devices=[one, one], process_group_backend="nccl").process_group_backend == "nccl"
