"""How a run is told to stop: SIGTERM, Ctrl-C, a terminal that is closed, and SLURM's signal before the time is up."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.exceptions import SIGTERMException

STOPPING = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class RunStopped(SIGTERMException):
    """A run that was told to stop has saved its state; the process is to end with status 128 + the signal's number."""


class StopSignals:
    """Notes signals when they come, and says at the end of a batch, in all processes alike, what is to be done.

    Lightning 2.6.6 broadcasts within its signal handler, which hangs several processes unless all are at the same
    place, and ignores SIGTERM while it evaluates; Ctrl-C ends its runs in the middle of a batch, unsaved.
    """

    def __init__(self) -> None:
        self.stopping = 0  # number of the signal that all processes stop for, from the end of a batch on
        self.requeue: Callable[[], Any] | None = None  # to be called when the state is saved
        self._received = 0
        self._requeue_received = False
        self._requeue_job: Callable[[], Any] | None = None
        self._before: Any = signal.SIG_DFL
        self._speaks = True

    def remember(self) -> None:
        """Note what SIGTERM does now, before Lightning takes it."""
        self._before = signal.getsignal(signal.SIGTERM)

    def let_through(self) -> None:
        """Undo what Lightning made of SIGTERM, where there is nothing to be saved."""
        if _in_main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def listen(self, trainer: Trainer) -> None:
        """Take over the signals, until Lightning restores the previous handlers when it is done.

        SIGHUP stays ignored where it was, which is how ``nohup`` lets a run outlive its terminal.
        Where Lightning requeues a SLURM job, its handler is put off until the batch is over and called then.
        """
        self.stopping, self.requeue = 0, None
        self._received, self._requeue_job, self._speaks = 0, None, trainer.is_global_zero
        if not _in_main_thread():
            return
        for number in STOPPING:
            if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            number, handler = environment.requeue_signal, signal.getsignal(environment.requeue_signal)
            if callable(handler):
                self._requeue_job = lambda: handler(number, None)
                signal.signal(number, self._note_requeue)

    def look(self, trainer: Trainer) -> None:
        """Set ``stopping`` and ``requeue`` to what any process was told, in all of them after the same batch."""
        number, requeue = self._received, int(self._requeue_received)
        self._requeue_received = False
        if trainer.world_size > 1:
            told = torch.tensor([number, requeue], device=trainer.strategy.root_device)
            number, requeue = torch.as_tensor(trainer.strategy.reduce(told, reduce_op="max")).tolist()
        self.stopping = self.stopping or number
        self.requeue = self._requeue_job if requeue else self.requeue

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            self._end_now(number)
        self._received = number
        if self._speaks:
            name = signal.Signals(number).name
            # no logging: the signal may have interrupted it; and no terminal, where that was closed
            with suppress(OSError):
                os.write(2, f"\nbioprop: {name}: finishing this batch, then saving (again: end at once)\n".encode())

    def _note_requeue(self, number: int, frame: FrameType | None) -> None:
        self._requeue_received = True

    @staticmethod
    def _end_now(number: int) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        os._exit(128 + number)  # where the signal is blocked


def _in_main_thread() -> bool:
    """Whether handlers can be set here."""
    return threading.current_thread() is threading.main_thread()
