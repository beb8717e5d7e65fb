"""A run's ``config.yaml``: what it was trained with, and nothing that was refused."""

import yaml
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import SaveConfigCallback

from bioprop.runs.folder import goes_on, refuse_to_replace, run_folder
from bioprop.runs.wandb import describe_run, leave_hyperparameters


class SaveRunConfig(SaveConfigCallback):
    """Save the resolved configuration as ``config.yaml`` in the run's own folder, whatever the logger.

    Where a run goes on, the file is replaced as soon as all settings have been compared with the checkpoint's. It does
    not say so (``ckpt_path``): ``fit --config`` on it trains the whole run again.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save what an evaluation does.

        Raises:
            UserError: if its files would replace another run's.
        """
        if stage != "fit":
            refuse_to_replace(trainer, stage)
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what a new run trains.

        Raises:
            UserError: if its files would replace another run's.
        """
        if goes_on(trainer, self.config.checkpoint.dirpath):
            leave_hyperparameters(trainer)
        else:
            refuse_to_replace(trainer, "fit")
            super().setup(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what a run that goes on trains."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; that of a run which is evaluated in its own folder stays."""
        path = run_folder(trainer) / self.config_filename
        config = self.config.clone()
        if stage == "fit" and goes_on(trainer, config.checkpoint.dirpath):
            config.ckpt_path = None
        path.parent.mkdir(parents=True, exist_ok=True)
        if stage == "fit" or not path.exists():
            self.parser.save(config, str(path), skip_none=False, overwrite=True)
        describe_run(trainer, yaml.safe_load(path.read_text()))
