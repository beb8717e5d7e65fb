"""Every file in lightning_configs/sweeps/: wandb's own functions turn it into the commands that are run here."""

import contextlib
import inspect
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import wandb.wandb_agent
import yaml
from PIL import Image
from wandb.apis.public.sweeps import _validate_config_and_fill_distribution

from bioprop import algorithms
from bioprop.algorithms.feedback_alignment import Rule
from bioprop.cli import main
from bioprop.errors import DivergenceError
from tests.test_configs import ALGORITHMS, CONFIGS
from tests.wandb_log import offline_runs

SWEEPS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONFIGS / "sweeps").glob("*.yaml"))}
LEARNING_RATE = "model.optimizer.lr"
#: What makes two sweeps a fair comparison.
BUDGET = ("method", "metric", "run_cap", "early_terminate", "program", "project")


def base_config(sweep: str) -> str:
    """The file that the sweep's first --config names."""
    return next(word for word in SWEEPS[sweep]["command"] if word.startswith("--config=")).partition("=")[2]


def draw(parameter: dict[str, Any], place: float) -> Any:
    """The value at a place in [0, 1] of a parameter's distribution."""
    if "value" in parameter:
        return parameter["value"]
    low, high = math.log(parameter["min"]), math.log(parameter["max"])
    return min(max(math.exp(low + place * (high - low)), parameter["min"]), parameter["max"])


def agents_command(sweep: str, places: Iterator[float], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the agent itself would start for one draw of a sweep's parameters."""
    for variable in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(variable, "")  # the agent sets them: to be put back
    monkeypatch.setenv("WANDB_DIR", ".")
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)

    monkeypatch.setattr(wandb.wandb_agent, "AgentProcess", Process)
    agent = wandb.wandb_agent.Agent(api=None, queue=None, sweep_id="s")
    agent._sweep_command = list(SWEEPS[sweep]["command"])
    drawn = {name: {"value": draw(entry, next(places))} for name, entry in SWEEPS[sweep]["parameters"].items()}
    agent._command_run({"type": "run", "run_id": "r", "program": SWEEPS[sweep]["program"], "args": drawn})
    monkeypatch.undo()
    return started[0]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that looks like the repository's root, with a tiny folder of images."""
    (tmp_path / "lightning_configs").symlink_to(CONFIGS)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(12):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # W&B's own process stays in the folder it was started in, and may be an earlier test's
    yield tmp_path
    wandb.teardown()


def test_every_algorithm_and_rule_has_a_sweep() -> None:
    exported = {getattr(algorithms, name) for name in algorithms.__all__}
    found = {cls for cls in exported if not inspect.isabstract(cls)} - {algorithms.TargetAlgorithm}  # a base class

    assert {cls for cls, _ in ALGORITHMS.values()} == found
    assert {rule for _, rule in ALGORITHMS.values() if rule} == set(get_args(Rule)) - {"transpose"}  # a control
    assert set(SWEEPS) == set(ALGORITHMS) - {"ldrlpublished"}  # its figures are those of its authors


def test_all_sweeps_have_the_same_budget_and_search() -> None:
    for field in BUDGET:
        assert len({str(sweep[field]) for sweep in SWEEPS.values()}) == 1, field
    for name, sweep in SWEEPS.items():
        assert [word for word in sweep["command"] if "max_epochs" in word] == ["--trainer.max_epochs=20"], name
        assert sweep["metric"] == {"name": "val/accuracy", "goal": "maximize"}
        # the first decision falls after the epochs that train feedback alone, and before the end
        pretraining = [int(word[-1]) for word in sweep["command"] if "feedback_pretraining_epochs=" in word]
        assert max(pretraining, default=0) < sweep["early_terminate"]["min_iter"] < 20


def test_no_base_config_trains_feedback_alone_for_longer_than_the_sweep_says() -> None:
    for name, sweep in SWEEPS.items():
        arguments = yaml.safe_load((CONFIGS.parent / base_config(name)).read_text())["model"]["init_args"]
        for setting in ("feedback_pretraining_epochs", "extra_feedback_epochs"):
            assert setting not in arguments or any(f"--model.{setting}=" in word for word in sweep["command"]), name


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_searches_two_decades_of_learning_rates_and_nothing_that_arrives_as_text(name: str) -> None:
    parameters = SWEEPS[name]["parameters"]
    rate = parameters[LEARNING_RATE]

    assert rate["max"] / rate["min"] == pytest.approx(100)
    base = yaml.safe_load((CONFIGS.parent / base_config(name)).read_text())["model"]["init_args"]
    assert rate["min"] < base["optimizer"]["init_args"]["lr"] < rate["max"]
    for parameter, entry in parameters.items():
        assert parameter.startswith("model."), parameter
        if "value" in entry:
            assert entry == {"value": "normalized"}
        else:
            assert set(entry) == {"distribution", "min", "max"}
            assert entry["distribution"] == "log_uniform_values"
            assert isinstance(entry["min"], float)
            assert isinstance(entry["max"], float)
            assert 0.0 < entry["min"] < entry["max"]


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_file_keeps_to_the_schema(name: str) -> None:
    sweep = SWEEPS[name]

    assert set(sweep) == {*BUDGET, "name", "command", "parameters"}
    assert _validate_config_and_fill_distribution(sweep) == sweep  # wandb finds nothing to fill in, or to refuse
    assert sweep["name"] == name
    assert (CONFIGS.parent / sweep["program"]).is_file()
    assert sweep["command"][:5] == ["${env}", "${interpreter}", "-m", "bioprop", "fit"]
    assert sweep["command"][-1] == "${args}"
    assert base_config(name).startswith(f"lightning_configs/{name}_")
    assert type(sweep["run_cap"]) is int
    assert set(sweep["early_terminate"]) == {"type", "min_iter", "eta"}


def run_agents_command(name: str, places: Iterator[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command on two tiny batches, and see every parameter arrive as the number drawn."""
    with pytest.MonkeyPatch.context() as patch:
        words = agents_command(name, places, patch)
    assert words[:5] == ["/usr/bin/env", "python", "-m", "bioprop", "fit"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    quick = ["--config=lightning_configs/smoke.yaml", "--trainer.enable_progress_bar=false"]
    cli = main([*words[4:], *quick, "--trainer.enable_model_summary=false"])

    for parameter in SWEEPS[name]["parameters"]:
        given = next(word.partition("=")[2] for word in words if word.startswith(f"--{parameter}="))
        found = cli.config["fit"].model.init_args
        *owners, last = parameter.removeprefix("model.").split(".")
        for owner in owners:
            found = found[owner].init_args
        assert found[last] == (given if isinstance(found[last], str) else float(given)), parameter


@pytest.mark.filterwarnings("ignore")  # wandb's own, on start-up
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("dfa", "ldrl") else [pytest.mark.slow]) for name in SWEEPS]
)
def test_agents_command_trains_offline(name: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(name)
    run_agents_command(name, iter(lambda: rng.uniform(0.2, 0.8), None), monkeypatch)

    [log] = offline_runs(repository / "runs").values()
    assert log.exit_code == 0
    assert log.course("val/accuracy")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # wandb's own, on start-up
@pytest.mark.parametrize("place", [0.0, 1.0])
@pytest.mark.parametrize("name", SWEEPS)
def test_the_ends_of_every_range_are_accepted(
    name: str, place: float, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.suppress(DivergenceError):  # all parameters at their upper ends at once may be too much
        run_agents_command(name, itertools.repeat(place), monkeypatch)

    assert len(offline_runs(repository / "runs")) == 1
