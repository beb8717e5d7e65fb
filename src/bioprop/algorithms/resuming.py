"""The state that a run goes on from bit for bit, besides weights and optimizers: the epoch's metrics, random states.

Lightning 2.6.6 saves neither the running means of what was logged, nor the metrics' counts, nor random states; a run
that it resumes within an epoch logs the means of what is left of it. Private parts of its loops are used here, and
only here.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning_fabric.utilities.apply_func import convert_tensors_to_scalars
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loops.progress import _ProcessedTracker
from torch import Tensor, distributed
from torchmetrics import Metric

from bioprop.errors import UserError

CPU = torch.device("cpu")
#: What Lightning keeps about a logged value, in terms of the arguments of `LightningModule.log`.
LOGGED_HOW = (
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "metric_attribute",
)


def capture_progress(module: LightningModule) -> dict[str, Any]:
    """Collect, as plain data and tensors, what `restore_progress` brings back; every process must call this."""
    trainer = module.trainer
    return {
        "processes": _of_all_processes({"logged": _logged_so_far(trainer), "random": _random_state(module.device)}),
        "shown": {
            "callback": _all_to(trainer.callback_metrics, CPU),
            "logged": _all_to(trainer.logged_metrics, CPU),
            "progress_bar": dict(trainer.progress_bar_metrics),
        },
        "should_stop": trainer.should_stop,
        "validation": trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict(),
        "next_row": _next_row(trainer),
        "rows": [file.rows() for file in _metrics_files(trainer)],
    }


def restore_progress(module: LightningModule, progress: Mapping[str, Any]) -> None:
    """Bring back what `capture_progress` collected, when training is about to start.

    Raises:
        UserError: if the checkpoint is from within an epoch of a run with another number of processes.
    """
    trainer = module.trainer
    processes = progress["processes"]
    if len(processes) != trainer.world_size and any(process["logged"] for process in processes):
        raise UserError(
            f"the checkpoint was written within an epoch by {len(processes)} process(es), and now there are "
            f"{trainer.world_size}: resume with as many, or from a checkpoint at the end of an epoch"
        )
    if not within_epoch(trainer):
        trainer.fit_loop.epoch_loop.restarting = False  # see `end_epoch_once`
        # Lightning's look at two batches of validation before training has set it back
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.load_state_dict(progress["validation"])
    shown = progress["shown"]
    trainer.callback_metrics.update(_all_to(shown["callback"], module.device))
    trainer.logged_metrics.update(_all_to(shown["logged"], module.device))
    trainer.progress_bar_metrics.update(shown["progress_bar"])
    if trainer.early_stopping_callbacks:
        trainer.should_stop = progress["should_stop"]
    own = processes[trainer.global_rank] if trainer.global_rank < len(processes) else None
    if own:
        if lost := sorted(entry["name"] for entry in own["logged"] if not _has_metric(module, entry)):
            raise UserError(
                f"the checkpoint was written within an epoch by an older version, which kept {', '.join(lost)} in "
                "another way: resume from one at the end of an epoch"
            )
        for entry in own["logged"]:
            _log_again(module, entry)
        if own["logged"]:  # the next batch is not the epoch's first, where Lightning resets what was logged
            trainer._logger_connector._first_loop_iter = False
    _restore_rows(trainer, progress)
    if own:
        _restore_random_state(own["random"], module.device)


def end_epoch_once(loops: dict[str, Any]) -> None:
    """Mark the finished epoch of a checkpoint made at its end as such.

    With ``max_steps``, Lightning takes every checkpoint for one from within an epoch, and would end a finished one a
    second time: schedules stepped twice, metrics logged twice.
    """
    epochs = loops["fit_loop"]["epoch_progress"]
    if epochs["current"]["processed"] == epochs["current"]["ready"]:
        for count in epochs.values():
            count["completed"] = count["processed"]


def within_epoch(trainer: Trainer) -> bool:
    """Return whether an epoch of training was begun and its last batch is not behind."""
    progress = cast(_ProcessedTracker, trainer.fit_loop.epoch_progress.current)
    return progress.ready > progress.processed


def validation_follows(trainer: Trainer) -> bool:
    """Return whether the trainer validates after the batch that just ended."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def has_validated(trainer: Trainer) -> bool:
    """Return whether the trainer has validated since training began."""
    return trainer.fit_loop.epoch_loop.val_loop._has_run


def epoch_ends_here(trainer: Trainer) -> bool:
    """Return whether the batch that just ended is the epoch's last."""
    stops = trainer.should_stop and trainer.fit_loop._can_stop_early
    return bool(trainer.is_last_batch or stops or 0 <= trainer.max_steps <= trainer.global_step)


# -- what was logged so far in an epoch ------------------------------------------------------------------------------


def _logged_so_far(trainer: Trainer) -> list[dict[str, Any]]:
    """Running values of the epoch; none at its end, when they have been reduced to `_next_row`."""
    if not within_epoch(trainer):
        return []
    results = trainer.fit_loop.epoch_loop._results
    return [_describe(result) for result in results.values() if not result.has_reset]


def _describe(result: Any) -> dict[str, Any]:
    entry = {"fx": result.meta.fx, "name": result.meta.name, "reduce_fx": result.meta.reduce_fx.__name__}
    entry |= {name: getattr(result.meta, name) for name in LOGGED_HOW}
    entry |= {"sync_dist": result.meta.sync.should, "rank_zero_only": result.meta.sync.rank_zero_only}
    metric = result if result.is_tensor else cast(Metric, result.value)
    entry["state"] = _all_to(metric.metric_state, CPU)
    entry["updates"] = metric._update_count
    return entry


def _has_metric(module: LightningModule, entry: Mapping[str, Any]) -> bool:
    """Return whether the metric that was logged, if it was one, is one of the module."""
    path = entry["metric_attribute"]
    return path is None or path in (name for name, _ in module.named_modules())


def _log_again(module: LightningModule, entry: Mapping[str, Any]) -> None:
    """Make the entry of a logged value as it was."""
    trainer = module.trainer
    path = entry["metric_attribute"]
    metric = None if path is None else cast(Metric, module.get_submodule(path))
    results = trainer.fit_loop.epoch_loop._results
    results.log(
        entry["fx"],
        entry["name"],
        torch.zeros((), device=module.device) if metric is None else metric,
        reduce_fx=entry["reduce_fx"],
        sync_dist=entry["sync_dist"],
        sync_dist_fn=trainer.strategy.reduce,
        rank_zero_only=entry["rank_zero_only"],
        batch_size=1,
        **{name: entry[name] for name in LOGGED_HOW},
    )
    target = results[f"{entry['fx']}.{entry['name']}"] if metric is None else metric
    for name, value in entry["state"].items():
        setattr(target, name, _to(value, module.device))
    target._update_count, target._computed = entry["updates"], None


def _next_row(trainer: Trainer) -> dict[str, Any] | None:
    """The row that Lightning writes to the loggers as soon as the hook in which a checkpoint is made is over."""
    loop, connector = trainer.fit_loop, trainer._logger_connector
    counts = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
    epochs, batches = (cast(_ProcessedTracker, count) for count in counts)
    ends_epoch = epochs.ready == epochs.processed > epochs.completed
    ends_batch = within_epoch(trainer) and batches.processed > batches.completed and connector.should_update_logs
    if not trainer.training or not (ends_epoch or ends_batch):
        return None
    metrics = convert_tensors_to_scalars(dict(connector.metrics["log"]))
    if not metrics:
        return None
    step = metrics.pop("step", None)
    if step is None:
        metrics.setdefault("epoch", trainer.current_epoch)
        step = loop.epoch_loop._batches_that_stepped - ends_epoch
    return {"metrics": metrics, "step": int(step)}


def _metrics_files(trainer: Trainer) -> list[Any]:
    """Return the loggers whose files go on where a checkpoint was, as `bioprop.runs.MetricsFile`."""
    return [logger for logger in trainer.loggers if hasattr(logger, "keep")]


def _restore_rows(trainer: Trainer, progress: Mapping[str, Any]) -> None:
    """Drop the rows written after the checkpoint, where the run goes on in its own folder."""
    files = _metrics_files(trainer)
    if len(files) != len(progress["rows"]):
        return
    for file, rows in zip(files, progress["rows"], strict=True):
        if file.keep(rows) and progress["next_row"]:
            file.log_metrics(**progress["next_row"])
            file.save()


# -- random states ---------------------------------------------------------------------------------------------------


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the global generators, for networks that draw from them (dropout); ours have streams of their own."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# -- processes and devices -------------------------------------------------------------------------------------------


def _of_all_processes(own: dict[str, Any]) -> list[dict[str, Any]]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, own)
    return gathered


def _all_to(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: _to(value, device) for name, value in values.items()}


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
