"""Share code between Trainer, Tester, dataloader and scripts; shorten OpenMP's spinning.

OpenMP's threads wait for each other by spinning, in libgomp for milliseconds. Beside another busy
process, a spinning thread takes the core of the thread that it waits for, in every operation. On
two shared cores a training step took 20 s, and 0.9 s with a tenth of a millisecond of spinning.
OpenMP reads the setting when PyTorch is imported, so this package is imported first.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
