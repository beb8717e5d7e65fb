"""Starting the processes that train together, and what happens when one of them ends before its time."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning import Trainer
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

from bioprop.commands import ctrl_c_withheld
from bioprop.errors import UserError

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
