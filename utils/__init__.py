"""What Trainer, Tester, dataloader and scripts share, and what OpenMP reads when PyTorch loads it.

OpenMP's threads wait for each other by spinning, in libgomp for milliseconds. Beside another busy
process the thread that is waited for does not run meanwhile, operation by operation. On two shared
cores a training step took 20 s, and with a tenth of a millisecond of spinning 0.9 s.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
