"""The README says what is true: its example runs and the files and commands it names exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(example.replace("128", "8").replace("iterations=20", "iterations=2"), names)

    gradients, network = names["gradients"], names["network"]
    assert isinstance(gradients, dict)
    assert isinstance(network, torch.nn.Module)
    assert set(gradients) == {name for name, _ in network.named_parameters()}
    assert names["angles"] == pytest.approx({"conv2": 0.0, "fc1": 0.0, "fc2": 0.0}, abs=1e-6)


def test_files_it_names_exist() -> None:
    for name in re.findall(r"(?:lightning_configs|docs|benchmarks)/[\w.]+\.(?:yaml|png|py)", README):
        assert (ROOT / name).is_file(), name


def test_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (demo|test|help|lint)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
