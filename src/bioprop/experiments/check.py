"""``bioprop check``: is an algorithm really at work on a network, and does it do what its theory says?"""

import copy
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.cli import ArgsType
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bioprop.algorithms import Algorithm
from bioprop.cli import BiopropCLI
from bioprop.cli import main as run
from bioprop.errors import DivergenceError
from bioprop.experiments.findings import Checked, Finding, check_algorithm, judged

USAGE = """usage: bioprop check --model CLASS --model.network CLASS [options of bioprop fit]

Trains a few batches and looks closely: which stages learn and by which feedback, gradients against BP's in float64
where theory says that they are equal, feedback learning on white noise and on the images, what the optimizer moves,
and the cost of a batch. The images are those of --data, or 1,797 handwritten digits. Writes nothing.

Exit status: 0 if all is right, 1 if something is wrong, 2 for a mistake in the options."""

#: Batches that are trained on.
BATCHES = 5
MARKS = {"right": "[green]right[/green]", "wrong": "[bold red]WRONG[/bold red]", "note": "note"}


class Watch(Callback):
    """Keeps the first batch, and the movement of the forward weights in a few batches of training."""

    def __init__(self) -> None:
        self.batch: tuple[Tensor, Tensor] | None = None
        self.losses: list[float] = []
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the weights are."""
        self.before = {name: each.detach().clone() for name, each in _network(pl_module).named_parameters()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the first batch, as the algorithm sees it."""
        if self.batch is None:
            self.batch = batch[0].detach().clone(), batch[1].detach().clone()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss, and where the weights are now."""
        self.losses.append(float(outputs["loss"]))
        self.after = {name: each.detach().clone() for name, each in _network(pl_module).named_parameters()}


def _network(module: LightningModule) -> nn.Module:
    assert isinstance(module, Algorithm)
    return module.network


def check_steps(watch: Watch, trainable: Iterable[str]) -> Iterator[Finding]:
    """Judge what the optimizer has done.

    Args:
        watch: callback of the training.
        trainable: names of the forward parameters that are not frozen.
    """
    sizes = {
        name: float((watch.after[name] - value).norm() / value.norm().clamp_min(1e-12))
        for name, value in watch.before.items()
        if name in set(trainable) and watch.after
    }
    unmoved = sorted(name for name, size in sizes.items() if size == 0.0)
    yield judged(
        "the optimizer moves every weight",
        bool(sizes) and not unmoved,
        ", ".join(unmoved) or f"{len(sizes)} tensors in {len(watch.losses)} batches",
        "is the learning rate 0, or the optimizer made for other parameters?",
    )
    weights = {name: size if math.isfinite(size) else math.inf for name, size in sizes.items()}
    largest = max((name for name in weights if watch.before[name].dim() > 1), key=weights.__getitem__, default="")
    if largest:
        yield judged(
            "steps are small beside the weights",
            weights[largest] < 1.0,
            f"{weights[largest]:.2g} of the norm of {largest} in {len(watch.losses)} batches",
            "exploding norms: lower the learning rate of model.optimizer",
        )
    yield judged(
        "the loss stays finite",
        all(map(math.isfinite, watch.losses)),
        " → ".join(f"{loss:.3g}" for loss in (*watch.losses[:1], *watch.losses[-1:])),
        "lower the learning rate of model.optimizer",
    )


class CheckCLI(BiopropCLI):
    """The command line of a run, which is trained for a few batches and leaves nothing behind."""

    def __init__(self, args: ArgsType, watch: Watch) -> None:
        self._watch = watch
        self.fresh: Algorithm
        super().__init__(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Watch the training, and say no last words."""
        self.trainer_defaults["callbacks"] = [
            each for each in self.trainer_defaults["callbacks"] if type(each).__name__ == "DivergenceGuard"
        ]
        self.trainer_defaults["callbacks"].append(self._watch)
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        """Keep the algorithm as it was made."""
        super().after_instantiate_classes()
        self.fresh = copy.deepcopy(self.model)


def check(words: Sequence[str]) -> tuple[str, Checked]:
    """Check what the options of a run name.

    Args:
        words: options of ``bioprop fit``; without data, the digits.

    Returns:
        What was checked, and what was found.

    Raises:
        UserError: for a mistake in the options.
    """
    data = [] if any(word.split("=")[0] in ("-c", "--config", "--data") for word in words) else ["--data=Digits"]
    watch, diverged = Watch(), ""
    with TemporaryDirectory() as scratch:
        options = {
            "logger": "false",
            "default_root_dir": scratch,
            "enable_checkpointing": "false",
            "enable_progress_bar": "false",
            "enable_model_summary": "false",
            "max_epochs": 1,
            "limit_train_batches": BATCHES,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
        }
        quiet = [f"--trainer.{name}={value}" for name, value in options.items()]
        made: list[CheckCLI] = []

        def command_line(args: ArgsType) -> BiopropCLI:
            cli = CheckCLI.__new__(CheckCLI)
            made.append(cli)
            cli.__init__(args, watch)  # type: ignore[misc]
            return cli

        try:
            run(["fit", *words, *data, "--alignment.every_n_epochs=0", *quiet], command_line)
        except DivergenceError as error:
            diverged = str(error)
    cli = made[0]
    assert watch.batch is not None
    fresh = cli.fresh.to("cpu")
    checked = check_algorithm(fresh, *(each.cpu() for each in watch.batch))
    trainable = [name for name, each in fresh.network.named_parameters() if each.requires_grad]
    findings = [*checked.findings[:-1], *check_steps(watch, trainable), checked.findings[-1]]
    if diverged:
        findings.append(Finding("training goes on", "wrong", diverged, "see the sentence"))
    title = f"{type(fresh).__name__} on {type(fresh.network).__name__}, {type(cli.datamodule).__name__}"
    return title, Checked(checked.stages, findings)


def show(title: str, checked: Checked, console: Console) -> None:
    """Print both tables."""
    stages = Table(title=title, title_justify="left")
    for heading in ("stage", "kind", "weights", "feedback", "feedback to weights", "update to BP", "norm, x BP"):
        stages.add_column(heading)
    for row in checked.stages:
        course = " → ".join(f"{angle:.0f}°" for angle in row.course) or "-"
        figures = ("-", "-") if math.isnan(row.angle) else (f"{row.angle:.1f}°", f"{row.ratio:.2g}")
        stages.add_row(row.name, row.kind, f"{row.parameters:,}", row.feedback, course, *figures)
    findings = Table()
    for heading in ("", "property", "found", "what to change"):
        findings.add_column(heading, overflow="fold")
    for finding in checked.findings:
        findings.add_row(MARKS[finding.verdict], finding.what, finding.found, finding.advice)
    console.print(stages)
    console.print(findings)
    wrong = sum(finding.verdict == "wrong" for finding in checked.findings)
    console.print("nothing is wrong" if checked.is_right else f"{wrong} wrong")


def main(words: Sequence[str]) -> int:
    """Run ``bioprop check``.

    Args:
        words: what follows on the command line.

    Returns:
        The exit status: 1 if something is wrong.
    """
    if not words or "--help" in words or "-h" in words:
        sys.stdout.write(f"{USAGE}\n")
        return 0
    title, checked = check(words)
    console = Console()
    show(title, checked, console if console.is_terminal else Console(width=160))
    return int(not checked.is_right)
