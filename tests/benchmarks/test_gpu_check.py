"""The script for a GPU, run on a CPU: every part of it, and a fault that it tells."""

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_check
from bioprop.algorithms import LDRL, Backprop

CPU = torch.device("cpu")


def test_all_parts_run_and_print_their_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "concrete_algorithms", lambda: {"LDRL": partial(gpu_check._made, LDRL)})
    monkeypatch.setattr(gpu_check, "check_two_processes", lambda device: [])  # spawns: the tests of processes do that
    words = ["--model=Backprop", "--model.network=LeNet", "--data.count=64"]
    monkeypatch.setattr(gpu_check, "TIMED", {"BP, LeNet": (words, 1e9)})
    rows = gpu_check.run_all(CPU, batches=1)
    assert [row.verdict for row in rows] == ["ok"] * 7
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in rows)
    assert rows[5].name == "ms a batch in fit, BP, LeNet"
    assert float(rows[5].value) > 0


def test_a_gradient_that_differs_on_the_device_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "concrete_algorithms", lambda: {"BP": partial(gpu_check._made, Backprop)})
    real, calls = Backprop.forward_gradients, []

    def second_differs(self: Backprop, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        calls.append(None)
        found = real(self, images, labels)
        return {name: value * (1 + 1e-6 * (len(calls) % 2 == 0)) for name, value in found.items()}

    monkeypatch.setattr(Backprop, "forward_gradients", second_differs)
    equal, finite = gpu_check.check_gradients(CPU)
    assert (equal.verdict, finite.verdict) == ("FAILED", "ok")
    assert "BP" in equal.name


def test_a_recording_that_fails_is_heard_of_through_the_silence() -> None:
    with warnings.catch_warnings(record=True) as caught, gpu_check._silence():
        warnings.warn("training is not recorded as a CUDA graph (why)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(each.message) for each in caught] == ["training is not recorded as a CUDA graph (why)"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == 2
    assert "finds no GPU here" in capsys.readouterr().err
