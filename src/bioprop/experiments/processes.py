"""Jobs in processes of their own, some at a time."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection, forkserver, get_all_start_methods, get_context, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from bioprop.commands import ctrl_c_withheld
from bioprop.errors import UserError
from bioprop.experiments import worker
from bioprop.experiments.progress import Progress
from bioprop.experiments.worker import Job


class _Running(NamedTuple):
    job: Job
    process: BaseProcess
    reports: connection.Connection


def run_jobs(jobs: Sequence[Job], at_once: int, watcher: Progress) -> None:
    """Do all jobs, each in a process of its own, so that memory is its own and a crash ends nothing else.

    However this ends (an exception, Ctrl-C), no process is left behind.

    Args:
        jobs: in the order in which they start.
        at_once: number of jobs side by side.
        watcher: told of every start, epoch and end.
    """
    waiting, running = deque(jobs), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_start(waiting.popleft()))
                watcher.started(running[-1].job)
            connection.wait([*(each.process.sentinel for each in running), *(each.reports for each in running)])
            for each in list(running):
                _pass_on(each, watcher)
                if not each.process.is_alive():
                    _pass_on(each, watcher)  # what it said with its last breath
                    running.remove(each)
                    watcher.ended(each.job, each.process.exitcode or 0)
    finally:
        for each in running:
            each.process.kill()  # a run can be killed at any moment; a polite request would wait for the next batch
            each.process.join()


def ask(work: Callable[..., None], runs: Mapping[str, Sequence[str]]) -> Iterator[Any]:
    """Hear what one process says of runs until it ends; it is gone afterwards.

    Args:
        work: `bioprop.experiments.worker.check` or ``measure``.
        runs: arguments of ``bioprop fit`` by name.

    Raises:
        UserError: if it dies of something that it could not say.
    """
    receiver, sender = _context().Pipe(duplex=False)
    process = _started(work, runs, Path.cwd(), sender)
    sender.close()
    try:
        with suppress(EOFError):
            while True:
                yield receiver.recv()
        process.join()
        if process.exitcode:
            raise UserError("the settings could not be tried: run one of them alone, by bioprop fit, to see why")
    finally:
        process.kill()  # it has answered, or nobody waits for that any more
        process.join()


def _start(job: Job) -> _Running:
    receiver, sender = _context().Pipe(duplex=False)
    process = _started(worker.work, job, sender)
    sender.close()
    return _Running(job, process, receiver)


def _pass_on(running: _Running, watcher: Progress) -> None:
    with suppress(EOFError, OSError):
        while running.reports.poll():
            watcher.epoch(running.job, *running.reports.recv())


def _started(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    context = _context()
    process: BaseProcess = context.Process(target=work, args=arguments)  # type: ignore[attr-defined]
    try:
        process.start()
    except BaseException:
        # the server may import for seconds yet, and would hold this process's output open as long
        if server := getattr(forkserver._forkserver, "_forkserver_pid", None):
            os.kill(server, signal.SIGKILL)
        raise
    return process


def _context() -> BaseContext:
    """Processes that start as copies of one that has imported everything, and nothing else; or as new ones."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([worker.__name__])
    # Ctrl-C is this process's business: one that imports for seconds would die of it with a traceback
    resource_tracker.ensure_running()  # which the server starts otherwise, and which would open what is blocked here
    with ctrl_c_withheld():
        forkserver.ensure_running()
    return context
