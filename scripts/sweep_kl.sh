#!/usr/bin/env bash
# Train with KL annealing Cyclical, Monotonic and None, all else equal, then draw the figures and
# write OUT/report.html.
#
#   bash scripts/sweep_kl.sh DATA OUT [--jobs N] [any Trainer flags]
#   bash scripts/sweep_kl.sh data runs_kl --recipe template --fast_train --num_epoch 20
#
# Called again, it skips the runs that are done and resumes the rest. Details: scripts/sweep.py.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/python.sh"
exec "$python" "$root/scripts/sweep.py" kl "$@"
