"""Whole comparisons of a few digits: what they write, run, skip and survive."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import active_children, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from bioprop.datamodules import Digits
from bioprop.errors import UserError
from bioprop.experiments import plan, processes
from bioprop.experiments.configs import CONFIGS, resolve
from bioprop.experiments.plan import TRIAL_SEED, Comparison
from bioprop.experiments.processes import run_jobs
from bioprop.experiments.results import Result
from bioprop.experiments.worker import Job
from bioprop.files import read_checkpoint
from bioprop.networks import LeNet
from tests.experiments.runs import LENET, TINY, compare, read_csv, table, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_results_folder_is_complete_and_a_second_call_changes_nothing_and_more_seeds_add_runs() -> None:
    words = ["--algorithms=backprop,ldrl", *LENET, "--epochs=2"]
    folder = Path("out")
    assert compare(folder, *words, "--seeds=2") == 0

    rows = read_csv(folder / "runs.csv")
    assert [(row["name"], row["seed"], row["status"]) for row in rows] == [
        (name, seed, "finished") for name in ("backprop", "ldrl") for seed in "01"
    ]
    assert {row["epochs"] for row in rows} == {"2"}
    for row in rows:
        last = read_checkpoint(folder / "runs" / row["name"] / f"seed_{row['seed']}" / "checkpoints" / "best.ckpt")
        assert last["epoch"] + 1 == int(row["best_epoch"])
        assert 0 < float(row["test_accuracy"]) < 1
        assert float(row["peak_memory_mib"]) > 100
        assert (float(row["angle_hidden"]) < 0.01) == (row["name"] == "backprop")
    assert rows[2]["angle_hidden"] != rows[3]["angle_hidden"]  # seeds make a difference
    costs = {row["name"]: row for row in read_csv(folder / "table.csv")}
    assert float(costs["backprop"]["feedback_share"]) < 0.05 < float(costs["ldrl"]["feedback_share"])
    assert float(costs["backprop"]["batch_seconds"]) < float(costs["ldrl"]["batch_seconds"])
    shown = table(folder)
    assert shown["BP"]["runs"] == "2"
    curves = read_csv(folder / "curves.csv")
    assert [(row["name"], row["seed"], row["epoch"]) for row in curves[:5]] == [
        ("backprop", seed, epoch) for seed in "01" for epoch in "12"
    ] + [("ldrl", "0", "1")]
    assert all(float(row["val_loss"]) > 0.0 and float(row["angle_conv1"]) < 180 for row in curves)
    text = (folder / "table.md").read_text()
    for words_in_it in ("2 epochs", "batches of 32", "96 to train on; 40 to validate; 50 to test", "torch", "bioprop"):
        assert words_in_it in text
    written = {"accuracy.pdf", "angles.png", "curves.png", "accuracy_cost.png", "comparison.png", "table.tex"}
    assert written <= {path.name for path in folder.iterdir()}

    before = contents(folder)
    assert compare(folder, *words, "--seeds=2") == 0
    assert contents(folder) == before

    assert compare(folder, *words, "--seeds=3") == 0
    after = contents(folder)
    results = [name for name in after if name.endswith("result.json")]
    assert len(results) == 6
    assert {name for name in results if name in before and before[name] == after[name]} == {
        f"out/runs/{row['name']}/seed_{row['seed']}/result.json" for row in rows
    }
    assert table(folder)["L-DRL"]["runs"] == "3"
    with pytest.raises(UserError, match=r"holds backprop with data\.batch_size 32, and now it is 16"):
        compare(folder, *words, "--seeds=3", options=[*TINY, "--data.batch_size=16"])


@pytest.mark.slow
def test_diverged_crashed_and_killed_runs_are_rows_and_lose_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_algorithms.py").write_text(
        "import os\nfrom pathlib import Path\nfrom bioprop.algorithms import Backprop\n"
        "class Crashing(Backprop):\n"
        "    def on_train_epoch_start(self):\n"
        "        if not Path('repaired').exists():\n"
        "            raise RuntimeError('out of luck')\n"
        "class Killed(Backprop):\n"
        "    def on_train_epoch_start(self):\n"
        "        if not Path('repaired').exists():\n"
        "            os.kill(os.getpid(), 9)\n"
    )
    configs = [
        write_config(tmp_path / "diverging.yaml", lr=1e30),
        write_config(tmp_path / "crashing.yaml", model="own_algorithms.Crashing"),
        write_config(tmp_path / "killed.yaml", model="own_algorithms.Killed"),
        write_config(tmp_path / "fine.yaml"),
    ]
    words = [f"--configs={','.join(map(str, configs))}", "--epochs=1", "--seeds=1"]
    folder = Path("out")
    assert compare(folder, *words) == 1

    status = {row["name"]: (row["status"], row["message"]) for row in read_csv(folder / "runs.csv")}
    assert status["diverging"][0] == "diverged"
    assert "lower the learning rate of model.optimizer" in status["diverging"][1]
    assert status["crashing"][0] == status["killed"][0] == "failed"
    assert status["crashing"][1] == "RuntimeError: out of luck (see runs/crashing/seed_0/log.txt)"
    assert "signal 9" in status["killed"][1]
    assert status["fine"] == ("finished", "")
    shown = table(folder)
    assert shown["diverging"]["runs"] == "0 of 1 (1 diverged)"
    assert shown["diverging"]["test accuracy, %"] == "-"
    assert shown["crashing"]["runs"] == "0 of 1 (1 failed)"
    assert shown["fine"]["runs"] == "1"
    assert "diverging seed 0: diverged: training diverged in epoch 0" in (folder / "table.md").read_text()

    Path("repaired").touch()
    before = contents(folder / "runs" / "diverging"), contents(folder / "runs" / "fine")
    assert compare(folder, *words) == 0
    assert (contents(folder / "runs" / "diverging"), contents(folder / "runs" / "fine")) == before
    assert table(folder)["crashing"]["runs"] == table(folder)["killed"]["runs"] == "1"


@pytest.mark.slow
def test_tuning_takes_the_best_on_validation_images_and_never_reads_the_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MOST_ROUNDS", 1)
    configs = [write_config(tmp_path / "a.yaml", lr=0.05), write_config(tmp_path / "b.yaml", lr=1e20)]
    words = [f"--configs={configs[0]},{configs[1]}", "--epochs=3", "--seeds=1", "--lr_factors=1e-6,1e15,1"]
    folder = Path("out")
    assert compare(folder, *words, options=[*TINY, "--data.limit_train=null"]) == 0

    trials = read_csv(folder / "trials.csv")
    # b, which always diverges, goes on below; a has one more too, between its best and the better beside it
    assert [(row["name"], float(row["lr_factor"])) for row in trials] == [
        (name, factor) for name, last in (("a", 1e-3), ("b", 1e-12)) for factor in (1e-6, 1e15, 1.0, last)
    ]
    assert {row["seed"] for row in trials} == {str(TRIAL_SEED)}
    own = [row for row in trials if row["name"] == "a"]
    assert [row["status"] for row in own] == ["finished", "diverged", "finished", "finished"]
    best = max((row for row in own if row["status"] == "finished"), key=lambda row: float(row["best_val_accuracy"]))
    (run,) = read_csv(folder / "runs.csv")
    assert (run["name"], run["seed"], run["learning_rate"]) == ("a", "0", best["learning_rate"])
    assert float(best["lr_factor"]) == 1.0
    shown = table(folder)
    assert shown["a"]["learning rate"] == best["learning_rate"]
    assert shown["b"]["runs"] == "0 of 1 (all 4 trials diverged)"
    assert shown["b"]["learning rate"] == "- (edge)"
    assert not list((folder / "trials").rglob("test*"))
    assert not list((folder / "trials").rglob("*.ckpt"))
    for path in (folder / "trials").rglob("result.json"):
        assert set(json.loads(path.read_text())["images"]) == {"train", "val"}


def test_the_best_checkpoint_is_tested_and_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "forgetting.py").write_text(
        "import torch\nfrom bioprop.algorithms import Backprop\n"
        "class Forgetting(Backprop):\n"
        "    def on_train_batch_end(self, *_):\n"
        "        if self.trainer.current_epoch == 2:\n"
        "            with torch.no_grad():\n"
        "                for parameter in self.network.parameters():\n"
        "                    parameter.zero_()\n"
    )
    config = write_config(tmp_path / "forgets.yaml", model="forgetting.Forgetting")
    options = [each for each in TINY if "limit_train" not in each]
    assert compare(Path("out"), f"--configs={config}", "--epochs=3", "--seeds=1", options=options) == 0

    (run,) = Comparison.load(Path("out").resolve()).runs("forgets")
    assert run.result is not None
    assert run.result.best_epoch == 2
    data = Digits(limit_val=40, limit_test=50, batch_size=50)
    data.setup("test")
    ((images, labels),) = data.test_dataloader()
    images, labels = data.on_after_batch_transfer((images, labels), 0)
    right = {}
    for name in ("best", "last"):
        network = LeNet((1, 16, 16), 10, channels=(4, 4), hidden=8)
        stored = read_checkpoint(run.folder / "checkpoints" / f"{name}.ckpt")["state_dict"]
        network.load_state_dict(
            {key.removeprefix("network."): value for key, value in stored.items() if key.startswith("network.")}
        )
        right[name] = float((network.eval()(images).argmax(1) == labels).float().mean())
    assert right["best"] > right["last"] + 0.2
    assert run.test is not None
    assert run.test.accuracy == pytest.approx(right["best"])


@pytest.mark.slow
def test_equal_time_gives_each_its_epochs_and_a_plan_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--algorithms=backprop,ldrl", *LENET, "--seeds=2", "--equal_time=0.2"]
    assert compare(Path("out"), *words, "--plan") == 0
    said = capsys.readouterr().out
    assert "4 runs, about 0:" in said
    assert not Path("out").exists()

    assert compare(Path("out"), *words, "--parallel=2") == 0
    comparison = Comparison.load(Path("out").resolve())
    epochs = {name: settings["trainer"]["max_epochs"] for name, settings in comparison.rows.items()}
    assert epochs["backprop"] > epochs["ldrl"] >= 1
    rows = read_csv(Path("out/runs.csv"))
    assert [int(row["epochs"]) for row in rows] == [epochs[row["name"]] for row in rows]
    assert {row["jobs"] for row in rows} == {"2"}
    assert table(Path("out"))["L-DRL"]["epochs"] == str(epochs["ldrl"])
    before = contents(Path("out"))
    assert compare(Path("out"), *words, "--parallel=2") == 0  # measures nothing anew
    assert contents(Path("out")) == before
    with pytest.raises(UserError, match=r"was made with equal_time 0\.2, and now it is None"):
        compare(Path("out"), *words[:-1], "--epochs=1")


class Killer:
    """Kills a run with no warning when an epoch has ended."""

    def __init__(self, epoch: int) -> None:
        self.at, self.codes = epoch, list[int]()

    def started(self, job: Job) -> None:
        pass

    def epoch(self, job: Job, number: int, accuracy: float | None) -> None:
        if number == self.at:
            # not those of the pool in which other tests train
            (child,) = (each for each in active_children() if isinstance(each, ForkServerProcess))
            child.kill()

    def ended(self, job: Job, exit_code: int) -> None:
        self.codes.append(exit_code)


def figures(result: Result | None) -> list[tuple[float | None, dict[str, float]]]:
    """What a run must repeat exactly: all but times."""
    assert result is not None
    assert result.status == "finished"
    return [(epoch.val_accuracy, dict(epoch.angles)) for epoch in result.epochs]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_epoch_and_equals_an_unbroken_one() -> None:
    words = ["--algorithms=ldrl", *LENET, "--epochs=4", "--seeds=1"]
    compare(Path("unbroken"), *words)
    (unbroken,) = Comparison.load(Path("unbroken").resolve()).runs("ldrl")

    folder = Path("broken").resolve()
    comparison = Comparison(folder)
    comparison.admit(Comparison.load(Path("unbroken")).rows, 1, [1.0])
    comparison.save("")
    (run,) = comparison.runs("ldrl")
    killer = Killer(epoch=3)
    run_jobs([Job("fit", "ldrl", run.folder, comparison.arguments(run), directory=Path.cwd())], 1, killer)
    assert killer.codes == [-signal.SIGKILL]
    assert run.result is None
    assert run.test is None

    assert compare(folder, *words) == 0
    assert "Restored all states from the checkpoint" in (run.folder / "log.txt").read_text()
    assert figures(run.result) == figures(unbroken.result)
    assert run.test == unbroken.test
    for name in ("best", "last"):
        kept, wanted = (read_checkpoint(each.folder / "checkpoints" / f"{name}.ckpt") for each in (run, unbroken))
        assert kept["epoch"] == wanted["epoch"]
        assert all(torch.equal(kept["state_dict"][key], wanted["state_dict"][key]) for key in wanted["state_dict"])


def test_a_checkpoint_that_cannot_be_read_starts_the_run_afresh() -> None:
    comparison = Comparison(Path("out").resolve())
    comparison.admit(
        {"backprop": resolve(CONFIGS / "backprop_lenet_digits.yaml", [*TINY, "--trainer.max_epochs=2"])}, 1, [1]
    )
    comparison.save("")
    (run,) = comparison.runs("backprop")
    job = Job("fit", "backprop", run.folder, comparison.arguments(run), directory=Path.cwd())
    run_jobs([job], 1, Killer(epoch=0))
    first = figures(run.result)

    (run.folder / "checkpoints" / "last.ckpt").write_bytes(b"half a file")
    (run.folder / "result.json").unlink()
    run_jobs([job], 1, Killer(epoch=0))
    assert figures(run.result) == first
    assert "Restored all states" not in (run.folder / "log.txt").read_text()


def test_a_second_comparison_in_the_same_folder_is_refused() -> None:
    Path("out").mkdir()
    with FileLock("out/.lock"), pytest.raises(UserError, match="another bioprop compare is at work"):
        compare(Path("out"), "--algorithms=backprop", *LENET, "--epochs=1", "--seeds=1")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads a process's signals from /proc")
def test_ctrl_c_does_not_reach_children_that_still_import() -> None:
    processes._context()
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    status = Path(f"/proc/{server}/status").read_text()
    (mask,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk"))
    assert mask & 1 << signal.SIGINT - 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])  # this process answers it


def processes_with(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            environment = (path.parent / "environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in environment:
            found.append(int(path.parent.name))
    return found


def wait_for_work(process: "subprocess.Popen[bytes]", amount: int) -> None:
    """Wait until so many more files were written, whatever the machine's speed, or the process has ended."""

    def written() -> int:
        return sum(1 for path in Path("broken").rglob("*.*") if path.is_file())

    before = written()
    while written() < before + amount and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes by /proc")
def test_killed_at_random_moments_the_command_goes_on_and_leaves_no_process() -> None:
    words = ["--algorithms=backprop,ldrl", *LENET, "--epochs=6", "--seeds=2", "--lr_factors=0.5,1"]
    mark = f"BIOPROP_TEST_MARK={random.random()}"
    environment = {**os.environ, **dict([mark.split("=")]), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "bioprop", "compare", *words, "--folder=broken", "--", *TINY]
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_work(process, random.randint(3, 25))
        time.sleep(random.uniform(0.0, 0.5))
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60  # seconds; a process that still imports notices only afterwards
        while processes_with(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_with(mark) == []
    for folder in ("broken", "unbroken"):  # with as many threads: sums depend on them
        command[command.index("--") - 1] = f"--folder={folder}"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    broken, unbroken = (Comparison.load(Path(name).resolve()) for name in ("broken", "unbroken"))
    for row in ("backprop", "ldrl"):
        for one, other in zip(broken.trials(row), unbroken.trials(row), strict=True):
            assert figures(one.result) == figures(other.result)
        assert broken.chosen_factor(row) == unbroken.chosen_factor(row)
        for one, other in zip(broken.runs(row), unbroken.runs(row), strict=True):
            assert figures(one.result) == figures(other.result)
            assert one.test == other.test
    assert len(read_csv(Path("broken/runs.csv"))) == 4
    assert len(read_csv(Path("broken/table.csv"))[0]["batch_seconds"]) > 0


@pytest.mark.slow
def test_the_demo_compares_the_three_and_ldrl_is_within_two_points() -> None:
    demo = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "bioprop compare" in line)
    words = demo.split("bioprop compare ")[1].split()
    assert words[-2:] == ["--folder", "runs/demo"]
    assert compare(Path("runs/demo"), *words[:-2], options=[]) == 0

    rows = {row["name"]: row for row in read_csv(Path("runs/demo/runs.csv"))}
    assert list(rows) == ["backprop", "dtp", "ldrl"]
    accuracy = {name: float(row["test_accuracy"]) for name, row in rows.items()}
    assert accuracy["backprop"] > 0.95
    assert accuracy["ldrl"] > accuracy["backprop"] - 0.02
    assert accuracy["dtp"] > 0.8
    assert float(rows["backprop"]["angle_hidden"]) < 0.01 < float(rows["ldrl"]["angle_hidden"]) < 60.0
    assert Path("runs/demo/comparison.png").is_file()
