"""A comparison: its rows, the runs they need, and the folder that keeps all of it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml
from filelock import FileLock, Timeout

from bioprop.errors import UserError
from bioprop.experiments.configs import Settings
from bioprop.experiments.fairness import check_alone, check_fair, check_unchanged
from bioprop.experiments.results import Result, Test, write_whole

MANIFEST, LOCK = "comparison.json", ".lock"
#: Seed of the trials, far from those of the runs that are reported.
TRIAL_SEED, MOST_SEEDS = 1_000_000, 1000


class Run(NamedTuple):
    """A run of a row.

    Attributes:
        row: name of the row.
        folder: folder of its files.
        seed: seed of weights and noise.
        factor: by which its learning rate is multiplied.
        is_trial: true if it only tries a learning rate, on validation images.
    """

    row: str
    folder: Path
    seed: int
    factor: float
    is_trial: bool

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.row} {f'trial x{self.factor:g}' if self.is_trial else f'seed {self.seed}'}"

    @property
    def result(self) -> Result | None:
        """Return the result; None if the run has not ended."""
        return Result.load(self.folder)

    @property
    def test(self) -> Test | None:
        """Return the accuracy on the test images; None if they were not read."""
        return Test.load(self.folder)


@dataclass
class Comparison:
    """The content of a results folder; stored in its ``comparison.json``.

    Attributes:
        folder: the results folder.
        rows: settings of each row by its name, spelled out in full.
        seeds: number of seeds that were asked for, by row.
        lr_factors: tried on the learning rate of each row; one factor is no trial.
        commands: the command lines that made it, without repetitions.
    """

    folder: Path
    rows: dict[str, Settings] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    lr_factors: list[float] = field(default_factory=lambda: [1.0])
    commands: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what the folder holds; a new comparison if it holds none.

        Raises:
            UserError: if the folder holds other files, or is none.
        """
        path = folder / MANIFEST
        if path.is_file():
            try:
                return cls(folder, **json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path} is damaged: choose another --folder, or delete this one") from error
        if folder.exists() and (not folder.is_dir() or any(each.name != LOCK for each in folder.iterdir())):
            kind = "holds other files" if folder.is_dir() else "is a file"
            raise UserError(f"--folder {folder} {kind}: choose an empty or a new folder, or that of a comparison")
        return cls(folder)

    def admit(self, rows: Mapping[str, Settings], seeds: int, lr_factors: Sequence[float]) -> None:
        """Take rows into the comparison.

        Raises:
            UserError: if one breaks a rule, or is there already with other settings.
        """
        if self.rows and list(lr_factors) != self.lr_factors:
            raise UserError(
                f"the results folder holds trials with lr_factors {self.lr_factors}, and now they are "
                f"{list(lr_factors)}: choose another --folder, or take the old ones"
            )
        for name, settings in rows.items():
            check_alone(name, settings)
            if name in self.rows:
                check_unchanged(name, self.rows[name], settings)
            if list(lr_factors) != [1.0]:
                learning_rates(name, settings)
        check_fair({**self.rows, **rows})
        self.rows |= rows
        self.lr_factors = list(lr_factors)
        self.seeds |= {name: max(seeds, self.seeds.get(name, 0)) for name in rows}

    def save(self, command: str) -> None:
        """Write ``comparison.json`` and a configuration file for each row."""
        if command not in self.commands:
            self.commands.append(command)
        for name, settings in self.rows.items():
            write_whole(self.config(name), yaml.safe_dump(settings, sort_keys=False))
        stored = {name: getattr(self, name) for name in ("rows", "seeds", "lr_factors", "commands")}
        write_whole(self.folder / MANIFEST, json.dumps(stored, indent=1))

    def config(self, row: str) -> Path:
        """The configuration file of a row."""
        return self.folder / "configs" / f"{row}.yaml"

    def trials(self, row: str) -> list[Run]:
        """The runs that choose the learning rate of a row; none where there is no choice."""
        if len(self.lr_factors) == 1:
            return []
        folder = self.folder / "trials" / row
        return [Run(row, folder / f"x{factor:g}", TRIAL_SEED, factor, True) for factor in self.lr_factors]

    def runs(self, row: str) -> list[Run]:
        """The runs that are reported; none as long as the learning rate is not chosen."""
        factor = self.chosen_factor(row)
        folder = self.folder / "runs" / row
        seeds = range(0 if factor is None else self.seeds[row])
        return [Run(row, folder / f"seed_{seed}", seed, factor or 1.0, False) for seed in seeds]

    def chosen_factor(self, row: str) -> float | None:
        """The factor of the best trial by validation accuracy, the smaller of equals; None as long as one is missing.

        A trial that diverged is worse than any that finished; None too if all diverged.
        """
        trials = self.trials(row)
        if not trials:
            return self.lr_factors[0]
        results = [(trial.result, trial.factor) for trial in trials]
        if any(result is None or result.status == "failed" for result, _ in results):
            return None
        scores = [
            (result.best_val_accuracy, -factor)
            for result, factor in results
            if result is not None and result.status == "finished" and result.best_val_accuracy is not None
        ]
        return -max(scores)[1] if scores else None

    def arguments(self, run: Run) -> tuple[str, ...]:
        """The arguments of ``bioprop fit`` and ``bioprop test`` for a run."""
        logger = {"save_dir": run.folder.parent.parent, "name": run.folder.parent.name, "version": run.folder.name}
        return (
            f"--config={self.config(run.row)}",
            f"--seed_everything={run.seed}",
            "--trainer.logger=CSVLogger",
            *(f"--trainer.logger.{key}={value}" for key, value in logger.items()),
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            *(f"--model.init_args.{key}={value}" for key, value in self._scaled(run).items() if run.factor != 1.0),
        )

    def learning_rate(self, run: Run) -> tuple[float, ...]:
        """The learning rate of the forward weights; several where each stage has its own."""
        found = list(self._scaled(run).values())[-1:]
        return tuple(rate for value in found for rate in (value if isinstance(value, list) else [value]))

    def _scaled(self, run: Run) -> dict[str, Any]:
        """The learning rates of a run, by their place in ``model.init_args``."""
        rates = learning_rates(run.row, self.rows[run.row], required=run.factor != 1.0)

        def scale(value: Any) -> Any:
            # no digits that only the multiplication made: 0.3 * 0.1 is 0.03
            return [scale(each) for each in value] if isinstance(value, list) else float(f"{run.factor * value:.12g}")

        return {key: scale(value) for key, value in rates.items()}


def learning_rates(name: str, settings: Settings, required: bool = True) -> dict[str, Any]:
    """Find the learning rates of the forward weights in the settings of a row: numbers, or lists of one a stage.

    Raises:
        UserError: if there are none and they are required.
    """
    arguments = settings["model"]["init_args"]
    optimizer = arguments.get("optimizer") or {}
    found = {
        "optimizer.init_args.lr": (optimizer.get("init_args") or {}).get("lr"),
        "forward_lr": arguments.get("forward_lr"),
    }
    rates = {key: value for key, value in found.items() if value is not None}
    if required and not rates:
        raise UserError(f"{name} has no learning rate that --lr_factors could multiply: give its optimizer an lr")
    return rates


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a results folder for this process alone; the system lets go of it when the process dies.

    Raises:
        UserError: if another process holds it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--folder {folder} is a file: choose an empty or a new folder, or that of a comparison")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another bioprop compare is at work in {folder}: wait for it, or choose another --folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
