"""Share code between Trainer, Tester, dataloader and scripts; on a busy machine, spin less.

OpenMP's threads wait for each other by spinning, in libgomp for milliseconds. Beside another busy
process, a spinning thread takes the core of the thread that it waits for, in every operation: a
training step can take a hundred times as long. Less spinning prevents that and costs a tenth of
the speed of an idle machine (docs/PERFORMANCE.md), so it is set only where others compute already.
OpenMP reads the setting when PyTorch is imported, so this package is imported first.
"""

import os

BUSY = 0.5  # load average of a minute: another process has computed for most of it

if "OMP_WAIT_POLICY" not in os.environ and hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
