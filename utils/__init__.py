"""Share code between Trainer, Tester, dataloader and scripts; on a busy machine, spin less.

OpenMP's threads wait for each other by spinning, in libgomp for milliseconds. Beside another busy
process, a spinning thread takes the core of the thread that it waits for, in every operation: a
training step can take a hundred times as long. Less spinning prevents that and costs a tenth of
the speed of an idle machine (docs/PERFORMANCE.md), so it is set only where others compute now.
OpenMP reads the setting when PyTorch is imported, so this package is imported first.
"""

import os
import time

BUSY = 0.5     # cores that other processes use
LOOKED = 0.2   # seconds in which they are counted, while this process sleeps


def core_seconds():
    """Return the seconds that this process's cores have computed since boot; 0 if not on Linux."""
    if not hasattr(os, "sched_getaffinity"):
        return 0.0
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    try:
        with open("/proc/stat") as file:  # user, nice, system, idle, iowait, irq, softirq
            rows = [line.split()[1:8] for line in file if line.split()[0] in mine]
    except OSError:
        return 0.0
    ticks = sum(int(row[i]) for row in rows for i in (0, 1, 2, 5, 6))
    return ticks / os.sysconf("SC_CLK_TCK")


def others_compute():
    """Return whether other processes use more than BUSY cores now."""
    before = core_seconds()
    time.sleep(LOOKED)
    return core_seconds() - before > BUSY * LOOKED


if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ) and others_compute():
    os.environ["GOMP_SPINCOUNT"] = "2000"
