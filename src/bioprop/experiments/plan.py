"""A comparison: its rows, the runs they need, and the folder that keeps all of it."""

import json
import math
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
STORED = ("rows", "seeds", "lr_factors", "commands", "rounds", "equal_time")
#: Seed of the trials, far from those of the runs that are reported.
TRIAL_SEED, MOST_SEEDS = 1_000_000, 1000
#: Most trials of a row beyond the factors that were asked for.
MOST_ROUNDS = 4


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
    def is_missing(self) -> bool:
        """Whether the run is still to be done: it has not ended, or failed and is to be tried again."""
        result = self.result
        return result is None or result.status == "failed"

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
        rounds: number of further trials of every row, at factors that follow from its trials before.
        equal_time: seconds of training for every row, which its number of epochs follows from; None for equal epochs.
    """

    folder: Path
    rows: dict[str, Settings] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    lr_factors: list[float] = field(default_factory=lambda: [1.0])
    commands: list[str] = field(default_factory=list)
    rounds: int = 0
    equal_time: float | None = None

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

    def admit(
        self, rows: Mapping[str, Settings], seeds: int, lr_factors: Sequence[float], equal_time: float | None = None
    ) -> None:
        """Take rows into the comparison.

        Raises:
            UserError: if one breaks a rule, or is there already with other settings.
        """
        for name, before, now in (
            ("lr_factors", self.lr_factors, list(lr_factors)),
            ("equal_time", self.equal_time, equal_time),
        ):
            if self.rows and before != now:
                raise UserError(
                    f"the results folder was made with {name} {before}, and now it is {now}: choose another --folder, "
                    "or take the old value"
                )
        for name, settings in rows.items():
            check_alone(name, settings)
            if name in self.rows:
                check_unchanged(name, self.rows[name], settings)
            if list(lr_factors) != [1.0]:
                learning_rates(name, settings)
        check_fair({**self.rows, **rows}, epochs_differ=equal_time is not None)
        self.rows |= rows
        self.lr_factors, self.equal_time = list(lr_factors), equal_time
        self.seeds |= {name: max(seeds, self.seeds.get(name, 0)) for name in rows}

    def save(self, command: str = "") -> None:
        """Write ``comparison.json`` and a configuration file for each row."""
        if command and command not in self.commands:
            self.commands.append(command)
        for name, settings in self.rows.items():
            write_whole(self.config(name), yaml.safe_dump(settings, sort_keys=False))
        stored = {name: getattr(self, name) for name in STORED}
        write_whole(self.folder / MANIFEST, json.dumps(stored, indent=1))

    def config(self, row: str) -> Path:
        """The configuration file of a row."""
        return self.folder / "configs" / f"{row}.yaml"

    def trials(self, row: str) -> list[Run]:
        """The runs that choose the learning rate of a row, as far as they are known; none where there is no choice."""
        if len(self.lr_factors) == 1:
            return []
        return [self._trial(row, factor) for factor in self._factors(row)]

    def _trial(self, row: str, factor: float) -> Run:
        return Run(row, self.folder / "trials" / row / f"x{factor:g}", TRIAL_SEED, factor, True)

    def _factors(self, row: str) -> list[float]:
        """Those that were asked for, and one a round, chosen by the trials before it."""
        factors = list(self.lr_factors)
        for _ in range(self.rounds):
            if (scores := self._scores(row, factors)) is not None:
                factors.append(next_factor(scores))
        return factors

    def _scores(self, row: str, factors: Sequence[float]) -> dict[float, float] | None:
        """Validation accuracy by factor; -1 for a trial that diverged, None as long as one is missing."""
        results = {factor: self._trial(row, factor).result for factor in factors}
        if any(result is None or result.status == "failed" for result in results.values()):
            return None
        return {
            factor: result.best_val_accuracy or 0.0 if result and result.status == "finished" else -1.0
            for factor, result in results.items()
        }

    def is_at_edge(self, row: str) -> bool:
        """Return whether the best trial is the smallest or the largest, so that a better rate may lie beyond."""
        scores = self._scores(row, self._factors(row)) if len(self.lr_factors) > 1 else None
        return scores is not None and best_factor(scores) in (min(scores), max(scores))

    def needs_round(self, rows: Sequence[str]) -> bool:
        """Return whether all rows get one more trial: the best of one is at the edge, and nothing is decided yet."""
        undecided = self.rounds < MOST_ROUNDS and not (self.folder / "runs").exists()
        return undecided and any(self.is_at_edge(row) for row in rows)

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
        if len(self.lr_factors) == 1:
            return self.lr_factors[0]
        scores = self._scores(row, self._factors(row)) or {}
        return best_factor(scores) if max(scores.values(), default=-1.0) >= 0.0 else None

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


def best_factor(scores: Mapping[float, float]) -> float:
    """The factor of the best score, the smaller of equals."""
    return max(scores, key=lambda factor: (scores[factor], -factor))


def next_factor(scores: Mapping[float, float]) -> float:
    """The factor to try next: beyond the best where that is at an edge, or else between it and its better neighbour."""
    tried = sorted(scores)
    at = tried.index(best_factor(scores))
    if at == 0:
        factor = tried[0] ** 2 / tried[1]
    elif at == len(tried) - 1:
        factor = tried[-1] ** 2 / tried[-2]
    else:
        factor = math.sqrt(tried[at] * max(tried[at - 1], tried[at + 1], key=lambda each: scores[each]))
    return float(f"{factor:.4g}")


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
