"""A sweep from end to end: the real ``wandb sweep`` and two real ``wandb agent`` at once, and no network."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.sweep_server import SweepServer
from tests.test_configs import CONFIGS
from tests.test_sweeps import SWEEPS, draw
from tests.wandb_log import offline_runs

#: The one line of a sweep's file that says which network and data.
BASE = "lightning_configs/ldrl_lenet_imagefolder.yaml"
HERE = "lightning_configs/ldrl_lenet_digits.yaml"
TINY = ["--config=lightning_configs/smoke.yaml", "--trainer.enable_progress_bar=false"]
RUNS = 3


@pytest.mark.slow
def test_two_agents_in_one_folder_run_a_sweep_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "lightning_configs").symlink_to(CONFIGS)
    sweep = yaml.safe_load((CONFIGS / "sweeps" / "ldrl.yaml").read_text().replace(BASE, HERE))
    sweep["command"].remove("--trainer.max_epochs=20")  # an option overrides files, wherever it stands
    sweep["command"][-1:-1] = TINY
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    rng, bad = random.Random(0), {"model.optimizer.lr": 1e30}

    def choose(parameters: dict[str, Any]) -> dict[str, Any]:
        drawn = {name: draw(entry, rng.random()) for name, entry in parameters.items()}
        return drawn | (bad if not server.handed_out else {})  # the very first run diverges

    with SweepServer(RUNS, choose) as server:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path),
            "WANDB_BASE_URL": server.address,
            "WANDB_API_KEY": "0" * 40,
            "WANDB_MODE": "offline",
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_CONFIG_DIR": str(tmp_path / "settings"),
        }
        for variable in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_DIR"):
            environment.pop(variable, None)
        wandb = [sys.executable, "-m", "wandb"]
        subprocess.run([*wandb, "sweep", "sweep.yaml"], cwd=tmp_path, env=environment, check=True, timeout=60)
        agents = [
            subprocess.Popen(
                [*wandb, "agent", "me/bioprop/sweep1"],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in range(2)
        ]
        output = [agent.communicate(timeout=300)[0] for agent in agents]

    assert [agent.returncode for agent in agents] == [0, 0], output
    assert all(len(runs) >= 1 for runs in server.agents.values())
    assert server.sweep == sweep == SWEEPS["ldrl"] | {"command": sweep["command"]}
    logs = offline_runs(tmp_path / "runs")
    folders = {path.name: path for path in (tmp_path / "runs" / "bioprop").iterdir()}
    assert set(logs) == set(folders) == set(server.handed_out)
    for name, parameters in server.handed_out.items():
        log, saved = logs[name], yaml.safe_load((folders[name] / "config.yaml").read_text())
        assert log.sweep == "sweep1"
        assert log.name == f"ldrl_lenet_digits_{name}"
        assert saved["model"]["init_args"]["beta"] == parameters["model.beta"] == log.config["model.beta"]
        assert saved["model"]["init_args"]["optimizer"]["init_args"]["lr"] == parameters["model.optimizer.lr"]
        assert log.config["model.optimizer.lr"] == parameters["model.optimizer.lr"]
        assert log.config["network"] == "lenet"
        diverged = name == "run0"
        assert log.exit_code == (2 if diverged else 0)
        assert len(log.course("val/accuracy")) == (0 if diverged else 1)
        checkpoints = {path.name for path in (folders[name] / "checkpoints").glob("*")}
        assert checkpoints == (set() if diverged else {"best.ckpt", "last.ckpt"})
    text = "\n".join(output)
    assert "was locked by" not in text  # the sweep's own parameters are not logged a second time
    assert "Traceback" not in text
    assert not (tmp_path / "config.yaml").exists()
