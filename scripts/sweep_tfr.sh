#!/usr/bin/env bash
# Train with four teacher forcing strategies (always, decay_late, decay_early, never), all else
# equal, then draw the figures and write OUT/report.html. The decays fit --num_epoch (default 70).
#
#   bash scripts/sweep_tfr.sh DATA OUT [--jobs N] [any Trainer flags]
#   bash scripts/sweep_tfr.sh data runs_tfr --recipe template --fast_train --num_epoch 20
#
# Called again, it skips the runs that are done and resumes the rest. Details: scripts/sweep.py.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/python.sh"
exec "$python" "$root/scripts/sweep.py" tfr "$@"
