"""Every file in lightning_configs/ is run, through the command line, with smoke.yaml over it."""

import pickle
from pathlib import Path
from pydoc import locate
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image

from bioprop.algorithms import Algorithm, TargetAlgorithm
from bioprop.cli import main
from bioprop.experiments.names import METHODS
from tests.datamodules.published_files import write_imagenet32, write_svhn
from tests.published_steps import in_units_of_backprop

CONFIGS = Path(__file__).parents[1] / "lightning_configs"
LAYERS = {"smoke.yaml", "wandb.yaml"}
RUNS = sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name not in LAYERS)


def _model(config: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((CONFIGS / config).read_text())
    return settings


def algorithm_of(config: str) -> tuple[type[Algorithm], str | None]:
    """The class that a file names, and the rule where the class has several."""
    model = _model(config)["model"]
    algorithm: type[Algorithm] = locate(model["class_path"])
    return algorithm, model["init_args"].get("rule")


#: Class and rule by the first word of the names of files.
ALGORITHMS = {name.split("_")[0]: algorithm_of(name) for name in RUNS}
#: By default one file of each algorithm is run, that of a small network, and one of each kind of data.
FAST = {
    name.split("_")[0]: name for name in RUNS if name.endswith(("_lenet_digits.yaml", "_invertiblemlp_digits.yaml"))
}
OF_DATA = ("ldrl_lenet_cifar10.yaml", "ldrl_lenet_svhn.yaml", "ldrl_lenet_imagefolder.yaml", "pepita_mlp_digits.yaml")
SLOW = [name for name in RUNS if name not in {*FAST.values(), *OF_DATA}]


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny data sets in the real formats: CIFAR-10's batches of pickles, and a folder of images."""
    rng = np.random.default_rng(0)
    cifar = tmp_path / "data" / "cifar-10-batches-py"
    cifar.mkdir(parents=True)
    names = {"meta": [], "train_list": [f"data_batch_{n}" for n in range(1, 6)], "test_list": ["test_batch"]}
    for name in names["train_list"] + names["test_list"]:
        content = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [n % 10 for n in range(20)]}
        (cifar / name).write_bytes(pickle.dumps(content))
    classes = torchvision.datasets.CIFAR10
    (cifar / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{n}" for n in range(10)]}))
    monkeypatch.setattr(classes, "train_list", [[name, None] for name in names["train_list"]])
    monkeypatch.setattr(classes, "test_list", [[name, None] for name in names["test_list"]])
    monkeypatch.setattr(classes, "meta", {**classes.meta, "md5": None})
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(12):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize(
    "config", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RUNS]
)
def test_config_runs_a_few_batches_under_smoke(config: str, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data_folder)
    small: list[str] = []
    if config.endswith("_imagenet32.yaml"):
        write_imagenet32(data_folder / "data" / "imagenet32", monkeypatch, stored=("train",))  # 2 images a class
        small = ["--data.num_val_per_class=1"]
    if config.endswith("_svhn.yaml"):
        write_svhn(data_folder / "data", monkeypatch)
    cli = main(
        [
            "fit",
            f"--config={CONFIGS / config}",
            f"--config={CONFIGS / 'smoke.yaml'}",
            "--trainer.enable_progress_bar=false",
            *small,
        ]
    )

    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    algorithm, network, data = config.removesuffix(".yaml").split("_")
    rule = getattr(cli.model, "rule", None)
    assert algorithm != "ldrlpublished" or cli.model.feedback_training.second_noise == "independent"
    assert (type(cli.model), rule) == ALGORITHMS[algorithm]
    assert rule is None or rule.replace("_", "") == algorithm
    assert type(cli.model.network).__name__.lower() == network
    assert type(cli.datamodule).__name__.lower() == data
    name = type(cli.model).__name__.lower() + (f"_{rule}" if rule else "")
    runs = data_folder / "runs" / f"{name}_{network}_{data}" / "version_0"
    saved = yaml.safe_load((runs / "config.yaml").read_text())
    assert saved["data"]["init_args"]["limit_train"] == 16
    assert {path.name for path in (runs / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.parametrize(
    ("config", "batch", "published"),
    [
        (
            "ldrl_simplevgg_cifar10.yaml",
            128,
            {
                "beta": 0.7,
                "noise": [0.4, 0.4, 0.2, 0.2, 0.08],
                "feedback_lr": [1e-4, 3.5e-4, 8e-3, 8e-3, 0.18],
                "iterations": [20, 30, 35, 55, 20],
            },
        ),
        (
            "ldrl_simplevgg_imagenet32.yaml",
            256,
            {
                "beta": 0.7,
                "noise": [0.4, 0.4, 0.2, 0.2, 0.08],
                "feedback_lr": [1e-4, 3.5e-4, 8e-3, 8e-3, 0.18],
                "iterations": [25, 35, 40, 60, 25],
            },
        ),
        (
            "ldrl_lenet_cifar10.yaml",
            256,
            {
                "beta": 0.4655,
                "noise": [0.4164, 0.3826, 0.1395],
                "feedback_lr": [7.188427e-4, 1.2510321e-4, 3.541467e-2],
                "iterations": [41, 51, 24],
            },
        ),
    ],
)
def test_ldrl_configs_hold_the_published_figures(config: str, batch: int, published: dict[str, Any]) -> None:
    settings = _model(config)
    arguments = settings["model"]["init_args"]
    assert arguments["second_noise"] == "independent"

    assert {name: arguments[name] for name in published} == published
    assert arguments["optimizer"]["init_args"]["momentum"] == 0.9
    assert arguments["scheduler"]["init_args"]["T_max"] == 85
    assert (arguments["mirror"], arguments["switches"], arguments["feedback_step"]) == ("paper", "noisy", "sgd")
    assert settings["data"]["init_args"]["batch_size"] == batch
    assert settings["trainer"]["max_epochs"] == 90


def test_the_imagenet32_baseline_holds_the_published_figures() -> None:
    settings = _model("backprop_simplevgg_imagenet32.yaml")
    arguments = settings["model"]["init_args"]

    assert arguments["optimizer"]["init_args"]["lr"] == 0.01
    assert arguments["scheduler"]["class_path"].endswith(".StepLR")
    assert arguments["scheduler"]["init_args"] == {"step_size": 30, "gamma": 0.1}
    assert settings["data"]["init_args"]["num_val_per_class"] == 50
    assert settings["trainer"]["max_epochs"] == 90


#: Optimizer, beta, its settings for gradients that carry beta, and the smallest rate of the schedule.
CARRYING_BETA: dict[str, tuple[str, float, dict[str, Any], float | None]] = {
    "ldrl_simplevgg_cifar10": ("SGD", 0.7, {"lr": 0.05, "weight_decay": 1e-4}, 1e-5),
    "ldrl_simplevgg_imagenet32": ("SGD", 0.7, {"lr": 0.01, "weight_decay": 1e-4}, 1e-5),
    "ldrl_lenet_cifar10": ("SGD", 0.4655, {"lr": 0.03618, "weight_decay": 1e-4}, 1e-5),
    "ldrl_resnet18_cifar10": ("SGD", 0.5, {"lr": 0.02, "weight_decay": 1e-4}, 1e-5),
    "parallelldrl_simplevgg_cifar10": ("Adam", 0.7, {"lr": 3e-4, "weight_decay": 1e-4}, None),
    "dtp_lenet_cifar10": ("Adam", 0.5, {"lr": 3e-4}, 1e-5),
    "dtp_simplevgg_cifar10": ("Adam", 0.5, {"lr": 3e-4}, 1e-5),
    "dtp_simplevgg_imagenet32": ("Adam", 0.5, {"lr": 3e-4}, 1e-5),
}


@pytest.mark.parametrize("config", CARRYING_BETA)
def test_published_optimizers_are_converted_to_the_units_of_backprop(config: str) -> None:
    optimizer, beta, published, eta_min = CARRYING_BETA[config]
    arguments = _model(f"{config}.yaml")["model"]["init_args"]
    found = {name: value for name, value in arguments["optimizer"]["init_args"].items() if name != "momentum"}

    assert arguments["beta"] == beta
    assert arguments["optimizer"]["class_path"] == f"torch.optim.{optimizer}"
    assert found == pytest.approx(in_units_of_backprop(optimizer, published, beta), rel=1e-12, abs=0)
    if eta_min is None:
        assert "scheduler" not in arguments
    else:
        expected = eta_min * beta if optimizer == "SGD" else eta_min
        assert arguments["scheduler"]["init_args"]["eta_min"] == pytest.approx(expected, rel=1e-12, abs=0)


def test_no_target_propagation_at_full_size_is_left_out_of_the_conversion() -> None:
    full = [name.removesuffix(".yaml") for name in RUNS if name.endswith(("_cifar10.yaml", "_imagenet32.yaml"))]
    targets = {name for name in full if issubclass(ALGORITHMS[name.split("_")[0]][0], TargetAlgorithm)}
    assert targets <= {*CARRYING_BETA, "ddtplinear_lenet_cifar10"}  # that of the latter is a test of its own


@pytest.mark.parametrize(
    "config",
    [name for name in RUNS if "ldrl_" in name and name.endswith(("_digits.yaml", "_imagefolder.yaml", "_svhn.yaml"))],
)
def test_our_own_ldrl_configs_have_the_optimizer_of_backprop(config: str) -> None:
    ours, backprop = (_model(name)["model"]["init_args"] for name in (config, f"backprop_{config.partition('_')[2]}"))
    assert ours["optimizer"] == backprop["optimizer"]
    assert ours.get("scheduler") == backprop.get("scheduler")


def test_parallel_ldrl_holds_the_defaults_of_its_authors_program() -> None:
    arguments = _model("parallelldrl_simplevgg_cifar10.yaml")["model"]["init_args"]

    assert (arguments["noise"], arguments["iterations"], arguments["samples"]) == ([0.4, 0.4, 0.2, 0.2, 0.08], 1, 10)
    step = ("feedback_step", "feedback_lr", "feedback_decay")
    assert [arguments[name] for name in step] == ["adam", 3e-4, 1e-4]
    assert (arguments["mirror"], arguments["switches"]) == ("paper", "noisy")


class Reported(NamedTuple):
    """Settings of a program of Meulemans et al.'s: Adam's for both sides, its decay for the feedback."""

    lr: float  # before division by eta
    eta: float
    feedback_lr: float
    sigma: float
    feedback_decay: float
    betas: tuple[float, float]
    eps: float
    feedback_betas: tuple[float, float]
    feedback_eps: float


REPORTED = {
    "ddtplinear": Reported(
        2.035e-5, 0.0610, 1.638e-4, 0.0908, 5.8e-7, (0.9, 0.999), 1.255e-8, (0.999, 0.999), 2.838e-4
    ),
    "dtpdrl": Reported(2.969e-5, 0.0686, 2.012e-5, 0.0569, 5.4e-6, (0.9, 0.99), 1.001e-8, (0.99, 0.999), 5.084e-8),
    "ddtprhl": Reported(2.805e-5, 0.0435, 3.024e-4, 0.0416, 1.6e-3, (0.9, 0.99), 3.984e-8, (0.9, 0.999), 3.403e-6),
    "ddtpcontrol": Reported(8.883e-5, 0.0942, 1.871e-4, 0.00872, 4.0e-4, (0.9, 0.999), 5.553e-8, (0.9, 0.999), 1.23e-8),
}
BATCH, UNITS = 128, 256


@pytest.mark.parametrize("name", list(REPORTED))
def test_imagefolder_configs_of_the_drl_family_hold_the_published_figures(name: str) -> None:
    """Theirs are means over the batch, without 1/2, of a step that carries eta; the feedback's also over units."""
    settings = _model(f"{name}_mlp_imagefolder.yaml")
    arguments = settings["model"]["init_args"]
    reported = REPORTED[name]
    forward, feedback = (arguments[side]["init_args"] for side in ("optimizer", "feedback_optimizer"))

    assert (arguments["beta"], arguments["feedback_lr"], arguments["noise"]) == (
        reported.eta,
        reported.feedback_lr,
        reported.sigma,
    )
    assert {arguments[side]["class_path"] for side in ("optimizer", "feedback_optimizer")} == {"torch.optim.Adam"}
    assert forward["lr"] * reported.eta == pytest.approx(reported.lr, rel=1e-3)
    assert forward["eps"] == pytest.approx(reported.eps * BATCH / (2 * reported.eta), rel=1e-6)
    assert feedback["eps"] == pytest.approx(reported.feedback_eps * UNITS, rel=1e-6)
    assert (forward["betas"], feedback["betas"]) == (list(reported.betas), list(reported.feedback_betas))
    assert arguments["feedback_decay"] == pytest.approx(reported.feedback_decay * UNITS / 2, rel=1e-3)
    assert arguments["network"]["init_args"] == {"hidden": [UNITS] * 5, "activation": "tanh"}
    assert settings["data"]["init_args"]["batch_size"] == BATCH
    epochs = arguments["feedback_pretraining_epochs"] + 100 * (1 + arguments["extra_feedback_epochs"])
    assert settings["trainer"]["max_epochs"] == epochs


def test_the_convolutional_ddtp_config_holds_the_published_figures() -> None:
    """Theirs are means over the units of a conv stage, too."""
    arguments = _model("ddtplinear_lenet_cifar10.yaml")["model"]["init_args"]
    eta, units = 0.01596, [32 * 16 * 16, 64 * 8 * 8, 512]

    assert (arguments["beta"], arguments["feedback_lr"], arguments["noise"]) == (eta, 4.516e-3, 0.00921)
    reported = [2.594e-4, 8.855e-4, 1.423e-4, 3.387e-6]
    assert [lr * eta for lr in arguments["forward_lr"]] == pytest.approx(reported, rel=1e-3)
    assert arguments["feedback_decay"] == pytest.approx([6.2e-5 * count / 2 for count in units], rel=1e-3)
    means = zip([2.787e-8, 1.987e-8, 4.515e-6, 4.046e-5], [*units[:2], 1, 1], strict=True)
    expected = [eps * BATCH * count / (2 * eta) for eps, count in means]
    assert arguments["forward_eps"] == pytest.approx(expected, rel=1e-6)
    assert arguments["feedback_eps"] == pytest.approx([7.529e-7 * count for count in units], rel=1e-6)
    assert arguments["optimizer"] == {"class_path": "torch.optim.Adam"}


def test_every_method_has_a_name_for_people() -> None:
    assert set(METHODS) == set(ALGORITHMS)


def test_smoke_layer_takes_seconds_not_epochs() -> None:
    smoke = _model("smoke.yaml")

    assert smoke["trainer"]["max_epochs"] == 1
    assert max(smoke["data"]["init_args"].values()) <= 64
