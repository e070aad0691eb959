"""Decode windows in loader processes: their signals, their number, their errors in one line."""

import os
import signal
import traceback
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader

from utils.cli import INTERRUPTED, UserError

LAST_BATCH = 3  # seconds that a loader process has for it after SIGTERM


def _leave_signals_to_the_parent(worker):
    """Set up a loader process so that its parent alone reacts to signals.

    Ctrl-C and a closed terminal send their signal to the whole process group. SIGTERM may come to
    the group too, and is also how a process ends its children. So SIGTERM ends a loader process,
    but late enough for a batch that the parent still waits for.
    """
    for number in INTERRUPTED:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows, where a parent ends its children without asking
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(LAST_BATCH))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTED)  # `signals_blocked` blocked them


@contextmanager
def signals_blocked():
    """Block the signals of INTERRUPTED inside; a process started inside inherits the block."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ImageLoader(DataLoader):
    """Load batches as a DataLoader does, with signals left to this process and one-line errors.

    num_workers: loader processes, at most one for each core that this process may use. UserError
    for an image that can't be read, and for a system without room for another process.
    """

    def __init__(self, dataset, batch_size, num_workers=0, **options):
        # its own generator: starting a loader must not advance the one that training draws from
        super().__init__(dataset, batch_size, num_workers=min(num_workers, usable_cores()),
                         generator=torch.Generator(),
                         worker_init_fn=_leave_signals_to_the_parent, **options)

    def __iter__(self):
        try:
            yield from self.started()
        except Exception as error:
            # PyTorch's stack frames and the error hold each other, and keep the processes alive
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, UserError):  # the text begins with the loader process's traceback
                raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
            if isinstance(error, OSError):  # no more processes, or no more open files
                raise UserError(f"--num_workers {self.num_workers}: {error.strerror or error}; "
                                f"expected fewer processes, or --num_workers 0") from None
            raise

    def started(self):
        """Return a DataLoader's iterator, its processes started with signals blocked.

        A signal between a process's start and its set-up would end the process with a traceback.
        """
        with signals_blocked():
            return super().__iter__()


def usable_cores():
    """Return how many cores this process may use: taskset and batch systems limit them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
