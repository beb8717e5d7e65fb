"""A data set outside the repository inherits its tests, is named by its path, and has its arguments kept."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bioprop.cli import main
from bioprop.errors import UserError

DATA = """
import torch
from bioprop.datamodules import ImageDataModule

class Stripes(ImageDataModule):
    \"\"\"Stripes that lie or stand, under noise.

    Args:
        size: Height and width in pixels.
        shared: Arguments of `ImageDataModule`.
    \"\"\"

    def __init__(self, size: int = 8, **shared):
        super().__init__(image_shape=(1, size, size), classes=("lying", "standing"), **shared)
        self.size = size

    def _labels(self, split):
        return torch.arange(100 if split == "train" else 20) % 2

    def _decode(self, split, indices):
        noise = torch.randint(0, 56, (100, 1, self.size, self.size), generator=torch.Generator().manual_seed(7))
        noise[::2, :, ::2] += 200
        noise[1::2, :, :, ::2] += 200
        return noise.to(torch.uint8)[indices]
"""
SUITES = """
import torch
from bioprop.testing import DataModuleContract
from my_data import Stripes

class Seedless(Stripes):
    def _held_out(self, labels):
        return torch.arange(10)

class TestStripes(DataModuleContract):
    cls = Stripes

    def write(self, folder, monkeypatch):
        return {"size": 10}

class TestSeedless(TestStripes):
    cls = Seedless
"""


@pytest.fixture(autouse=True)
def outside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_data.py").write_text(DATA)
    yield
    sys.modules.pop("my_data", None)


@pytest.mark.slow
def test_it_inherits_the_contract_and_a_broken_one_fails_it():
    Path("test_my_data.py").write_text(SUITES)
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        "-k",
        "TestStripes or seed_decides",
    ]
    ran = subprocess.run([*words, "test_my_data.py"], capture_output=True, text=True, check=False)
    (failed,) = re.findall(r"^FAILED (\S+)", ran.stdout, re.MULTILINE)  # pytest says more of it where CI is set
    assert failed.startswith("test_my_data.py::TestSeedless::test_the_seed_decides"), ran.stdout
    assert re.search(r"^1 failed, \d\d passed", ran.stdout, re.MULTILINE), ran.stdout
    assert "assert {0, 1, 2, 3, 4, 5, ...} != {0, 1, 2, 3, 4, 5, ...}" in ran.stdout  # by pytest's rewriting


def test_it_trains_by_its_path_and_its_arguments_are_kept(capsys):
    words = ["--model=Backprop", "--model.network=MLP", "--data=my_data.Stripes", "--trainer.max_epochs=1"]
    words += ["--trainer.enable_progress_bar=false", "--data.batch_size=16"]
    cli = main(["fit", *words, "--data.size=12"])
    assert cli.datamodule.image_shape == (1, 12, 12)
    (last,) = Path("runs").rglob("last.ckpt")
    kept = torch.load(last, weights_only=True)["datamodule_hyper_parameters"]
    assert (kept["size"], kept["batch_size"], kept["seed"]) == (12, 16, 0)
    with pytest.raises(UserError, match=r"data\.seed was 0 and is now 3; data\.size was 12 and is now 8"):
        main(["fit", *words, f"--ckpt_path={last}", "--data.seed=3"])
    with pytest.raises(SystemExit):
        main(["fit", *words, "--data.sise=3"])
    assert "did you mean size" in capsys.readouterr().err
