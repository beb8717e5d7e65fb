"""The command line: folders, checkpoints, conflicts, and a user's mistakes."""

import csv
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from bioprop.algorithms import (
    DTPDRL,
    LDRL,
    DDTPLinear,
    DifferenceReconstruction,
    FixedWeightDTP,
    TargetAlgorithm,
)
from bioprop.algorithms.direct_difference_targets import DirectDifferenceTargets
from bioprop.catalogue import entries
from bioprop.cli import main
from bioprop.errors import UserError

TINY = [
    "--model.network=LeNet",
    "--model.network.channels=[4,4]",
    "--model.network.hidden=8",
    "--data=Digits",
    "--data.limit_train=64",
    "--data.limit_val=32",
    "--data.limit_test=30",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
LDRL_TINY = ["--model=LDRL", "--model.iterations=2", *TINY]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("algorithm", sorted(entries("model")))
def test_every_algorithm_starts_by_its_name_alone(algorithm: str) -> None:
    network = {"GAITProp": "InvertibleMLP", "PEPITA": "MLP"}.get(algorithm, "LeNet")
    words = [f"--model={algorithm}", f"--model.network={network}", "--data=Digits", "--trainer.max_epochs=0"]
    main(["fit", *words, "--trainer.logger=false", "--trainer.enable_model_summary=false"])


def test_run_folder_holds_config_metrics_and_checkpoints() -> None:
    cli = main(["fit", *LDRL_TINY, "--trainer.max_epochs=2"])

    run = Path("runs/ldrl_lenet_digits/version_0")
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "metrics.csv", "checkpoints"}
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["iterations"] == 2
    assert resolved["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.SGD"
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"train/loss", "train/accuracy", "val/accuracy", "val/accuracy_top5", "train/feedback_loss"} <= set(rows[0])
    assert {"angle/conv1", "angle/overall", "norm_ratio/fc1", "train/seconds"} <= set(rows[0])
    assert len([row for row in rows if row["train/loss"]]) == 2
    assert cli.trainer.checkpoint_callback.best_model_path.endswith("version_0/checkpoints/best.ckpt")


def test_image_shape_and_classes_flow_from_data_to_network() -> None:
    cli = main(["fit", *LDRL_TINY, "--trainer.max_epochs=1", "--data.image_size=32"])

    assert cli.model.network.settings["image_shape"] == [1, 32, 32]
    assert cli.model.network.settings["num_classes"] == 10


def test_evaluation_commands_use_the_checkpoint_of_an_earlier_process() -> None:
    trained = main(["fit", *LDRL_TINY, "--trainer.max_epochs=1"])

    validated = main(["validate", *LDRL_TINY, "--ckpt_path=last"])
    assert validated.trainer.callback_metrics["val/loss"] == trained.trainer.callback_metrics["val/loss"]
    tested = main(["test", *LDRL_TINY, "--ckpt_path=best"])
    predicted = main(["predict", *LDRL_TINY, "--ckpt_path=best"])
    with (Path(predicted.trainer.log_dir) / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    truth = [str(label) for label in predicted.datamodule.resident["test"].labels.tolist()]
    right = sum(row["prediction"] == label for row, label in zip(rows, truth, strict=True))
    assert right / 30 == pytest.approx(float(tested.trainer.callback_metrics["test/accuracy"]))


def test_resumed_run_equals_uninterrupted_run() -> None:
    whole = main(["fit", *LDRL_TINY, "--trainer.max_epochs=3"])
    again = [*LDRL_TINY, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.name=halves"]
    main(["fit", *again, "--trainer.max_epochs=1"])
    resumed = main(["fit", *again, "--trainer.max_epochs=3", "--ckpt_path=last"])

    assert resumed.trainer.global_step == whole.trainer.global_step
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("--model.beta=0.7", "beta was 0.05 and is now 0.7"),
        ("--model.network.hidden=9", "network.init_args.hidden was 8 and is now 9"),
        ("--data.seed=1", "data.seed was 0 and is now 1"),
        ("--model.optimizer.lr=0.5", "optimizer.lr was 0.02 and is now 0.5"),
    ],
)
def test_resuming_under_other_settings_is_refused(changed: str, named: str) -> None:
    main(["fit", *LDRL_TINY, "--trainer.max_epochs=1"])

    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        main(["fit", *LDRL_TINY, "--trainer.max_epochs=2", "--ckpt_path=last", changed])


@pytest.mark.parametrize(
    ("command", "changed", "named"),
    [
        ("fit", "--seed_everything=7", "seed_everything 0 and now it is 7"),
        ("fit", "--trainer.gradient_clip_val=2", "trainer.gradient_clip_val None and now it is 2"),
        ("validate", "--data.seed=5", "data.seed was 0 and is now 5"),
        ("test", "--data.normalization=none", "data.normalization was train and is now none"),
    ],
)
def test_what_would_falsify_a_command_is_refused(command: str, changed: str, named: str) -> None:
    main(["fit", *LDRL_TINY, "--trainer.max_epochs=1"])

    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        main([command, *LDRL_TINY, "--ckpt_path=last", changed])


def test_evaluation_uses_the_statistics_and_classes_of_training() -> None:
    for split, classes in (("train", "ab"), ("test", "ab"), ("other/train", "bc"), ("other/test", "bc")):
        for label in classes:
            folder = Path(f"images/{split}" if "/" not in split else split, label)
            folder.mkdir(parents=True)
            for number in range(6):
                Image.new("L", (16, 16), 20 * number + 5 * ord(label) - 400).save(folder / f"{number}.png")
    folder = ["--model=Backprop", "--data=ImageFolder", *[word for word in TINY if not word.startswith("--data")]]
    trained = main(["fit", *folder, "--data.data_dir=images", "--trainer.max_epochs=1"])
    tested = main(["test", *folder, "--data.data_dir=images", "--data.limit_train=2", "--ckpt_path=last"])

    device = torch.device("cpu")
    assert torch.equal(trained.datamodule.statistics(device)[0], tested.datamodule.statistics(device)[0])
    with pytest.raises(UserError, match="trained on the classes a, b, but these images have b, c"):
        main(["test", *folder, "--data.data_dir=other", "--ckpt_path=last"])
    with pytest.raises(UserError, match=r"data\.background was white and is now black"):
        main(["test", *folder, "--data.data_dir=images", "--data.background=black", "--ckpt_path=last"])


def test_a_checkpoint_copied_elsewhere_resumes_whatever_lies_around_it() -> None:
    trained = main(["fit", *LDRL_TINY, "--trainer.max_epochs=1"])
    Path("copies").mkdir()
    for copy in ("mine.ckpt", "copies/mine.ckpt"):
        Path(copy).write_bytes(Path(trained.trainer.checkpoint_callback.last_model_path).read_bytes())
    Path("config.yaml").write_text("something: else")  # another program's

    for copy in ("mine.ckpt", "copies/mine.ckpt"):
        resumed = main(["fit", *LDRL_TINY, "--trainer.max_epochs=2", f"--ckpt_path={copy}"])
        assert resumed.trainer.global_step == 2 * trained.trainer.global_step


def test_another_algorithms_checkpoint_is_refused() -> None:
    main(["fit", *LDRL_TINY, "--trainer.max_epochs=1"])

    checkpoint = "runs/ldrl_lenet_digits/version_0/checkpoints/last.ckpt"
    with pytest.raises(UserError, match="algorithm was LDRL and is now Backprop"):
        main(["test", "--model=Backprop", *TINY, f"--ckpt_path={checkpoint}"])


def test_cli_made_checkpoint_loads_as_plain_data_and_as_algorithm() -> None:
    cli = main(["fit", *LDRL_TINY, "--trainer.max_epochs=1"])

    path = cli.trainer.checkpoint_callback.last_model_path
    assert torch.load(path, weights_only=True)["hyper_parameters"]["beta"] == 0.05
    loaded = LDRL.load_from_checkpoint(path)
    images = torch.randn(4, 1, 16, 16)
    assert torch.equal(loaded(images), cli.model.to("cpu")(images))
    for name, mirror in cli.model.feedback.items():
        assert torch.equal(mirror.weight, loaded.feedback[name].weight)


def test_evaluation_without_checkpoint_is_refused() -> None:
    with pytest.raises(UserError, match="needs --ckpt_path"):
        main(["test", *LDRL_TINY])


def test_missing_checkpoint_is_named() -> None:
    with pytest.raises(UserError, match=r"no run in runs/ldrl_lenet_digits has written last\.ckpt"):
        main(["fit", *LDRL_TINY, "--ckpt_path=last"])
    with pytest.raises(UserError, match=r"nowhere\.ckpt: there is no such file"):
        main(["fit", *LDRL_TINY, "--ckpt_path=nowhere.ckpt"])


def test_diverging_run_stops_names_the_culprit_and_keeps_the_checkpoint() -> None:
    wild = ["--model.feedback_step=sgd", "--model.feedback_lr=1e9", "--trainer.max_epochs=1"]
    with pytest.raises(
        UserError, match=r"feedback weights of stage \w+ grew beyond all bounds: lower model\.feedback_lr"
    ):
        main(["fit", *LDRL_TINY, *wild])
    assert not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model=Foo", "--data=Digits"], "Foo, which is not a class that can be used here: choose one of "),
        (["--model=LDRL", "--model.network=Foo", "--data=Digits"], "choose one of "),
        ([*LDRL_TINY, "--model.noize=1"], "did you mean noise?"),
        ([*LDRL_TINY, "--model.spead.bfloat16=true"], "did you mean --model.speed.bfloat16?"),
        (
            [*LDRL_TINY, "--trainer.max_epocs=3"],
            "there is no option --trainer.max_epocs: did you mean --trainer.max_epochs?",
        ),
        ([*LDRL_TINY, "--dta.seed=3"], "there is no option --dta.seed: did you mean --data.seed?"),
        ([*LDRL_TINY, "--foo=3"], "there is no option --foo: is it misspelt? bioprop fit --help-all lists them"),
        ([*LDRL_TINY, "--data.data_dir=there"], "no argument data_dir in this place: it belongs to "),
        ([*LDRL_TINY, "--model.noise=loud"], "noise is loud, but it must be 'auto' or a number or a list"),
        (
            [*LDRL_TINY, "--model.iterations=2.5"],
            "iterations is 2.5, but it must be 'auto' or a whole number or a list",
        ),
        ([*LDRL_TINY, "--model.feedback_lr=aut"], "feedback_lr is aut, but it must be 'auto' or a number or a list"),
        ([*LDRL_TINY, "--model.second_noise=ecko"], "but it must be one of 'independent', 'expected', 'echo'"),
        ([*LDRL_TINY, "--model.second_noise=independent"], "noise, feedback_lr: auto follows from the sizes"),
        ([*LDRL_TINY, "--model.feedback_step=sgd"], "with feedback_step sgd give a number, such as 0.01"),
        ([*LDRL_TINY, "--model.noise=[0.1,0.2]"], "3 stages need one each (conv2, fc1, fc2)"),
        ([*LDRL_TINY, "--model.mirror=foo"], "mirror is foo, but it must be one of 'paper', 'exact'"),
        ([*LDRL_TINY, "--model.network.activation=gelu"], "activation is gelu, but it must be one of 'elu'"),
        (["--model=LDRL", "--data=Digits"], "network must be given"),
        (["--config=nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["--model=LDRL", "--model.network=SimpleVGG", "--data=Digits"], "SimpleVGG's conv5 does not fit"),
        (["--model=LDRL", "--model.network=LeNet", "--data=ImageFolder", "--data.data_dir=nowhere"], "'nowhere'"),
        (["--model=LDRL", "--model.network=LeNet", "--data=ImageFolder", "--data.data_dir=empty"], "cat"),
        ([*LDRL_TINY, "--trainer.accelerator=foo"], "accelerator"),
        (
            [*LDRL_TINY, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=/proc/nowhere"],
            "/proc/nowhere: No such",
        ),
        ([*LDRL_TINY, "--ckpt_path=noise.ckpt"], "noise.ckpt cannot be read as a checkpoint"),
        ([*LDRL_TINY, "--model.optimizer.lr=-1"], "Invalid learning rate: -1.0"),
        ([*LDRL_TINY, "--model.optimizer=LBFGS"], "LBFGS needs the loss several times"),
        ([*LDRL_TINY, "--model.scheduler=StepLR"], "step_size must be given"),
        ([*LDRL_TINY, "--model.scheduler=ReduceLROnPlateau"], "pytorch_lightning.cli.ReduceLROnPlateau"),
        ([*LDRL_TINY, "--seed_everything=-1"], "seed_everything is -1"),
        ([*LDRL_TINY, "--model.network.num_classes=7"], "num_classes of the network is decided by the data"),
        (
            ["--model=Algorithm", "--data=Digits"],
            "Algorithm, which is not a class that can be used here: choose one of",
        ),
        (["--model=mine.Algorithm", "--data=Digits"], "mine.Algorithm, which is not found from here: No module named"),
        (["--config=empty.yaml"], "empty.yaml: this file gives no options by name"),
        (["--config=tab.yaml"], "tab.yaml: this file of options is not valid YAML, at line 2"),
        ([*LDRL_TINY, "--checkpoint.every_n_train_steps=5"], "--checkpoint.every_n_batches N saves every N batches"),
        ([*LDRL_TINY, "--checkpoint.save_last=true"], "last.ckpt is always kept"),
        ([*LDRL_TINY, "--trainer.precision=16-mixed"], "16-mixed is not supported by LDRL, since"),
        ([*LDRL_TINY, "--trainer.precision=16"], "choose one of 32-true, 64-true, bf16-mixed"),
        ([*LDRL_TINY, "--trainer.precision=16-true"], "16-true is not supported by LDRL, since"),
        ([*LDRL_TINY, "--trainer.precision=bf16-true"], "loses every step below 1/512"),
        ([*LDRL_TINY, "--trainer.precision=transformer-engine"], "transformer-engine is not supported by LDRL"),
        ([*LDRL_TINY, "--trainer.precision=8"], "precision is 8, but it must be one of 32-true, 64-true, bf16-mixed"),
    ],
)
def test_mistakes_end_in_one_sentence_and_status_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("cat", "dog"):
        Path("empty/train", label).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save("empty/train/dog/0.png")
    Path("noise.ckpt").write_bytes(b"hello")
    Path("empty.yaml").write_text("")
    Path("tab.yaml").write_text("model:\n\tclass_path: LDRL\n")

    with pytest.raises((SystemExit, UserError)) as caught:
        main(["fit", *arguments, "--trainer.max_epochs=1"])
    said = str(caught.value) if caught.type is UserError else capsys.readouterr().err
    assert caught.type is UserError or caught.value.code == 2
    assert sentence in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1


def test_a_precision_is_refused_before_a_folder_is_made() -> None:
    with pytest.raises(UserError, match="16-mixed is not supported"):  # on a CPU, too, where Lightning takes another
        main(["fit", *LDRL_TINY, "--trainer.precision=16-mixed"])
    assert not Path("runs").exists()


def test_a_whole_run_in_bf16_mixed() -> None:
    first = main(["fit", *LDRL_TINY, "--trainer.precision=bf16-mixed", "--trainer.max_epochs=1"])
    resumed = main(["fit", *LDRL_TINY, "--trainer.precision=bf16-mixed", "--trainer.max_epochs=2", "--ckpt_path=last"])
    assert resumed.trainer.global_step == 2 * first.trainer.global_step
    tested = main(["test", *LDRL_TINY, "--trainer.precision=bf16-mixed", "--ckpt_path=best"])
    assert 0.0 <= tested.trainer.callback_metrics["test/accuracy"] <= 1.0
    main(["predict", *LDRL_TINY, "--trainer.precision=bf16-mixed", "--ckpt_path=best"])
    assert list(Path("runs").rglob("predictions.csv"))


def test_only_algorithms_can_be_named_as_one() -> None:
    """What they share is no method by itself, and is not offered."""
    bases = DifferenceReconstruction, DirectDifferenceTargets, TargetAlgorithm
    assert all(inspect.isabstract(cls) for cls in bases)
    assert not any(inspect.isabstract(cls) for cls in (LDRL, DTPDRL, DDTPLinear, FixedWeightDTP))


def test_process_prints_the_sentence_and_exits_with_2() -> None:
    arguments = [*LDRL_TINY, "--data.batch_size=0"]
    done = subprocess.run(
        [sys.executable, "-m", "bioprop", "fit", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("bioprop: error: batch_size is 0")


@pytest.mark.parametrize("command", [["fit", "--config=ldrl_lenet_digits"], ["compare"]])
def test_ctrl_c_while_libraries_are_imported_leaves_no_traceback(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")  # imported first of all that takes long
    words = [sys.executable, "-m", "bioprop", *command]
    source = str(Path(main.__code__.co_filename).parents[1])
    paths = os.pathsep.join([str(tmp_path), source])
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths})
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr in ("", "bioprop fit: LDRL trains LeNet on Digits for 12 epochs (loading torch and Lightning)\n")


def test_help_shows_each_classes_own_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for cls, own in (("LDRL", "--model.iterations"), ("DTP", "--model.feedback_momentum")):
        with pytest.raises(SystemExit) as left:
            main(["fit", f"--model.help={cls}"])
        assert left.value.code == 0
        assert own in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # wandb's own, on start-up
def test_wandb_keeps_config_and_checkpoints_in_the_runs_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    layer = Path(__file__).parents[1] / "lightning_configs" / "wandb.yaml"
    cli = main(["fit", *LDRL_TINY, f"--config={layer}", "--trainer.max_epochs=1"])

    run = Path("runs/bioprop") / cli.trainer.logger.version
    assert (run / "config.yaml").is_file()
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert not Path("config.yaml").exists()
