"""The processes that train together: how they start, and how they end where one of them does before its time."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from pytorch_lightning.utilities.exceptions import SIGTERMException

from bioprop.commands import ctrl_c_withheld
from bioprop.distributed import process_count
from bioprop.errors import UserError

#: Longest time that a process waits for the others: the longest that one of them may be busy alone (converting a data
#: set, say). A process that died is noticed at once where it closed its connections, within seconds on one machine.
PATIENCE = timedelta(minutes=30)
#: Seconds between two looks at whether the process that started this one still lives.
WATCH_SECONDS = 2.0
#: Environment variable that tells processes which one started them.
LAUNCHER = "BIOPROP_LAUNCHER"
#: Seconds between two looks at the other processes.
LOOK_SECONDS = 0.5
#: Seconds that the first process has to end by itself when another has: before they met it waits for that one in a call
#: that no signal interrupts, afterwards it notices in the next exchange, and may have to save.
BEFORE_THEY_MET, AFTERWARDS = 3.0, 60.0


class WatchfulLauncher(_SubprocessScriptLauncher):
    """Lightning's, whose first process says why it ends when another has, with the status that fits.

    Lightning 2.6.6 kills it by SIGKILL within five seconds, where it is about to say so itself, or is saving, too.
    """

    #: Whether all processes have found each other.
    have_met = False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Start the other processes, watch them, and call the function here."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            with ctrl_c_withheld():  # until they can answer it, see `conduct`
                self._call_children_scripts()
            threading.Thread(target=self._watch, daemon=True, name="process-watch").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _watch(self) -> None:
        while not any(process.poll() for process in self.procs):
            if all(process.returncode == 0 for process in self.procs):
                return
            time.sleep(LOOK_SECONDS)
        time.sleep(AFTERWARDS if self.have_met else BEFORE_THEY_MET)
        for process in self.procs:
            process.kill()
        number, code = next((n, each.returncode) for n, each in enumerate(self.procs, 1) if each.returncode)
        status, sentence = _reason(number, code)
        sys.stderr.write(f"bioprop: {sentence}\n")
        sys.stderr.flush()
        os._exit(status)


def _reason(number: int, code: int) -> tuple[int, str]:
    """The exit status, and what to say, where a process has ended with a code; negative: by that signal."""
    told = -code if code < 0 else code - 128
    if told in (signal.SIGINT, signal.SIGTERM):
        return 128 + told, f"{signal.Signals(told).name}: ended before all processes had started"
    how = f"by signal {-code}" if code < 0 else f"with status {code}"
    return 1, f"error: process {number} ended {how}: see what it said, then go on with --ckpt_path last"


class GradientAveraging(DDPStrategy):
    """One process a device; algorithms average their gradients themselves (`mean_over_processes`).

    Lightning's own DDP hooks into autograd's backward pass, and algorithms here have none or many a batch: processes
    would drift apart silently. This strategy brings all to the same initial state and leaves the rest to the algorithm.
    ``--trainer.devices N`` chooses it by itself; in Python, give ``Trainer(strategy=GradientAveraging())``. Processes
    that share one GPU (the same device twice in ``parallel_devices``) exchange over gloo, since NCCL needs one each.

    Args:
        settings: arguments of Lightning's `DDPStrategy`.
    """

    #: What algorithms look for in a strategy of several processes.
    leaves_averaging_to_algorithms = True

    def __init__(self, **settings: Any) -> None:
        devices = settings.get("parallel_devices") or []
        if len(set(devices)) < len(devices):
            settings = {"process_group_backend": "gloo"} | settings
        super().__init__(**({"timeout": PATIENCE} | settings))

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if self.cluster_environment is not None and not self.cluster_environment.creates_processes_externally:
            self._launcher = WatchfulLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
            os.environ[LAUNCHER] = str(os.getpid())

    def setup_distributed(self) -> None:
        """Join the other processes; one that the first process started ends when that does."""
        if os.environ.get(LAUNCHER) == str(os.getppid()):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # as in `conduct`, for scripts
            _end_with_parent()
        super().setup_distributed()
        if isinstance(self._launcher, WatchfulLauncher):
            self._launcher.have_met = True
        atexit.register(_leave)  # gloo's threads must not outlive the interpreter, which would abort

    def configure_ddp(self) -> None:
        """Give every process the weights and buffers of the first, in place of wrapping the model."""
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            if tensor.device.type == self.root_device.type:
                dist.broadcast(tensor, 0)
            else:  # counters that stay on the CPU, which NCCL does not reach
                tensor.copy_(self.broadcast(tensor))

    def on_exception(self, exception: BaseException) -> None:
        """End the processes that this one started: they would wait for it, unless all were told to stop."""
        super().on_exception(exception)
        if isinstance(exception, SIGTERMException):
            return
        if isinstance(self._launcher, WatchfulLauncher):
            for process in self._launcher.procs:
                process.kill()


def _leave() -> None:
    if process_count() > 1:
        dist.destroy_process_group()


def _end_with_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        pause = threading.Event()
        while os.getppid() == parent:
            pause.wait(WATCH_SECONDS)
        # no clean-up: the main thread may wait in an exchange that never comes
        sys.stderr.write("bioprop: error: this process ends, since the one that started it has ended\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def refuse_strangers(world_size: int) -> None:
    """Compare the number of processes that a trainer counts on with what torchrun has started.

    Raises:
        UserError: if they differ: each process would train alone.
    """
    started = int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else world_size
    if started != world_size:
        raise UserError(
            f"torchrun started {started} processes, but the trainer counts on {world_size}: give --trainer.devices "
            "(for each node) and --trainer.num_nodes as torchrun has them"
        )


@contextmanager
def averaging_for_several_devices() -> Iterator[None]:
    """Make `GradientAveraging` what a trainer built within the context takes for more than one device."""
    name = "ddp"
    lightnings = dict(StrategyRegistry[name])
    StrategyRegistry.register(name, GradientAveraging, override=True, start_method="popen")
    try:
        yield
    finally:
        StrategyRegistry[name] = lightnings


def refuse_copies(trainer: Trainer) -> None:
    """Refuse strategies whose processes are copies of this one, which networks and settings cannot be sent to.

    Raises:
        UserError: naming what works.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise UserError(
            "trainer.strategy is one of those that spawn or fork, such as ddp_spawn, which a run cannot be handed to: "
            "leave it out, --trainer.devices N starts N processes"
        )
